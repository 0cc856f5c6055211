"""add_norm: h' = h + dropout(y + bias) and n = LayerNorm(h') * gamma + beta, in one pass each way.

T rows, d columns (padded to COLUMNS inside). Mean and reciprocal deviation are kept in fp32, (T,).
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

PARTIAL_SUMS = 256  # programs of the backward pass; not the device's size: bits must not follow it


@triton.jit(do_not_specialize=["rows", "threshold"])
def add_norm_forward(
    h, y, bias, gamma, beta, seed, h_out, normed, mean_out, rstd_out, h_row, y_row,
    rows, threshold, keep_scale, eps,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows."""
    first = tl.program_id(0) * ROWS
    row = first + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = column < D
    mask = (row < rows)[:, None] & inside[None, :]
    branch = tl.load(y + offsets(row, column, y_row), mask=mask, other=0.0).to(tl.float32)
    branch += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if DROPOUT:
        keep = row_keep(tl.load(seed), first, 0, threshold, ROWS, COLUMNS)
        branch = tl.where(keep, branch * keep_scale, 0.0)
    x = tl.load(h + offsets(row, column, h_row), mask=mask, other=0.0).to(tl.float32) + branch
    # The norm is that of the rounded sum, which is what the backward pass will find.
    stored = x.to(h_out.dtype.element_ty)
    x = stored.to(tl.float32)
    mean = tl.sum(tl.where(inside[None, :], x, 0.0), 1) / D
    centred = tl.where(inside[None, :], x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)
    g = tl.load(gamma + column, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(beta + column, mask=inside, other=0.0).to(tl.float32)
    n = centred * rstd[:, None] * g[None, :] + b[None, :]
    at = offsets(row, column, D)
    tl.store(h_out + at, stored, mask=mask)
    tl.store(normed + at, n.to(normed.dtype.element_ty), mask=mask)
    tl.store(mean_out + row, mean, mask=row < rows)
    tl.store(rstd_out + row, rstd, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "threshold"])
