"""bias_act: dropout(act(u + bias)), act relu or gelu (exact, by erf), in one pass each way.

T rows, f columns.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from fasttx.kernels.triton.device import offsets, row_keep
from fasttx.kernels.triton.operators import (
    LAUNCH,
    dense,
    derivative,
    keep_scale,
    operator,
)
from fasttx.kernels.triton.tiles import SMALLEST, power_of_two
from torch import Tensor

ACTIVATIONS = ("relu", "gelu")
PARTIAL_SUMS = 256  # programs along the rows of the backward pass, whatever the device


@triton.jit
def _load(u, bias, row, column, u_row, rows, D: tl.constexpr):
    """u + bias, in fp32."""
    inside = column < D
    mask = (row < rows)[:, None] & inside[None, :]
    x = tl.load(u + offsets(row, column, u_row), mask=mask, other=0.0).to(tl.float32)
    return x + tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :], mask


@triton.jit
def _activate(x, GELU: tl.constexpr):
    if GELU:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return tl.where(x < 0.0, 0.0, x)  # NaN stays NaN


@triton.jit(do_not_specialize=["rows", "threshold"])
def bias_act_forward(
    u, bias, seed, out, u_row, rows, threshold, keep_scale,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DROPOUT: tl.constexpr,
    GELU: tl.constexpr,
):  # fmt: skip
    """One program: a tile of ROWS x COLUMNS."""
    first_row = tl.program_id(0) * ROWS
    first_column = tl.program_id(1) * COLUMNS
    row = first_row + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    x, mask = _load(u, bias, row, column, u_row, rows, D)
    x = _activate(x, GELU)
    if DROPOUT:
        keep = row_keep(tl.load(seed), first_row, first_column, threshold, ROWS, COLUMNS)
        x = tl.where(keep, x * keep_scale, 0.0)
    tl.store(out + offsets(row, column, D), x.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "threshold"])
def bias_act_backward(
    grad, u, bias, seed, du, sums, grad_row, u_row, rows, threshold, keep_scale,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DROPOUT: tl.constexpr,
    GELU: tl.constexpr,
):  # fmt: skip
    """One program: every so many blocks of ROWS rows, COLUMNS columns; its sum for bias."""
    program = tl.program_id(0)
    first_column = tl.program_id(1) * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)
    dbias = tl.zeros((COLUMNS,), tl.float32)
    for first_row in range(program * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first_row + tl.arange(0, ROWS)
        x, mask = _load(u, bias, row, column, u_row, rows, D)
        g = tl.load(grad + offsets(row, column, grad_row), mask=mask, other=0.0).to(tl.float32)
        if DROPOUT:
            keep = row_keep(tl.load(seed), first_row, first_column, threshold, ROWS, COLUMNS)
            g = tl.where(keep, g * keep_scale, 0.0)
        if GELU:
            density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
            g *= 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
        else:
            g = tl.where(x > 0.0, g, 0.0)
        tl.store(du + offsets(row, column, D), g.to(du.dtype.element_ty), mask=mask)
        dbias += tl.sum(tl.where(mask, g, 0.0), 0)
    tl.store(sums + program.to(tl.int64) * D + column, dbias, mask=column < D)


def tile(columns: int) -> dict[str, int]:
    """The compile-time part of a launch, forward and backward."""
    width = min(256, max(SMALLEST, power_of_two(columns)))
    return {"D": columns, "ROWS": 2048 // width, "COLUMNS": width, "num_warps": 4}


@operator(
    "bias_act(Tensor u, Tensor bias, int threshold, Tensor? seed, bool gelu) -> Tensor",
    fake=lambda u, *rest: u.new_empty(u.shape),
)
def bias_act(u: Tensor, bias: Tensor, threshold: int, seed: Tensor | None, gelu: bool) -> Tensor:
    """(T, f) of u's dtype."""
    if u.dim() != 2 or bias.shape != u.shape[1:]:
        raise ValueError(
            f"u, bias have shapes {tuple(u.shape)}, {tuple(bias.shape)}; expected (T, f), (f,)"
        )
    out = u.new_empty(u.shape)
    if u.numel():
        u = dense(u)
        rows, columns = u.shape
        sizes = tile(columns)
        grid = (triton.cdiv(rows, sizes["ROWS"]), triton.cdiv(columns, sizes["COLUMNS"]))
        with torch.cuda.device_of(u):
            bias_act_forward[grid](
                u, bias.contiguous(), seed, out, u.stride(0), rows, threshold,
                keep_scale(threshold), DROPOUT=threshold > 0, GELU=gelu, **sizes, **LAUNCH,
            )  # fmt: skip
    return out


def _fake_backward(grad: Tensor, u: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), u.new_empty(u.shape[1:], dtype=torch.float32)


@operator(
    "bias_act_backward(Tensor grad, Tensor u, Tensor bias, int threshold, Tensor? seed, "
    "bool gelu) -> (Tensor, Tensor)",
    fake=_fake_backward,
)
def bias_act_gradients(
    grad: Tensor, u: Tensor, bias: Tensor, threshold: int, seed: Tensor | None, gelu: bool
) -> tuple[Tensor, Tensor]:
    """du (T, f) and dbias (f,) fp32."""
    du, sums = _fake_backward(grad, u)
    if not u.numel():
        return du, sums.zero_()
    grad, u = dense(grad), dense(u)
    rows, columns = u.shape
    sizes = tile(columns)
    programs = min(PARTIAL_SUMS, triton.cdiv(rows, sizes["ROWS"]))
    partial = sums.new_empty((programs, columns))
    with torch.cuda.device_of(u):
        bias_act_backward[(programs, triton.cdiv(columns, sizes["COLUMNS"]))](
            grad, u, bias.contiguous(), seed, du, partial, grad.stride(0), u.stride(0), rows,
            threshold, keep_scale(threshold), DROPOUT=threshold > 0, GELU=gelu, **sizes, **LAUNCH,
        )  # fmt: skip
    return du, partial.sum(0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    u, bias, threshold, seed, gelu = inputs
    ctx.save_for_backward(u, bias, seed)
    ctx.settings = threshold, gelu


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    u, bias, seed = ctx.saved_tensors
    threshold, gelu = ctx.settings
    du, dbias = bias_act_gradients(grad, u, bias, threshold, seed, gelu)
    return du, dbias.to(bias.dtype), None, None, None


derivative("bias_act", _save, _gradients)
