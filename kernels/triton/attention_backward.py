"""Attention backward in one launch, without atomics: every output is written by one program.

T rows, B sequences, H heads, D head_dim (padded to BLOCK_D inside). Per head, with Z the dropout
factors: P = softmax(scale Q K'), O = (P o Z) V, and so (FlashAttention-2, Dao 2023, section 3.1)

    dV = (P o Z)' dO    dS = P o (Z o (dO V') - delta)    dK = scale dS' Q    dQ = scale dS K

with delta = rowsum(dO o O), P recomputed from lse, the mask drawn again. Tiles are keys x queries,
so that P' and dS' are first operands of a product straight from registers. Exponents are base 2, as
in the forward pass: qk_scale is scale * log2(e), and made of it here scale would cost a spill.
"""

import triton
import triton.language as tl
from fasttx.kernels.triton.device import (
    DEAD_ROWS,
    LOG2_E,
    SIZES,
    attention_keep,
    clear_rows,
    dead_rows,
    load_rows,
    store_rows,
)


@triton.jit
def _row_products(out_tile, dout_tile):
    """delta, (BLOCK_M,): the sums of out * dout along each row.

    Products of fp32 are rounded before they are added: the compiler may join a multiplication and
    an addition, and inside a butterfly of shuffles each lane would then round another product. The
    lanes of a row would hold sums of different bits. Products of 16 bits are exact in fp32.
    """
    x, y = out_tile.to(tl.float32), dout_tile.to(tl.float32)
    if out_tile.dtype == tl.float32:
        return tl.sum(tl.fma(x, y, tl.zeros_like(x)), 1)
    return tl.sum(x * y, 1)


