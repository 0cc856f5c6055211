"""Attention forward: one pass over whole rows where the keys fit a tile, online softmax beyond.

T rows, B sequences, H heads, D head_dim (padded to BLOCK_D inside). Exponents are base 2: qk_scale
is scale * log2(e), and lse (H, T) fp32 is log2 of the sum of 2^(score * qk_scale).
Source: FlashAttention-2 (Dao, 2023), algorithm 1; the whole-row kernel is plain softmax.
"""

import triton
import triton.language as tl
from fasttx.kernels.triton.device import (
    DEAD_ROWS,
    attention_keep,
    clear_rows,
    dead_rows,
    load_rows,
    store_rows,
)

# Sizes that change from batch to batch: a kernel compiled for one value serves them all.
SIZES = ["sequences", "heads", "total", "max_seqlen", "threshold"]


@triton.jit
def _clear(
    program, out, lse, seq_starts, seq_lens, out_row, sequences, heads, total, max_seqlen,
    D: tl.constexpr,
):  # fmt: skip
    """What the programs past the last query block do: zeros where no sequence is."""
    rows, dead = dead_rows(
        program * DEAD_ROWS, total, seq_starts, seq_lens, sequences, max_seqlen
    )  # fmt: skip
    clear_rows(out, rows, dead, out_row, heads * D)
    for _ in range(heads):
        tl.store(lse + rows, 0.0, mask=dead)
        lse += total


@triton.jit
def _finish(
    out, lse, acc, highest, sum_, queries, out_row, length, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Divide by the sum of a row and by the probability of being kept, once per output."""
    acc = acc * (keep_scale / sum_)[:, None]
    store_rows(out, acc, queries, out_row, length, D, BLOCK_D)
    tl.store(lse + queries, highest + tl.log2(sum_), mask=queries < length)


@triton.jit(do_not_specialize=SIZES)
def forward_whole_rows(
    q, k, v, out, lse, seq_starts, seq_lens, seed,
    q_row, q_head, k_row, k_head, v_row, v_head, out_row,
    sequences, heads, total, max_seqlen, qk_scale, threshold, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head against all of its sequence's keys (<= BLOCK_N)."""
    program = tl.program_id(0)
    blocks = tl.cdiv(max_seqlen, BLOCK_M)
    clearing = program - blocks * heads * sequences
    if clearing >= 0:
        _clear(
            clearing, out, lse, seq_starts, seq_lens, out_row, sequences, heads, total, max_seqlen,
            D,
        )  # fmt: skip
        return
    sequence = program // (blocks * heads)
    head = program // blocks % heads
    first_query = program % blocks * BLOCK_M
    length = tl.minimum(tl.load(seq_lens + sequence), max_seqlen)
    if first_query >= length:
        return
    start = tl.load(seq_starts + sequence).to(tl.int64)

    queries = first_query + tl.arange(0, BLOCK_M)
    keys = tl.arange(0, BLOCK_N)
    wide = head.to(tl.int64)
    q_tile = load_rows(q + start * q_row + wide * q_head, queries, q_row, length, D, BLOCK_D)
    k_tile = load_rows(k + start * k_row + wide * k_head, keys, k_row, length, D, BLOCK_D)
    v_tile = load_rows(v + start * v_row + wide * v_head, keys, v_row, length, D, BLOCK_D)

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
    _finish(
        out + start * out_row + wide * D, lse + wide * total + start, acc, highest, sum_, queries,
        out_row, length, keep_scale, D, BLOCK_D,
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def forward_online(
    q, k, v, out, lse, seq_starts, seq_lens, seed,
    q_row, q_head, k_row, k_head, v_row, v_head, out_row,
    sequences, heads, total, max_seqlen, qk_scale, threshold, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head, its sequence's keys BLOCK_N at a time."""
    program = tl.program_id(0)
    blocks = tl.cdiv(max_seqlen, BLOCK_M)
    clearing = program - blocks * heads * sequences
    if clearing >= 0:
        _clear(
            clearing, out, lse, seq_starts, seq_lens, out_row, sequences, heads, total, max_seqlen,
            D,
        )  # fmt: skip
        return
    sequence = program // (blocks * heads)
    head = program // blocks % heads
    first_query = program % blocks * BLOCK_M
    length = tl.minimum(tl.load(seq_lens + sequence), max_seqlen)
    if first_query >= length:
        return
    start = tl.load(seq_starts + sequence).to(tl.int64)

    queries = first_query + tl.arange(0, BLOCK_M)
    wide = head.to(tl.int64)
    k += start * k_row + wide * k_head
    v += start * v_row + wide * v_head
    q_tile = load_rows(q + start * q_row + wide * q_head, queries, q_row, length, D, BLOCK_D)
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
    _finish(
        out + start * out_row + wide * D, lse + wide * total + start, acc, highest, sum_, queries,
        out_row, length, keep_scale, D, BLOCK_D,
    )  # fmt: skip
