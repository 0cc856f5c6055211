"""What the kernels share: rows in memory, rows outside every sequence, dropout masks.

T rows, B sequences, H heads, D head_dim (padded to BLOCK_D inside a kernel).
"""

import triton
import triton.language as tl

# Sizes that change from batch to batch: a kernel compiled for one value serves them all.
SIZES = ["sequences", "heads", "rows", "max_seqlen", "threshold"]
LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)
PHILOX_ROUNDS = tl.constexpr(7)
DEAD_ROWS = tl.constexpr(64)  # rows that one clearing program looks at
_SPANS = tl.constexpr(32)  # sequences it compares them with at a time
_COLUMNS = tl.constexpr(32)  # of a head that it clears at a time: more would cost registers


@triton.jit
def load_rows(x, rows, row_stride, end, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(len(rows), BLOCK_D) of x; zeros from row `end` on, so that nothing there is ever read."""
    d = tl.arange(0, BLOCK_D)
    # Strides multiply in 64 bits: rows times 3HD leaves 32 bits at 2.8 million tokens.
    at = x + rows.to(tl.int64)[:, None] * row_stride + d[None, :]
    mask = rows[:, None] < end
    if D != BLOCK_D:
        mask = mask & (d[None, :] < D)
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def store_rows(x, value, rows, row_stride, end, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The inverse of `load_rows`."""
    d = tl.arange(0, BLOCK_D)
    at = x + rows.to(tl.int64)[:, None] * row_stride + d[None, :]
    mask = rows[:, None] < end
    if D != BLOCK_D:
        mask = mask & (d[None, :] < D)
    tl.store(at, value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def dead_rows(first, rows, starts, lens, sequences, max_seqlen):
    """Rows first ... first + DEAD_ROWS, and which of them belong to no sequence."""
    row = first + tl.arange(0, DEAD_ROWS)
    live = tl.zeros((DEAD_ROWS,), tl.int32)
    for i in range(0, sequences, _SPANS):
        sequence = i + tl.arange(0, _SPANS)
        mask = sequence < sequences
        start = tl.load(starts + sequence, mask=mask, other=0)
        length = tl.minimum(tl.load(lens + sequence, mask=mask, other=0), max_seqlen)
        inside = (row[:, None] >= start[None, :]) & (row[:, None] < (start + length)[None, :])
        live = live | tl.max(inside.to(tl.int32), 1)
    return row, (live == 0) & (row < rows)


@triton.jit
def clear_rows(x, row, dead, row_stride, head_stride, heads, D: tl.constexpr):
    """Zeros in the dead rows of x (T, H, D). Live rows cost no traffic."""
    at = x + row.to(tl.int64)[:, None] * row_stride
    zero = tl.zeros((DEAD_ROWS, _COLUMNS), x.dtype.element_ty)
    for _ in range(heads):
        for first in range(0, D, _COLUMNS):
            column = first + tl.arange(0, _COLUMNS)
            tl.store(at + column[None, :], zero, mask=dead[:, None] & (column < D)[None, :])
        at += head_stride


@triton.jit
def keep_eight(seed, block, c1, c2, c3, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS) bool, true where dropout keeps; Philox4x32-7 (Salmon et al., SC'11).

    block (1, COLUMNS // 8) and c1 (ROWS, 1) are counter words 0 and 1, c2 and c3 scalars. Each
    128-bit block is drawn once, for the eight neighbours that share it. Words mix only from the
    third round on, so the first two cost a row or a column of multiplications, not a tile.
    """
    w0, w1, w2, w3 = tl.philox(seed, block, c1, c2, c3, PHILOX_ROUNDS)
    # Each join adds a last dimension of two: (word >> 1, word & 1, half), in the order of keys.
    low = tl.join(
        tl.join((w0 & 0xFFFF) >= threshold, (w2 & 0xFFFF) >= threshold),
        tl.join((w1 & 0xFFFF) >= threshold, (w3 & 0xFFFF) >= threshold),
    )
    high = tl.join(
        tl.join((w0 >> 16) >= threshold, (w2 >> 16) >= threshold),
        tl.join((w1 >> 16) >= threshold, (w3 >> 16) >= threshold),
    )
    return tl.reshape(tl.join(low, high), (ROWS, COLUMNS))


@triton.jit
def attention_keep(
    seed, sequence, head, first_query, first_key, threshold,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """(QUERIES, KEYS) bool. counter = (key // 8, query, head, sequence); first_key % 8 == 0."""
    block = first_key // 8 + tl.arange(0, KEYS // 8)
    query = first_query + tl.arange(0, QUERIES)
    return keep_eight(
        seed, block[None, :], query[:, None], head, sequence, threshold, QUERIES, KEYS
    )


@triton.jit
def row_keep(
    seed, first_row, first_column, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """(ROWS, COLUMNS) bool. counter = (column // 8, row, 0, 0); first_column % 8 == 0."""
    block = first_column // 8 + tl.arange(0, COLUMNS // 8)
    row = first_row + tl.arange(0, ROWS)
    return keep_eight(seed, block[None, :], row[:, None], 0, 0, threshold, ROWS, COLUMNS)


@triton.jit
def offsets(rows, columns, row_stride):
    """(len(rows), len(columns)) int64: where elements lie in rows of contiguous columns."""
    return rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
