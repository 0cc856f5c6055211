"""add_norm: total = h + dropout(y + bias), normed = LayerNorm(total) * gamma + beta, in one pass.

T rows, d columns (padded to COLUMNS inside). moments (2, T) float32: the mean and the reciprocal
deviation of each row, which the backward pass would otherwise sum up again.
"""

import torch
import triton
import triton.language as tl
from fasttx.kernels.triton.device import offsets, row_keep
from fasttx.kernels.triton.launch import LAUNCH, PARTIAL_SUMS, keep_scale
from fasttx.kernels.triton.tiles import SMALLEST, power_of_two
from torch import Tensor


@triton.jit(do_not_specialize=["rows", "threshold"])
def add_norm_forward(
    h, y, bias, gamma, beta, total, normed, moments, rows, threshold, seed, keep_scale, eps,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows."""
    first = tl.program_id(0) * ROWS
    row = first + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = column < D
    mask = (row < rows)[:, None] & inside[None, :]
    at = offsets(row, column, D)
    branch = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
    branch += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if DROPOUT:
        keep = row_keep(tl.load(seed), first, 0, threshold, ROWS, COLUMNS)
        branch = tl.where(keep, branch * keep_scale, 0.0)
    x = tl.load(h + at, mask=mask, other=0.0).to(tl.float32) + branch
    # The norm is that of the rounded sum, which is what the backward pass will find.
    stored = x.to(total.dtype.element_ty)
    x = stored.to(tl.float32)
    mean = tl.sum(tl.where(inside[None, :], x, 0.0), 1) / D
    centred = tl.where(inside[None, :], x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)
    g = tl.load(gamma + column, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(beta + column, mask=inside, other=0.0).to(tl.float32)
    n = centred * rstd[:, None] * g[None, :] + b[None, :]
    tl.store(total + at, stored, mask=mask)
    tl.store(normed + at, n.to(normed.dtype.element_ty), mask=mask)
    tl.store(moments + row, mean, mask=row < rows)
    tl.store(moments + rows + row, rstd, mask=row < rows)


@triton.jit(do_not_specialize=["rows", "threshold"])
def add_norm_backward(
    dtotal, dnormed, total, gamma, moments, dh, dy, sums, rows, threshold, seed, keep_scale,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DROPOUT: tl.constexpr,
    HAS_DTOTAL: tl.constexpr,
):  # fmt: skip
    """One program: every so many blocks of ROWS rows; its sums for bias, gamma, beta (3, D)."""
    program = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    inside = column < D
    g = tl.load(gamma + column, mask=inside, other=0.0).to(tl.float32)
    # Summed over rows once, at the end: that goes through shared memory.
    dbias = tl.zeros((ROWS, COLUMNS), tl.float32)
    dgamma = tl.zeros((ROWS, COLUMNS), tl.float32)
    dbeta = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(program * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        at = offsets(row, column, D)
        x = tl.load(total + at, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(moments + row, mask=row < rows, other=0.0)
        rstd = tl.load(moments + rows + row, mask=row < rows, other=0.0)
        xhat = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
        dn = tl.load(dnormed + at, mask=mask, other=0.0).to(tl.float32)
        dgamma += dn * xhat
        dbeta += dn
        scaled = dn * g[None, :]
        along = tl.sum(scaled * xhat, 1) / D
        level = tl.sum(scaled, 1) / D
        dx = (scaled - xhat * along[:, None] - level[:, None]) * rstd[:, None]
        if HAS_DTOTAL:
            dx += tl.load(dtotal + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dh + at, dx.to(dh.dtype.element_ty), mask=mask)
        branch = tl.where(mask, dx, 0.0)
        if DROPOUT:
            keep = row_keep(tl.load(seed), first, 0, threshold, ROWS, COLUMNS)
            branch = tl.where(keep, branch * keep_scale, 0.0)
        tl.store(dy + at, branch.to(dy.dtype.element_ty), mask=mask)
        dbias += branch
    sums += program.to(tl.int64) * 3 * D + column
    tl.store(sums, tl.sum(dbias, 0), mask=inside)
    tl.store(sums + D, tl.sum(dgamma, 0), mask=inside)
    tl.store(sums + 2 * D, tl.sum(dbeta, 0), mask=inside)


def tile(columns: int) -> dict[str, int]:
    """The compile-time part of a launch, forward and backward."""
    width = max(SMALLEST, power_of_two(columns))
    rows = max(1, 2048 // width)
    return {"D": columns, "ROWS": rows, "COLUMNS": width, "num_warps": 4 if width <= 2048 else 8}


def forward(
    h: Tensor, y: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, total: Tensor, normed: Tensor,
    moments: Tensor, threshold: int, seed: Tensor | None, eps: float,
) -> None:  # fmt: skip
    rows, columns = h.shape
    sizes = tile(columns)
    with torch.cuda.device_of(h):
        add_norm_forward[(triton.cdiv(rows, sizes["ROWS"]),)](
            h, y, bias, gamma, beta, total, normed, moments, rows, threshold, seed,
            keep_scale(threshold), eps, DROPOUT=threshold > 0, **sizes, **LAUNCH,
        )  # fmt: skip


def backward(
    dtotal: Tensor | None, dnormed: Tensor, total: Tensor, gamma: Tensor, moments: Tensor,
    dh: Tensor, dy: Tensor, dvectors: Tensor, threshold: int, seed: Tensor | None,
) -> None:  # fmt: skip
    rows, columns = total.shape
    sizes = tile(columns)
    programs = min(PARTIAL_SUMS, triton.cdiv(rows, sizes["ROWS"]))
    sums = dvectors.new_empty((programs, *dvectors.shape))
    with torch.cuda.device_of(total):
        add_norm_backward[(programs,)](
            dtotal, dnormed, total, gamma, moments, dh, dy, sums, rows, threshold, seed,
            keep_scale(threshold), DROPOUT=threshold > 0, HAS_DTOTAL=dtotal is not None, **sizes,
            **LAUNCH,
        )  # fmt: skip
    torch.sum(sums, 0, out=dvectors)
