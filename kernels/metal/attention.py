"""Launches attention. T rows, B sequences, H heads, D head_dim."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from fasttx.kernels.metal.shaders import GROUP, launch
from torch import Tensor

FILES = ("philox", "tiles", "attention_forward", "attention_backward")
ROWS = 32  # of a threadgroup: 8 for each of its simdgroups


def forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor, lens: Tensor,
    max_seqlen: int, threshold: int, seed: Tensor | None, causal: bool, scale: float,
) -> None:  # fmt: skip
    _zero(out, lse)
    kernels: dict[str, tuple[Tensor, ...]] = {
        "attention_forward": (q, k, v, out, lse, starts, lens)
    }
    _launch(kernels, (q, k, v, out), lens, max_seqlen, threshold, seed, causal, scale)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dq: Tensor, dk: Tensor,
    dv: Tensor, starts: Tensor, lens: Tensor, max_seqlen: int, threshold: int, seed: Tensor | None,
    causal: bool, scale: float,
) -> None:  # fmt: skip
    _zero(dq, dk, dv)
    delta = torch.empty_like(lse)
    kernels: dict[str, tuple[Tensor, ...]] = {
        "attention_dq": (q, k, v, out, dout, dq, lse, delta, starts, lens),
        "attention_dkdv": (q, k, v, dout, dk, dv, lse, delta, starts, lens),
    }
    strided = (q, k, v, out, dout, dq, dk, dv)
    _launch(kernels, strided, lens, max_seqlen, threshold, seed, causal, scale)


def _zero(*written: Tensor) -> None:
    """No simdgroup owns the rows outside every sequence."""
    for x in written:
        x.zero_()


def _launch(
    kernels: dict[str, tuple[Tensor, ...]], strided: Sequence[Tensor], lens: Tensor,
    max_seqlen: int, threshold: int, seed: Tensor | None, causal: bool, scale: float,
) -> None:  # fmt: skip
    """One after the other; the kernels read the strides of `strided` in tiles.metal's order."""
    rows, heads, head_dim = strided[0].shape
    threads = (-(-max_seqlen // ROWS) * GROUP, heads, len(lens))
    if not min(threads):
        return
    size = [rows, max_seqlen, *(stride for x in strided for stride in x.stride()[:2])]
    for name, tensors in kernels.items():
        launch(
            name, FILES, tensors, threshold, seed, size, [scale * math.log2(math.e), scale],
            {"threads": threads, "group_size": (GROUP, 1, 1)},
            element_type=strided[0].dtype, HEAD_DIM=head_dim, CAUSAL=int(causal),
        )  # fmt: skip
