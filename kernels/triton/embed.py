"""embed: dropout(table[ids] * scale + positions[position_ids]), and the gradient of the table.

T rows, d columns, V words. The gradient adds up the rows of each id in their order: the ids are
sorted, one program takes one id, and nothing is added by atomics, whose order would be of chance.
"""

import torch
import triton
import triton.language as tl
from fasttx.kernels.triton.device import keep_eight, offsets, row_keep
from fasttx.kernels.triton.launch import LAUNCH, keep_scale
from fasttx.kernels.triton.tiles import SMALLEST, power_of_two
from torch import Tensor


@triton.jit(do_not_specialize=["rows", "words", "longest", "threshold"])
def embed_forward(
    ids, position_ids, table, positions, out, rows, words, longest, threshold, seed, keep_scale,
    scale, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """One program: a tile of ROWS x COLUMNS. An index outside its table gives NaN, never memory."""
    first_row = tl.program_id(0) * ROWS
    first_column = tl.program_id(1) * COLUMNS
    row = first_row + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    inside = (column < D)[None, :]
    word = tl.load(ids + row, mask=row < rows, other=0)
    position = tl.load(position_ids + row, mask=row < rows, other=0)
    known = ((word >= 0) & (word < words))[:, None] & inside
    placed = ((position >= 0) & (position < longest))[:, None] & inside
    nan = float("nan")
    x = tl.load(table + offsets(word, column, D), mask=known, other=nan).to(tl.float32) * scale
    x += tl.load(positions + offsets(position, column, D), mask=placed, other=nan).to(tl.float32)
    if DROPOUT:
        keep = row_keep(tl.load(seed), first_row, first_column, threshold, ROWS, COLUMNS)
        x = tl.where(keep, x * keep_scale, 0.0)
    at = out + offsets(row, column, D)
    tl.store(at, x.to(out.dtype.element_ty), mask=(row < rows)[:, None] & inside)


@triton.jit(do_not_specialize=["threshold"])
def embed_backward(
    dout, order, ends, dtable, threshold, seed, keep_scale, scale,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """One program: COLUMNS of the row of one id. order: the rows of the batch, sorted by id;
    those of id i stand at ends[i] ... ends[i + 1]."""
    word = tl.program_id(0)
    first_column = tl.program_id(1) * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)
    inside = column < D
    begin, end = tl.load(ends + word), tl.load(ends + word + 1)
    sum_ = tl.zeros((COLUMNS,), tl.float32)
    for first in range(begin, end, ROWS):
        place = first + tl.arange(0, ROWS)
        row = tl.load(order + place, mask=place < end, other=0)
        mask = (place < end)[:, None] & inside[None, :]
        g = tl.load(dout + offsets(row, column, D), mask=mask, other=0.0).to(tl.float32)
        if DROPOUT:
            # Not `row_keep`: these rows are no neighbours.
            block = first_column // 8 + tl.arange(0, COLUMNS // 8)
            c1 = row.to(tl.int32)[:, None]
            keep = keep_eight(tl.load(seed), block[None, :], c1, 0, 0, threshold, ROWS, COLUMNS)
            g = tl.where(keep, g * keep_scale, 0.0)
        sum_ += tl.sum(g, 0)
    at = dtable + word.to(tl.int64) * D + column
    tl.store(at, (sum_ * scale).to(dtable.dtype.element_ty), mask=inside)


def tile(columns: int, backward: bool = False) -> dict[str, int]:
    """The compile-time part of a launch. The backward pass gathers rows from all over, so it takes
    more of them at a time."""
    width = min(256, max(SMALLEST, power_of_two(columns)))
    rows = min(32, (8192 if backward else 2048) // width)
    return {"D": columns, "ROWS": rows, "COLUMNS": width, "num_warps": 4}


def forward(
    ids: Tensor, position_ids: Tensor, table: Tensor, positions: Tensor, out: Tensor,
    threshold: int, seed: Tensor | None, scale: float,
) -> None:  # fmt: skip
    rows, columns = out.shape
    sizes = tile(columns)
    grid = (triton.cdiv(rows, sizes["ROWS"]), triton.cdiv(columns, sizes["COLUMNS"]))
    with torch.cuda.device_of(out):
        embed_forward[grid](
            ids, position_ids, table, positions, out, rows, len(table), len(positions), threshold,
            seed, keep_scale(threshold), scale, DROPOUT=threshold > 0, **sizes, **LAUNCH,
        )  # fmt: skip


def backward(
    dout: Tensor, ids: Tensor, dtable: Tensor, threshold: int, seed: Tensor | None, scale: float
) -> None:
    words, columns = dtable.shape
    sorted_ids, order = torch.sort(ids, stable=True)
    ends = torch.searchsorted(sorted_ids, torch.arange(words + 1, device=ids.device))
    sizes = tile(columns, backward=True)
    with torch.cuda.device_of(dout):
        embed_backward[(words, triton.cdiv(columns, sizes["COLUMNS"]))](
            dout, order, ends, dtable, threshold, seed, keep_scale(threshold), scale,
            DROPOUT=threshold > 0, **sizes, **LAUNCH,
        )  # fmt: skip
