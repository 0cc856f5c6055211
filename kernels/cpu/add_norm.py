"""Launches add_norm. T rows, d columns."""

from __future__ import annotations

from fasttx.kernels.cpu.library import addresses, call, dropout, stored_as_bfloat16
from torch import Tensor


def forward(
    h: Tensor, y: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, total: Tensor, normed: Tensor,
    moments: Tensor, threshold: int, seed: Tensor | None, eps: float,
) -> None:  # fmt: skip
    call(
        "add_norm_forward", stored_as_bfloat16(y),
        *addresses(h, y, bias, gamma, beta, total, normed), *_rows(moments), *h.shape, eps,
        *dropout(threshold, seed),
    )  # fmt: skip


def backward(
    dtotal: Tensor | None, dnormed: Tensor, total: Tensor, gamma: Tensor, moments: Tensor,
    dh: Tensor, dy: Tensor, dvectors: Tensor, threshold: int, seed: Tensor | None,
) -> None:  # fmt: skip
    dbias, dgamma, dbeta = _rows(dvectors)
    call(
        "add_norm_backward", stored_as_bfloat16(dnormed), *addresses(total, gamma),
        *_rows(moments), *addresses(dtotal, dnormed, dh, dy), dgamma, dbeta, dbias, *total.shape,
        *dropout(threshold, seed),
    )  # fmt: skip


def _rows(x: Tensor) -> range:
    """The addresses of the rows of a contiguous float32 matrix."""
    start, bytes_ = x.data_ptr(), 4 * x.shape[1]
    return range(start, start + len(x) * bytes_, bytes_)
