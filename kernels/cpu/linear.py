"""Launches the products of linear layers. T rows."""

from __future__ import annotations

from enum import IntEnum

from fasttx.kernels.cpu.library import addresses, call, dropout, stored_as_bfloat16
from torch import Tensor


class Act(IntEnum):
    """As kernels.h numbers them."""

    NONE = 0
    RELU = 1
    GELU = 2


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    multiply(x, weight, bias, out)


def backward(dout: Tensor, x: Tensor, dweight: Tensor, dbias: Tensor | None) -> None:
    call(
        "weight_gradient", stored_as_bfloat16(x), *addresses(dout, x, dweight, dbias), len(x),
        *dweight.shape,
    )  # fmt: skip


def multiply(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, *, gate: Tensor | None = None,
    before: Tensor | None = None, act: Act = Act.NONE, threshold: int = 0,
    seed: Tensor | None = None,
) -> None:  # fmt: skip
    """out = dropout(act(x weight^T + bias)), and what goes into act in `before`.

    With `gate`, the backward pass through that: out = (x weight^T) dropout' act', where gate is
    what came out of relu and dropout, or went into gelu.
    """
    call(
        "linear_forward", stored_as_bfloat16(x), *addresses(x, weight), *weight.stride(),
        *addresses(bias, gate, before, out), len(x), *weight.shape, act, *dropout(threshold, seed),
    )  # fmt: skip
