"""Launches attention. T rows, B sequences, H heads, D head_dim."""

from __future__ import annotations

import ctypes

from fasttx.kernels.cpu.library import (
    Tensors,
    addresses,
    call,
    dropout,
    stored_as_bfloat16,
    view,
)
from torch import Tensor


def forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor, lens: Tensor,
    max_seqlen: int, threshold: int, seed: Tensor | None, causal: bool, scale: float,
) -> None:  # fmt: skip
    tensors = Tensors(view(q), view(k), view(v), view(out))
    _launch("attention_forward", tensors, q, lse, starts, lens, threshold, seed, causal, scale)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dq: Tensor, dk: Tensor,
    dv: Tensor, starts: Tensor, lens: Tensor, max_seqlen: int, threshold: int, seed: Tensor | None,
    causal: bool, scale: float,
) -> None:  # fmt: skip
    tensors = Tensors(*map(view, (q, k, v, out, dout, dq, dk, dv)))
    _launch("attention_backward", tensors, q, lse, starts, lens, threshold, seed, causal, scale)


def _launch(
    name: str, tensors: Tensors, q: Tensor, lse: Tensor, starts: Tensor, lens: Tensor,
    threshold: int, seed: Tensor | None, causal: bool, scale: float,
) -> None:  # fmt: skip
    wrong = call(
        name, stored_as_bfloat16(q), ctypes.byref(tensors), *addresses(lse, starts, lens),
        len(lens), *q.shape, scale, causal, *dropout(threshold, seed),
    )  # fmt: skip
    if wrong:
        raise ValueError(
            f"sequence {wrong - 1} leaves the rows of qkv or overlaps another one; expected "
            "seq_starts and seq_lens to cut out separate runs of rows"
        )
