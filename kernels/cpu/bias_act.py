"""Launches bias_act. T rows, d columns."""

from __future__ import annotations

from fasttx.kernels.cpu.library import addresses, call, dropout, stored_as_bfloat16
from torch import Tensor


def forward(
    u: Tensor, bias: Tensor, out: Tensor, threshold: int, seed: Tensor | None, gelu: bool
) -> None:
    call(
        "bias_act_forward", stored_as_bfloat16(u), *addresses(u, bias, out), *u.shape, gelu,
        *dropout(threshold, seed),
    )  # fmt: skip


def backward(
    dout: Tensor, u: Tensor | None, bias: Tensor | None, out: Tensor | None, du: Tensor,
    dbias: Tensor, threshold: int, seed: Tensor | None, gelu: bool,
) -> None:  # fmt: skip
    call(
        "bias_act_backward", stored_as_bfloat16(dout), *addresses(u, bias, out, dout, du, dbias),
        *dout.shape, gelu, *dropout(threshold, seed),
    )  # fmt: skip
