"""The encoder in one call: packs a model's weights, and computes logits from token ids.

B texts, C classes, d d_model. It takes addresses; `fasttx.native` says when it may be used.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from fasttx.kernels.cpu.library import NO_MEMORY, library
from torch import Tensor

_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


DEEPEST_INT8 = (
    65_536  # the largest d_model and d_ff: sums of 8-bit products are whole 32-bit numbers
)


class Precision(enum.IntEnum):
    """How the products of the blocks are computed; of encoder_kernels.h."""

    FP32 = 0
    BF16 = 1
    INT8 = 2


class Split(enum.IntEnum):
    """How a call is cut up among threads, which changes no bit of the logits; for tests."""

    BY_SIZE = 0
    COLUMNS = 1
    ROWS = 2


class _Norm(ctypes.Structure):
    _fields_ = (("gamma", _P), ("beta", _P), ("eps", _F))


class _Linear(ctypes.Structure):
    _fields_ = (("weight", _P), ("bias", _P))


class _Block(ctypes.Structure):
    _fields_ = (
        *((name, _Norm) for name in ("norm1", "norm2")),
        *((name, _Linear) for name in ("qkv", "out", "up", "down")),
    )


_SIZES = (
    "d_model", "embedding_width", "heads", "d_ff", "layers", "vocabulary", "places", "classes",
)  # fmt: skip
_CHOICES = ("gelu", "post_norm", "first_row", "head_activation")
HEAD_ACTIVATIONS = ("gelu", "tanh", "relu")  # as encoder_kernels.h numbers them


class _Weights(ctypes.Structure):
    _fields_ = (
        *((name, _L) for name in _SIZES),
        *((name, _I) for name in _CHOICES),
        ("embedding_scale", _F),
        ("embedding", _P),
        ("positions", _P),
        ("embedding_norm", _Norm),
        ("projection", _Linear),
        ("blocks", ctypes.POINTER(_Block)),
        ("norm", _Norm),
        ("dense", _Linear),
        ("classify", _Linear),
    )


@dataclass(frozen=True)
class Norm:
    gamma: Tensor
    beta: Tensor
    eps: float


@dataclass(frozen=True)
class Linear:
    weight: Tensor  # (out, in)
    bias: Tensor | None


@dataclass(frozen=True)
class Block:
    norm1: Norm
    norm2: Norm
    qkv: Linear
    out: Linear
    up: Linear
    down: Linear


@dataclass(frozen=True)
class Weights:
    """All that a classifier computes with; float32, on the CPU. None: the model has no such part.

    first_row: the head reads a text's first row, not the mean of its rows.
    """

    heads: int
    gelu: bool
    post_norm: bool
    first_row: bool
    head_activation: str
    embedding_scale: float
    embedding: Tensor  # (vocabulary, e)
    positions: Tensor  # (longest text, e)
    embedding_norm: Norm | None
    projection: Linear | None  # (d, e)
    blocks: Sequence[Block]
    norm: Norm | None  # after pre-norm blocks
    dense: Linear
    classify: Linear


def offers(precision: Precision) -> bool:
    """Whether the instruction set in use has products of this precision."""
    return bool(library().fasttx_encoder_offers(precision))


class Encoder:
    """A packed classifier. It does not change, so any number of threads may call it at a time.

    Raises MemoryError, and ValueError for sizes that the precision cannot hold.
    """

    def __init__(self, weights: Weights, precision: Precision) -> None:
        self._native = library()
        self._model = _P()
        described, self._weights = _described(weights)
        self.classes, self.places = described.classes, described.places
        self.vocabulary = described.vocabulary
        code = self._native.fasttx_encoder_create(
            ctypes.byref(described), precision, ctypes.byref(self._model)
        )
        if code == NO_MEMORY:
            raise MemoryError("encoder: no memory for its packed weights")
        if code:
            raise ValueError(
                f"d_model or d_ff is too large for precision {precision.name.lower()}; expected at "
                f"most {DEEPEST_INT8:,}"
            )

    def changed(self) -> bool:
        """Whether one of some numbers of every weight is another than when it was packed."""
        return bool(self._native.fasttx_encoder_changed(self._model))

    def forward(
        self, ids: np.ndarray, offsets: np.ndarray, first: int, last: int, logits: Tensor,
        threads: int, split: Split = Split.BY_SIZE,
    ) -> int:  # fmt: skip
        """Logits of texts [first, last) into logits (last - first, C) float32, contiguous.

        ids int32, offsets int64, contiguous: text i is ids[offsets[i]:offsets[i + 1]]. Returns 0;
        or the number of the first row, from 1 at offsets[first], with an id outside the table; or
        -2 - i where text first + i is longer than the position table.
        """
        code: int = self._native.fasttx_encoder_forward(
            self._model, ids.ctypes.data, offsets.ctypes.data + 8 * first, last - first,
            logits.data_ptr(), split, threads,
        )  # fmt: skip
        if code == NO_MEMORY:
            raise MemoryError("encoder: no memory for the scratch space of a call")
        return code

    def __del__(self) -> None:
        if model := getattr(self, "_model", None):
            self._native.fasttx_encoder_destroy(model)


def _described(weights: Weights) -> tuple[_Weights, list[Tensor]]:
    """What the library reads, and the tensors whose addresses it holds."""
    kept: list[Tensor] = []

    def address(x: Tensor | None) -> int | None:
        if x is None:
            return None
        if x.dtype != torch.float32 or x.device.type != "cpu" or not x.is_contiguous():
            raise ValueError(f"a weight is {x.dtype} on {x.device}; expected contiguous float32")
        kept.append(x)
        return x.data_ptr()

    def norm(n: Norm | None) -> _Norm:
        return _Norm() if n is None else _Norm(address(n.gamma), address(n.beta), n.eps)

    def linear(layer: Linear | None) -> _Linear:
        return _Linear() if layer is None else _Linear(address(layer.weight), address(layer.bias))

    blocks = (_Block * max(1, len(weights.blocks)))()
    for to, b in zip(blocks, weights.blocks, strict=False):
        to.norm1, to.norm2 = norm(b.norm1), norm(b.norm2)
        to.qkv, to.out = linear(b.qkv), linear(b.out)
        to.up, to.down = linear(b.up), linear(b.down)
    vocabulary, width = weights.embedding.shape
    d_model = weights.dense.weight.shape[0]
    d_ff = weights.blocks[0].up.weight.shape[0] if weights.blocks else 1
    places, classes = weights.positions.shape[0], weights.classify.weight.shape[0]
    described = _Weights(
        d_model, width, weights.heads, d_ff, len(weights.blocks), vocabulary, places, classes,
        weights.gelu, weights.post_norm, weights.first_row,
        HEAD_ACTIVATIONS.index(weights.head_activation), weights.embedding_scale,
        address(weights.embedding), address(weights.positions), norm(weights.embedding_norm),
        linear(weights.projection), blocks, norm(weights.norm), linear(weights.dense),
        linear(weights.classify),
    )  # fmt: skip
    return described, kept
