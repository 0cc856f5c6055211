"""bias_act: dropout(act(u + bias)), act relu or gelu (exact, by erf), in one pass each way.

T rows, d columns.
"""

import torch
import triton
import triton.language as tl
from fasttx.kernels.triton.device import offsets, row_keep
from fasttx.kernels.triton.launch import LAUNCH, PARTIAL_SUMS, keep_scale
from fasttx.kernels.triton.tiles import SMALLEST, power_of_two
from torch import Tensor


@triton.jit
def _load(x, row, column, rows, D: tl.constexpr):
    """(len(row), len(column)) of x (rows, D), in fp32."""
    mask = (row < rows)[:, None] & (column < D)[None, :]
    return tl.load(x + offsets(row, column, D), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_vector(x, column, D: tl.constexpr):
    return tl.load(x + column, mask=column < D, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _activate(x, GELU: tl.constexpr):
    if GELU:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return tl.where(x <= 0.0, 0.0, x)  # NaN stays NaN


@triton.jit(do_not_specialize=["rows", "threshold"])
def bias_act_forward(
    u, bias, out, rows, threshold, seed, keep_scale,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DROPOUT: tl.constexpr,
    GELU: tl.constexpr,
):  # fmt: skip
    """One program: a tile of ROWS x COLUMNS."""
    first_row = tl.program_id(0) * ROWS
    first_column = tl.program_id(1) * COLUMNS
    row = first_row + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    x = _activate(_load(u, row, column, rows, D) + _load_vector(bias, column, D), GELU)
    if DROPOUT:
        keep = row_keep(tl.load(seed), first_row, first_column, threshold, ROWS, COLUMNS)
        x = tl.where(keep, x * keep_scale, 0.0)
    mask = (row < rows)[:, None] & (column < D)[None, :]
    tl.store(out + offsets(row, column, D), x.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "threshold"])
def bias_act_backward(
    dout, u, bias, out, du, sums, rows, threshold, seed, keep_scale,
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
        g = _load(dout, row, column, rows, D)
        if GELU:
            if DROPOUT:
                keep = row_keep(tl.load(seed), first_row, first_column, threshold, ROWS, COLUMNS)
                g = tl.where(keep, g * keep_scale, 0.0)
            x = _load(u, row, column, rows, D) + _load_vector(bias, column, D)
            density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
            g *= 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
        else:
            # out is 0 where relu or dropout let nothing through: no mask is drawn again, and u need
            # not be kept. A NaN is let through, as torch's relu does.
            g = tl.where(_load(out, row, column, rows, D) <= 0.0, 0.0, g * keep_scale)
        mask = (row < rows)[:, None] & (column < D)[None, :]
        tl.store(du + offsets(row, column, D), g.to(du.dtype.element_ty), mask=mask)
        dbias += tl.sum(tl.where(mask, g, 0.0), 0)
    tl.store(sums + program.to(tl.int64) * D + column, dbias, mask=column < D)


def tile(columns: int, backward: bool = False) -> dict[str, int]:
    """The compile-time part of a launch.

    The backward pass sums over rows, between warps through shared memory. There the threads of a
    warp store eight columns each, 32 bytes apart: in a tile of 64 columns two of them meet in a
    bank, in one of 256 columns eight. Rows of 64 still fill whole sectors.
    """
    width = min(64 if backward else 256, max(SMALLEST, power_of_two(columns)))
    return {"D": columns, "ROWS": 2048 // width, "COLUMNS": width, "num_warps": 4}


def forward(
    u: Tensor, bias: Tensor, out: Tensor, threshold: int, seed: Tensor | None, gelu: bool
) -> None:
    rows, columns = u.shape
    sizes = tile(columns)
    grid = (triton.cdiv(rows, sizes["ROWS"]), triton.cdiv(columns, sizes["COLUMNS"]))
    with torch.cuda.device_of(u):
        bias_act_forward[grid](
            u, bias, out, rows, threshold, seed, keep_scale(threshold), DROPOUT=threshold > 0,
            GELU=gelu, **sizes, **LAUNCH,
        )  # fmt: skip


def backward(
    dout: Tensor, u: Tensor | None, bias: Tensor | None, out: Tensor | None, du: Tensor,
    dbias: Tensor, threshold: int, seed: Tensor | None, gelu: bool,
) -> None:  # fmt: skip
    rows, columns = dout.shape
    sizes = tile(columns, backward=True)
    programs = min(PARTIAL_SUMS, triton.cdiv(rows, sizes["ROWS"]))
    sums = dbias.new_empty((programs, columns))
    with torch.cuda.device_of(dout):
        bias_act_backward[(programs, triton.cdiv(columns, sizes["COLUMNS"]))](
            dout, u, bias, out, du, sums, rows, threshold, seed, keep_scale(threshold),
            DROPOUT=threshold > 0, GELU=gelu, **sizes, **LAUNCH,
        )  # fmt: skip
    torch.sum(sums, 0, out=dbias)