@triton.jit
def _weights_and_gradients(
    q_tile, k_tile, v_tile, dout_tile, lse_row, delta, queries, keys, sequence, head, first_query,
    first_key, length, threshold, seed, keep_scale, qk_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(BLOCK_N, BLOCK_M) each: P' with what was dropped at 0, and dS'."""
    scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * qk_scale
    allowed = (keys < length)[:, None] & (queries < length)[None, :]
    if CAUSAL:
        allowed = allowed & (keys[:, None] <= queries[None, :])
    # Masked again, and not only by zeros in k: 2^(0 - lse) may be infinite, and inf * 0 is NaN.
    p = tl.exp2(tl.where(allowed, scores - lse_row[None, :], float("-inf")))
    dp = tl.dot(v_tile, tl.trans(dout_tile), input_precision=PRECISION)
    dropped = p
    if DROPOUT:
        keep = tl.trans(
            attention_keep(
                tl.load(seed), sequence, head, first_query, first_key, threshold, BLOCK_M, BLOCK_N
            )
        )
        dropped = tl.where(keep, p, 0.0)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    return dropped, p * (dp - delta[None, :])


@triton.jit
def _keys(
    q, k, v, out, dout, dq, dk, dv, q_row, k_row, v_row, out_row, dout_row, dq_row, dk_row, dv_row,
    lse, sequence, head, first_key, length, threshold, seed, keep_scale, qk_scale, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WHOLE: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_N keys; where these are all keys (WHOLE) also every dQ."""
    keys = first_key + tl.arange(0, BLOCK_N)
    k_tile = load_rows(k, keys, k_row, length, D, BLOCK_D)
    v_tile = load_rows(v, keys, v_row, length, D, BLOCK_D)
    dk_tile = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv_tile = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    begin = 0
    if CAUSAL:
        begin = first_key // BLOCK_M * BLOCK_M
    for first_query in range(begin, length, BLOCK_M):
        queries = first_query + tl.arange(0, BLOCK_M)
        q_tile = load_rows(q, queries, q_row, length, D, BLOCK_D)
        dout_tile = load_rows(dout, queries, dout_row, length, D, BLOCK_D)
        out_tile = load_rows(out, queries, out_row, length, D, BLOCK_D)
        lse_row = tl.load(lse + queries, mask=queries < length, other=0.0) * LOG2_E
        delta = _row_products(out_tile, dout_tile)
        p, ds = _weights_and_gradients(
            q_tile, k_tile, v_tile, dout_tile, lse_row, delta, queries, keys, sequence, head,
            first_query, first_key, length, threshold, seed, keep_scale, qk_scale,
            BLOCK_M, BLOCK_N, CAUSAL, DROPOUT, PRECISION,
        )  # fmt: skip
        ds = ds.to(q_tile.dtype)
        dv_tile = tl.dot(p.to(dout_tile.dtype), dout_tile, dv_tile, input_precision=PRECISION)
        dk_tile = tl.dot(ds, q_tile, dk_tile, input_precision=PRECISION)
        if WHOLE:
            dq_tile = tl.dot(tl.trans(ds), k_tile, input_precision=PRECISION) * scale
            store_rows(dq, dq_tile, queries, dq_row, length, D, BLOCK_D)
    store_rows(dk, dk_tile * scale, keys, dk_row, length, D, BLOCK_D)
    store_rows(dv, dv_tile * keep_scale, keys, dv_row, length, D, BLOCK_D)


@triton.jit
def _queries(
    q, k, v, out, dout, dq, q_row, k_row, v_row, out_row, dout_row, dq_row, dq_head, start, wide,
    lse, sequence, head, first_query, length, threshold, seed, keep_scale, qk_scale, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK_M queries."""
    queries = first_query + tl.arange(0, BLOCK_M)
    q_tile = load_rows(q, queries, q_row, length, D, BLOCK_D)
    dout_tile = load_rows(dout, queries, dout_row, length, D, BLOCK_D)
    out_tile = load_rows(out, queries, out_row, length, D, BLOCK_D)
    lse_row = tl.load(lse + queries, mask=queries < length, other=0.0) * LOG2_E
    delta = _row_products(out_tile, dout_tile)
    dq_tile = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    end = length
    if CAUSAL:
        end = tl.minimum(length, first_query + BLOCK_M)
    for first_key in range(0, end, BLOCK_N):
        keys = first_key + tl.arange(0, BLOCK_N)
        k_tile = load_rows(k, keys, k_row, length, D, BLOCK_D)
        v_tile = load_rows(v, keys, v_row, length, D, BLOCK_D)
        _, ds = _weights_and_gradients(
            q_tile, k_tile, v_tile, dout_tile, lse_row, delta, queries, keys, sequence, head,
            first_query, first_key, length, threshold, seed, keep_scale, qk_scale,
            BLOCK_M, BLOCK_N, CAUSAL, DROPOUT, PRECISION,
        )  # fmt: skip
        ds = tl.trans(ds.to(k_tile.dtype))
        dq_tile = tl.dot(ds, k_tile, dq_tile, input_precision=PRECISION)
    # Not before: the address would hold registers through all products.
    dq += start * dq_row + wide * dq_head
    store_rows(dq, dq_tile * scale, queries, dq_row, length, D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def attention_backward(
    q, k, v, out, dout, dq, dk, dv, q_row, q_head, k_row, k_head, v_row, v_head, out_row, out_head,
    dout_row, dout_head, dq_row, dq_head, dk_row, dk_head, dv_row, dv_head, lse, starts, lens,
    sequences, heads, rows, max_seqlen, threshold, seed, keep_scale, qk_scale, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    WHOLE: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Programs in order: blocks of keys, blocks of queries (unless WHOLE), rows to clear."""
    program = tl.program_id(0)
    key_blocks = tl.cdiv(max_seqlen, BLOCK_N)
    blocks = key_blocks
    if not WHOLE:
        blocks += tl.cdiv(max_seqlen, BLOCK_M)
    clearing = program - blocks * heads * sequences
    if clearing >= 0:
        row, dead = dead_rows(clearing * DEAD_ROWS, rows, starts, lens, sequences, max_seqlen)
        clear_rows(dq, row, dead, dq_row, dq_head, heads, D)
        clear_rows(dk, row, dead, dk_row, dk_head, heads, D)
        clear_rows(dv, row, dead, dv_row, dv_head, heads, D)
        return
    sequence = program // (blocks * heads)
    head = program // blocks % heads
    block = program % blocks
    length = tl.minimum(tl.load(lens + sequence), max_seqlen)
    start = tl.load(starts + sequence).to(tl.int64)
    wide = head.to(tl.int64)
    q += start * q_row + wide * q_head
    k += start * k_row + wide * k_head
    v += start * v_row + wide * v_head
    out += start * out_row + wide * out_head
    dout += start * dout_row + wide * dout_head
    if WHOLE:
        dq += start * dq_row + wide * dq_head
    dk += start * dk_row + wide * dk_head
    dv += start * dv_row + wide * dv_head
    lse += wide * rows + start
    # The constant shortens addresses and masks: with the product four whole tiles spill 8 bytes.
    first_key = 0 if WHOLE else block * BLOCK_N
    if (block < key_blocks) & (first_key < length):
        _keys(
            q, k, v, out, dout, dq, dk, dv, q_row, k_row, v_row, out_row, dout_row, dq_row, dk_row,
            dv_row, lse, sequence, head, first_key, length, threshold, seed, keep_scale, qk_scale,
            scale, D, BLOCK_D, BLOCK_M, BLOCK_N, WHOLE, CAUSAL, DROPOUT, PRECISION,
        )  # fmt: skip
    if not WHOLE:
        first_query = (block - key_blocks) * BLOCK_M
        if (block >= key_blocks) & (first_query < length):
            _queries(
                q, k, v, out, dout, dq, q_row, k_row, v_row, out_row, dout_row, dq_row, dq_head,
                start, wide, lse, sequence, head, first_query, length, threshold, seed, keep_scale,
                qk_scale, scale, D, BLOCK_D, BLOCK_M, BLOCK_N, CAUSAL, DROPOUT, PRECISION,
            )  # fmt: skip
