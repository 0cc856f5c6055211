"""Launches the products of linear layers. T rows."""

from __future__ import annotations

from fasttx.kernels.cpu.library import addresses, call, dropout, stored_as_bfloat16
from torch import Tensor


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    outputs, inputs = weight.shape
    address, bias_address, out_address = addresses(weight, bias, out)
    call(
        "linear_forward", stored_as_bfloat16(x), x.data_ptr(), address, *weight.stride(),
        bias_address, None, out_address, len(x), outputs, inputs, 0, *dropout(0, None),
    )  # fmt: skip


def backward(dout: Tensor, x: Tensor, dweight: Tensor, dbias: Tensor | None) -> None:
    call(
        "weight_gradient", stored_as_bfloat16(x), *addresses(dout, x, dweight, dbias), len(x),
        *dweight.shape,
    )  # fmt: skip
