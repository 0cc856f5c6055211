"""Triton kernels of a kind that is known to be right on GPUs, after Triton's tutorials (softmax,
matrix multiplication, fused attention), written anew. That the machine computes them rightly
anchors it."""

import triton
import triton.language as tl


@triton.jit
def softmax(x, out, row_stride, columns, COLUMNS: tl.constexpr):
    """One program: a row."""
    row = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    inside = column < columns
    values = tl.load(x + row * row_stride + column, mask=inside, other=-float("inf"))
    numerator = tl.exp(values - tl.max(values, 0))
    tl.store(out + row * row_stride + column, numerator / tl.sum(numerator, 0), mask=inside)


@triton.jit
def matmul(
    a, b, c, m, n, k, a_row, b_row, c_row,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """c = a b. Programs in groups of GROUP blocks of rows; the loop is pipelined."""
    program = tl.program_id(0)
    rows, columns = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    group = program // (GROUP * columns)
    first = group * GROUP
    size = min(rows - first, GROUP)
    block_m = first + program % (GROUP * columns) % size
    block_n = program % (GROUP * columns) // size
    row = (block_m * BLOCK_M + tl.arange(0, BLOCK_M)) % m
    column = (block_n * BLOCK_N + tl.arange(0, BLOCK_N)) % n
    inner = tl.arange(0, BLOCK_K)
    a_at = a + row[:, None] * a_row + inner[None, :]
    b_at = b + inner[:, None] * b_row + column[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(tl.cdiv(k, BLOCK_K)):
        left = k - i * BLOCK_K
        a_tile = tl.load(a_at, mask=inner[None, :] < left, other=0.0)
        b_tile = tl.load(b_at, mask=inner[:, None] < left, other=0.0)
        sums = tl.dot(a_tile, b_tile, sums)
        a_at += BLOCK_K
        b_at += BLOCK_K * b_row
    row = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    at = c + row[:, None] * c_row + column[None, :]
    tl.store(at, sums.to(c.dtype.element_ty), mask=(row[:, None] < m) & (column[None, :] < n))


@triton.jit
def attention(
    q, k, v, out, length, scale, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr
):
    """Causal, of contiguous (B, H, length, D); program (block of queries, sequence and head)."""
    first = tl.program_id(0) * BLOCK_M
    start = tl.program_id(1) * length * D
    query, d = first + tl.arange(0, BLOCK_M), tl.arange(0, D)
    mine = start + query[:, None] * D + d[None, :]
    q_tile = tl.load(q + mine, mask=query[:, None] < length, other=0.0)
    highest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    sums = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    for begin in range(0, first + BLOCK_M, BLOCK_N):
        key = begin + tl.arange(0, BLOCK_N)
        at = start + key[:, None] * D + d[None, :]
        k_tile = tl.load(k + at, mask=key[:, None] < length, other=0.0)
        scores = tl.dot(q_tile, tl.trans(k_tile)) * (scale * 1.4426950408889634)
        scores = tl.where(query[:, None] >= key[None, :], scores, -float("inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        rescale = tl.exp2(highest - higher)
        sums = sums * rescale + tl.sum(weights, 1)
        v_tile = tl.load(v + at, mask=key[:, None] < length, other=0.0)
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * rescale[:, None])
        highest = higher
    result = acc / sums[:, None]
    tl.store(out + mine, result.to(out.dtype.element_ty), mask=query[:, None] < length)
