"""What the launchers of the row operations share, as rows.metal does for their kernels."""

from __future__ import annotations

from fasttx.kernels.metal.shaders import GROUP

ROWS_OF_A_SUM = 16  # as in rows.metal
BLOCKS, BLOCK_ROWS = 32, 4  # of a threadgroup: threads of eight columns each, by rows


def by_columns(columns: int, rows: int) -> dict[str, tuple[int, ...]]:
    """The grid of a thread for eight columns of each row."""
    blocks, rows = -(-columns // (8 * BLOCKS)) * BLOCKS, -(-rows // BLOCK_ROWS) * BLOCK_ROWS
    return {"threads": (blocks, rows), "group_size": (BLOCKS, BLOCK_ROWS)}


def by_rows(rows: int) -> dict[str, tuple[int, ...]]:
    """The grid of a simdgroup for each row."""
    return {"threads": (-(-rows * 32 // GROUP) * GROUP,), "group_size": (GROUP,)}


def parts(rows: int) -> int:
    """How many sums over rows a kernel leaves; torch adds them up."""
    return -(-rows // ROWS_OF_A_SUM)
