"""embed: dropout(table[ids] * sqrt(d) + pe[position_ids]), and the gradient of the table.

T rows, d columns, V rows of the table. The gradient adds up the rows of each id in their order: the
ids are sorted, one program takes one id, and nothing is added by atomics.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from fasttx.kernels.triton.device import keep_eight, offsets, row_keep
from fasttx.kernels.triton.operators import (
    LAUNCH,
    dense,
    derivative,
    keep_scale,
    operator,
)
from fasttx.kernels.triton.tiles import SMALLEST, power_of_two
from torch import Tensor


@triton.jit(do_not_specialize=["rows", "vocabulary", "positions", "threshold"])
def embed_forward(
    ids, position_ids, table, pe, seed, out, table_row, pe_row,
    rows, vocabulary, positions, threshold, keep_scale, scale,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """One program: a tile of ROWS x COLUMNS. An index outside its table gives NaN, never memory."""
    first_row = tl.program_id(0) * ROWS
    first_column = tl.program_id(1) * COLUMNS
    row = first_row + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    inside = (column < D)[None, :]
    token = tl.load(ids + row, mask=row < rows, other=0)
    position = tl.load(position_ids + row, mask=row < rows, other=0)
    known = ((token >= 0) & (token < vocabulary))[:, None] & inside
    placed = ((position >= 0) & (position < positions))[:, None] & inside
    nan = float("nan")
    x = tl.load(table + offsets(token, column, table_row), mask=known, other=nan).to(tl.float32)
    x = x * scale
    x += tl.load(pe + offsets(position, column, pe_row), mask=placed, other=nan).to(tl.float32)
    if DROPOUT:
        keep = row_keep(tl.load(seed), first_row, first_column, threshold, ROWS, COLUMNS)
        x = tl.where(keep, x * keep_scale, 0.0)
    at = out + offsets(row, column, D)
    tl.store(at, x.to(out.dtype.element_ty), mask=(row < rows)[:, None] & inside)


@triton.jit(do_not_specialize=["threshold"])
def embed_backward(
    grad, order, ends, seed, dtable, grad_row, threshold, keep_scale, scale,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """One program: COLUMNS of the row of one id. order: the rows of the batch, sorted by id;
    those of id i stand at ends[i] ... ends[i + 1]."""
    token = tl.program_id(0)
    first_column = tl.program_id(1) * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)
    inside = column < D
    begin, end = tl.load(ends + token), tl.load(ends + token + 1)
    sum_ = tl.zeros((COLUMNS,), tl.float32)
    for first in range(begin, end, ROWS):
        place = first + tl.arange(0, ROWS)
        row = tl.load(order + place, mask=place < end, other=0)
        mask = (place < end)[:, None] & inside[None, :]
        g = tl.load(grad + offsets(row, column, grad_row), mask=mask, other=0.0).to(tl.float32)
        if DROPOUT:
            block = first_column // 8 + tl.arange(0, COLUMNS // 8)
            words = row.to(tl.int32)[:, None]
            keep = keep_eight(tl.load(seed), block[None, :], words, 0, 0, threshold, ROWS, COLUMNS)
            g = tl.where(keep, g * keep_scale, 0.0)
        sum_ += tl.sum(g, 0)
    at = dtable + token.to(tl.int64) * D + column
    tl.store(at, (sum_ * scale).to(dtable.dtype.element_ty), mask=inside)


def tile(columns: int, backward: bool = False) -> dict[str, int]:
    """The compile-time part of a launch. The backward pass gathers rows from all over, so it takes
    more of them at a time."""
    width = min(256, max(SMALLEST, power_of_two(columns)))
    rows = min(32, (8192 if backward else 2048) // width)
    return {"D": columns, "ROWS": rows, "COLUMNS": width, "num_warps": 4}


def _fake(ids: Tensor, position_ids: Tensor, table: Tensor, pe: Tensor, *rest: Any) -> Tensor:
    dtype = torch.promote_types(table.dtype, pe.dtype)
    return table.new_empty((ids.shape[0], table.shape[1]), dtype=dtype)


@operator(
    "embed(Tensor ids, Tensor position_ids, Tensor table, Tensor pe, int threshold, "
    "Tensor? seed) -> Tensor",
    fake=_fake,
)
def embed(
    ids: Tensor, position_ids: Tensor, table: Tensor, pe: Tensor, threshold: int,
    seed: Tensor | None,
) -> Tensor:  # fmt: skip
    """(T, d) of the wider dtype of table and pe."""
    if ids.dim() != 1 or ids.shape != position_ids.shape:
        raise ValueError(
            f"ids, position_ids have shapes {tuple(ids.shape)}, {tuple(position_ids.shape)}; "
            "expected two (T,)"
        )
    if table.dim() != 2 or pe.dim() != 2 or table.shape[1] != pe.shape[1]:
        raise ValueError(
            f"table, pe have shapes {tuple(table.shape)}, {tuple(pe.shape)}; expected (V, d) and "
            "(positions, d)"
        )
    out = _fake(ids, position_ids, table, pe)
    if out.numel():
        table, pe = dense(table), dense(pe)
        rows, columns = out.shape
        sizes = tile(columns)
        grid = (triton.cdiv(rows, sizes["ROWS"]), triton.cdiv(columns, sizes["COLUMNS"]))
        with torch.cuda.device_of(table):
            embed_forward[grid](
                ids.contiguous(), position_ids.contiguous(), table, pe, seed, out,
                table.stride(0), pe.stride(0), rows, len(table), len(pe), threshold,
                keep_scale(threshold), math.sqrt(columns), DROPOUT=threshold > 0, **sizes, **LAUNCH,
            )  # fmt: skip
    return out


@operator(
    "embed_backward(Tensor grad, Tensor ids, Tensor table, int threshold, Tensor? seed) -> Tensor",
    fake=lambda grad, ids, table, *rest: table.new_empty(table.shape),
)
def embed_gradient(
    grad: Tensor, ids: Tensor, table: Tensor, threshold: int, seed: Tensor | None
) -> Tensor:
    """dtable (V, d), every row of it written."""
    dtable = table.new_empty(table.shape)
    if not grad.numel():
        return dtable.zero_()
    grad = dense(grad)
    vocabulary, columns = table.shape
    sorted_ids, order = torch.sort(ids, stable=True)
    ends = torch.searchsorted(
        sorted_ids, torch.arange(vocabulary + 1, device=ids.device, dtype=ids.dtype)
    )
    sizes = tile(columns, backward=True)
    with torch.cuda.device_of(table):
        embed_backward[(vocabulary, triton.cdiv(columns, sizes["COLUMNS"]))](
            grad, order, ends, seed, dtable, grad.stride(0), threshold, keep_scale(threshold),
            math.sqrt(columns), DROPOUT=threshold > 0, **sizes, **LAUNCH,
        )  # fmt: skip
    return dtable


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, _, table, _, threshold, seed = inputs
    ctx.save_for_backward(ids, table, seed)
    ctx.threshold = threshold


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    ids, table, seed = ctx.saved_tensors
    return None, None, embed_gradient(grad, ids, table, ctx.threshold, seed), None, None, None


derivative("embed", _save, _gradients)
