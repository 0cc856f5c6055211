"""Attention forward: one pass over whole rows where the keys fit a tile, online softmax beyond.

T rows, B sequences, H heads, D head_dim (padded to BLOCK_D inside). Exponents are base 2, which is
what the hardware computes: qk_scale is scale * log2(e). lse (H, T) float32 is natural again.
Source: FlashAttention-2 (Dao, 2023), algorithm 1; over whole rows it is plain softmax.
"""

import triton
import triton.language as tl
from fasttx.kernels.triton.device import (
    DEAD_ROWS,
    LN_2,
    SIZES,
    attention_keep,
    clear_rows,
    dead_rows,
    load_rows,
    store_rows,
)


@triton.jit
def _whole_rows(
    q_tile, k, v, k_row, v_row, sequence, head, first_query, length, threshold, seed, qk_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Against all keys of the sequence at once (<= BLOCK_N): acc, maximum and sum of each row."""
    queries = first_query + tl.arange(0, BLOCK_M)
    keys = tl.arange(0, BLOCK_N)
    k_tile = load_rows(k, keys, k_row, length, D, BLOCK_D)
    v_tile = load_rows(v, keys, v_row, length, D, BLOCK_D)
    # (BLOCK_M, BLOCK_N)
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * qk_scale
    allowed = (keys < length)[None, :]
    if CAUSAL:
        allowed = allowed & (keys[None, :] <= queries[:, None])
    scores = tl.where(allowed, scores, float("-inf"))
    # A live sequence has key 0, and every query sees it: the maximum is finite.
    highest = tl.max(scores, 1)
    p = tl.exp2(scores - highest[:, None])
    sum_ = tl.sum(p, 1)  # of all weights: dropout comes after softmax
    if DROPOUT:
        keep = attention_keep(
            tl.load(seed), sequence, head, first_query, 0, threshold, BLOCK_M, BLOCK_N
        )
        p = tl.where(keep, p, 0.0)
    acc = tl.dot(p.to(v_tile.dtype), v_tile, input_precision=PRECISION)
    return acc, highest, sum_


@triton.jit
def _online(
    q_tile, k, v, k_row, v_row, sequence, head, first_query, length, threshold, seed, qk_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Against BLOCK_N keys at a time: acc, maximum and sum of each row."""
    queries = first_query + tl.arange(0, BLOCK_M)
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    sum_ = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    end = length
    if CAUSAL:
        end = tl.minimum(length, first_query + BLOCK_M)
    for first_key in range(0, end, BLOCK_N):
        keys = first_key + tl.arange(0, BLOCK_N)
        k_tile = load_rows(k, keys, k_row, length, D, BLOCK_D)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * qk_scale
        allowed = (keys < length)[None, :]
        if CAUSAL:
            allowed = allowed & (keys[None, :] <= queries[:, None])
        scores = tl.where(allowed, scores, float("-inf"))
        # Every query sees key 0, so the maximum is finite from the first block on.
        higher = tl.maximum(highest, tl.max(scores, 1))
        rescale = tl.exp2(highest - higher)
        highest = higher
        p = tl.exp2(scores - highest[:, None])
        sum_ = sum_ * rescale + tl.sum(p, 1)
        if DROPOUT:
            keep = attention_keep(
                tl.load(seed), sequence, head, first_query, first_key, threshold, BLOCK_M, BLOCK_N
            )
            p = tl.where(keep, p, 0.0)
        v_tile = load_rows(v, keys, v_row, length, D, BLOCK_D)
        acc = acc * rescale[:, None]
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
    return acc, highest, sum_


@triton.jit(do_not_specialize=SIZES)
def attention_forward(
    q, k, v, out, q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head,
    lse, starts, lens, sequences, heads, rows, max_seqlen, threshold, seed, keep_scale, qk_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WHOLE: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Programs in order: BLOCK_M queries of one head each, then rows to clear."""
    program = tl.program_id(0)
    blocks = tl.cdiv(max_seqlen, BLOCK_M)
    clearing = program - blocks * heads * sequences
    if clearing >= 0:
        row, dead = dead_rows(clearing * DEAD_ROWS, rows, starts, lens, sequences, max_seqlen)
        clear_rows(out, row, dead, out_row, out_head, heads, D)
        for _ in range(heads):
            tl.store(lse + row, 0.0, mask=dead)
            lse += rows
        return
    sequence = program // (blocks * heads)
    head = program // blocks % heads
    first_query = program % blocks * BLOCK_M
    length = tl.minimum(tl.load(lens + sequence), max_seqlen)
    if first_query >= length:
        return
    start = tl.load(starts + sequence).to(tl.int64)
    wide = head.to(tl.int64)
    q += start * q_row + wide * q_head
    k += start * k_row + wide * k_head
    v += start * v_row + wide * v_head

    queries = first_query + tl.arange(0, BLOCK_M)
    q_tile = load_rows(q, queries, q_row, length, D, BLOCK_D)
    if WHOLE:
        acc, highest, sum_ = _whole_rows(
            q_tile, k, v, k_row, v_row, sequence, head, first_query, length, threshold, seed,
            qk_scale, D, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL, DROPOUT, PRECISION,
        )  # fmt: skip
    else:
        acc, highest, sum_ = _online(
            q_tile, k, v, k_row, v_row, sequence, head, first_query, length, threshold, seed,
            qk_scale, D, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL, DROPOUT, PRECISION,
        )  # fmt: skip
    # By the sum of a row and by the probability of being kept: once an output, not once a weight.
    acc = acc * (keep_scale / sum_)[:, None]
    # Not before: these addresses would hold registers through all products.
    out += start * out_row + wide * out_head
    lse += wide * rows + start
    store_rows(out, acc, queries, out_row, length, D, BLOCK_D)
    tl.store(lse + queries, (highest + tl.log2(sum_)) * LN_2, mask=queries < length)
