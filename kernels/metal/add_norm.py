"""Launches add_norm. T rows, d columns."""

from __future__ import annotations

import torch
from fasttx.kernels.metal.rows import by_rows, parts
from fasttx.kernels.metal.shaders import launch
from torch import Tensor

FILES = ("philox", "rows", "add_norm")


def forward(
    h: Tensor, y: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, total: Tensor, normed: Tensor,
    moments: Tensor, threshold: int, seed: Tensor | None, eps: float,
) -> None:  # fmt: skip
    rows, columns = h.shape
    # Parameters of one layer share a dtype, and so one of them is enough for the kernel.
    wide = torch.promote_types(torch.promote_types(bias.dtype, gamma.dtype), beta.dtype)
    vectors = (bias.to(wide), gamma.to(wide), beta.to(wide))
    launch(
        "add_norm_forward", FILES, (h, y, *vectors, total, normed, moments), threshold, seed,
        [rows], [eps], by_rows(rows), h_type=h.dtype, y_type=y.dtype, total_type=total.dtype,
        vector_type=wide, COLUMNS=columns,
    )  # fmt: skip


def backward(
    dtotal: Tensor | None, dnormed: Tensor, total: Tensor, gamma: Tensor, moments: Tensor,
    dh: Tensor, dy: Tensor, dvectors: Tensor, threshold: int, seed: Tensor | None,
) -> None:  # fmt: skip
    rows, columns = total.shape
    sums = dvectors.new_empty((parts(rows), *dvectors.shape))
    added = total if dtotal is None else dtotal
    launch(
        "add_norm_backward", FILES, (added, dnormed, total, gamma, moments, dh, dy, sums),
        threshold, seed, [rows, int(dtotal is not None)], [], by_rows(len(sums)),
        h_type=dh.dtype, y_type=dy.dtype, total_type=total.dtype, vector_type=gamma.dtype,
        COLUMNS=columns,
    )  # fmt: skip
    torch.sum(sums, 0, out=dvectors)
