"""Launches bias_act. T rows, d columns."""

from __future__ import annotations

import torch
from fasttx.kernels.metal.rows import by_columns, parts
from fasttx.kernels.metal.shaders import launch
from torch import Tensor

FILES = ("philox", "rows", "bias_act")


def forward(
    u: Tensor, bias: Tensor, out: Tensor, threshold: int, seed: Tensor | None, gelu: bool
) -> None:
    rows, columns = u.shape
    launch(
        "bias_act_forward", FILES, (u, bias, out), threshold, seed, [rows, columns], [],
        by_columns(columns, rows), element_type=u.dtype, bias_type=bias.dtype, GELU=int(gelu),
    )  # fmt: skip


def backward(
    dout: Tensor, u: Tensor | None, bias: Tensor | None, out: Tensor | None, du: Tensor,
    dbias: Tensor, threshold: int, seed: Tensor | None, gelu: bool,
) -> None:  # fmt: skip
    rows, columns = dout.shape
    sums = dbias.new_empty(parts(rows), columns)
    seen = u if gelu else out
    assert seen is not None
    bias = dbias if bias is None else bias  # not read by relu, but something must be bound
    launch(
        "bias_act_backward", FILES, (dout, seen, bias, du, sums), threshold, seed,
        [rows, columns], [], by_columns(columns, len(sums)),
        element_type=dout.dtype, bias_type=bias.dtype, GELU=int(gelu),
    )  # fmt: skip
    torch.sum(sums, 0, out=dbias)