def add_norm_backward(
    grad_h, grad_n, h_out, gamma, mean_in, rstd_in, seed, dh, dy, sums, grad_h_row, grad_n_row,
    rows, threshold, keep_scale,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DROPOUT: tl.constexpr,
    HAS_H: tl.constexpr, HAS_N: tl.constexpr,
):  # fmt: skip
    """One program: every so many blocks of ROWS rows; its sums for bias, gamma, beta (3, D)."""
    program = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    inside = column < D
    g = tl.load(gamma + column, mask=inside, other=0.0).to(tl.float32)
    dbias = tl.zeros((COLUMNS,), tl.float32)
    dgamma = tl.zeros((COLUMNS,), tl.float32)
    dbeta = tl.zeros((COLUMNS,), tl.float32)
    for first in range(program * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        at = offsets(row, column, D)
        dx = tl.zeros((ROWS, COLUMNS), tl.float32)
        if HAS_N:
            x = tl.load(h_out + at, mask=mask, other=0.0).to(tl.float32)
            mean = tl.load(mean_in + row, mask=row < rows, other=0.0)
            rstd = tl.load(rstd_in + row, mask=row < rows, other=0.0)
            xhat = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
            at_n = offsets(row, column, grad_n_row)
            dn = tl.load(grad_n + at_n, mask=mask, other=0.0).to(tl.float32)
            dgamma += tl.sum(dn * xhat, 0)
            dbeta += tl.sum(dn, 0)
            scaled = dn * g[None, :]
            along = tl.sum(scaled * xhat, 1) / D
            level = tl.sum(scaled, 1) / D
            dx = (scaled - xhat * along[:, None] - level[:, None]) * rstd[:, None]
        if HAS_H:
            at_h = offsets(row, column, grad_h_row)
            dx += tl.load(grad_h + at_h, mask=mask, other=0.0).to(tl.float32)
        tl.store(dh + at, dx.to(dh.dtype.element_ty), mask=mask)
        branch = tl.where(mask, dx, 0.0)
        if DROPOUT:
            keep = row_keep(tl.load(seed), first, 0, threshold, ROWS, COLUMNS)
            branch = tl.where(keep, branch * keep_scale, 0.0)
        tl.store(dy + at, branch.to(dy.dtype.element_ty), mask=mask)
        dbias += tl.sum(branch, 0)
    sums += program.to(tl.int64) * 3 * D + column
    tl.store(sums, dbias, mask=inside)
    tl.store(sums + D, dgamma, mask=inside)
    tl.store(sums + 2 * D, dbeta, mask=inside)


def tile(columns: int) -> dict[str, int]:
    """The compile-time part of a launch, forward and backward."""
    width = max(SMALLEST, power_of_two(columns))
    rows = max(1, 2048 // width)
    return {"D": columns, "ROWS": rows, "COLUMNS": width, "num_warps": 4 if width <= 2048 else 8}


def _fake_forward(h: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(h.dtype, y.dtype)
    out, normed = (h.new_empty(h.shape, dtype=dtype) for _ in range(2))
    mean, rstd = (h.new_empty(h.shape[:1], dtype=torch.float32) for _ in range(2))
    return out, normed, mean, rstd


@operator(
    "add_norm(Tensor h, Tensor y, Tensor bias, Tensor gamma, Tensor beta, int threshold, "
    "Tensor? seed, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_forward,
)
def add_norm(
    h: Tensor, y: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, threshold: int,
    seed: Tensor | None, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """h' and n, (T, d) of the wider dtype of h and y; mean and rstd (T,) fp32."""
    if h.dim() != 2 or h.shape != y.shape:
        raise ValueError(
            f"h, y have shapes {tuple(h.shape)}, {tuple(y.shape)}; expected two (T, d)"
        )
    for name, x in (("bias", bias), ("gamma", gamma), ("beta", beta)):
        if x.shape != h.shape[1:]:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; expected ({h.shape[1]},)")
    outs = _fake_forward(h, y)
    if h.numel():
        h, y = dense(h), dense(y)
        sizes = tile(h.shape[1])
        with torch.cuda.device_of(h):
            add_norm_forward[(triton.cdiv(len(h), sizes["ROWS"]),)](
                h, y, bias.contiguous(), gamma.contiguous(), beta.contiguous(), seed, *outs,
                h.stride(0), y.stride(0), len(h), threshold, keep_scale(threshold), eps,
                DROPOUT=threshold > 0, **sizes, **LAUNCH,
            )  # fmt: skip
    return outs


def _fake_backward(
    grad_h: Tensor | None, grad_n: Tensor | None, h_out: Tensor, mean: Tensor, rstd: Tensor,
    gamma: Tensor, h_dtype: torch.dtype, y_dtype: torch.dtype, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    dh, dy = (h_out.new_empty(h_out.shape, dtype=dtype) for dtype in (h_dtype, y_dtype))
    return dh, dy, h_out.new_empty((3, h_out.shape[1]), dtype=torch.float32)


@operator(
    "add_norm_backward(Tensor? grad_h, Tensor? grad_n, Tensor h_out, Tensor mean, Tensor rstd, "
    "Tensor gamma, ScalarType h_dtype, ScalarType y_dtype, int threshold, Tensor? seed) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
)
def add_norm_gradients(
    grad_h: Tensor | None, grad_n: Tensor | None, h_out: Tensor, mean: Tensor, rstd: Tensor,
    gamma: Tensor, h_dtype: torch.dtype, y_dtype: torch.dtype, threshold: int, seed: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """dh and dy (T, d); dbias, dgamma, dbeta as (3, d) fp32."""
    dh, dy, sums = _fake_backward(grad_h, grad_n, h_out, mean, rstd, gamma, h_dtype, y_dtype)
    if not h_out.numel():
        return dh, dy, sums.zero_()
    rows, columns = h_out.shape
    sizes = tile(columns)
    programs = min(PARTIAL_SUMS, triton.cdiv(rows, sizes["ROWS"]))
    partial = sums.new_empty((programs, *sums.shape))
    grads = [None if grad is None else dense(grad) for grad in (grad_h, grad_n)]
    strides = [0 if grad is None else grad.stride(0) for grad in grads]
    with torch.cuda.device_of(h_out):
        add_norm_backward[(programs,)](
            *grads, h_out, gamma.contiguous(), mean, rstd, seed, dh, dy, partial, *strides,
            rows, threshold, keep_scale(threshold),
            DROPOUT=threshold > 0, HAS_H=grad_h is not None, HAS_N=grad_n is not None,
            **sizes, **LAUNCH,
        )  # fmt: skip
    return dh, dy, partial.sum(0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    h, y, bias, gamma, beta, threshold, seed, _ = inputs
    h_out, _, mean, rstd = output
    ctx.save_for_backward(h_out, mean, rstd, gamma, seed)
    ctx.settings = h.dtype, y.dtype, threshold
    ctx.vector_dtypes = bias.dtype, gamma.dtype, beta.dtype
    ctx.set_materialize_grads(False)  # the last block's residual stream has none


def _gradients(ctx: Any, grad_h: Tensor | None, grad_n: Tensor | None, *_: None) -> tuple[Any, ...]:
    h_out, mean, rstd, gamma, seed = ctx.saved_tensors
    dh, dy, sums = add_norm_gradients(grad_h, grad_n, h_out, mean, rstd, gamma, *ctx.settings, seed)
    vectors = (x.to(dtype) for x, dtype in zip(sums.unbind(), ctx.vector_dtypes, strict=True))
    return dh, dy, *vectors, None, None, None


derivative("add_norm", _save, _gradients)
