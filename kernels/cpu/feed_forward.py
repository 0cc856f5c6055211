"""Launches feed_forward: two products, with what follows them in the products' own last step."""

from __future__ import annotations

from fasttx.kernels.cpu import linear
from fasttx.kernels.cpu.linear import Act
from torch import Tensor


def forward(
    n: Tensor, up: Tensor, bias: Tensor, down: Tensor, before: Tensor | None, u: Tensor,
    out: Tensor, threshold: int, seed: Tensor | None,
) -> None:  # fmt: skip
    act = Act.RELU if before is None else Act.GELU
    linear.multiply(n, up, bias, u, before=before, act=act, threshold=threshold, seed=seed)
    linear.multiply(u, down, None, out)


def backward(
    dout: Tensor, n: Tensor, up: Tensor, down: Tensor, before: Tensor | None, u: Tensor, du: Tensor,
    dn: Tensor | None, dup: Tensor | None, dbias: Tensor | None, ddown: Tensor | None,
    threshold: int, seed: Tensor | None,
) -> None:  # fmt: skip
    if ddown is not None:
        linear.backward(dout, u, ddown, None)
    if dn is None and dup is None:
        return
    act, gate = (Act.RELU, u) if before is None else (Act.GELU, before)
    linear.multiply(dout, down.t(), None, du, gate=gate, act=act, threshold=threshold, seed=seed)
    if dn is not None:
        linear.multiply(du, up.t(), None, dn)
    if dup is not None:
        linear.backward(du, n, dup, dbias)
