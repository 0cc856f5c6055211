"""A classifier as one call of the CPU library: token ids in, logits out.

Its weights are packed once, and no operation of torch runs in between. It stands beside the model,
which stays what it is: whoever trains it on, loads other weights or hooks a layer gets what the
model says, since the packed copy is made again, or left alone, whenever the model is another.

B texts, C classes.
"""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Callable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fasttx.errors import BackendUnavailableError, ConfigError
from fasttx.models.classifier import ClassifierHead, TransformerClassifier
from fasttx.models.encoder import Encoder, EncoderBlock, PostNormBlock
from fasttx.models.layers import is_layer_norm, is_linear
from fasttx.text.packing import RaggedIds

if TYPE_CHECKING:
    from fasttx.kernels.cpu import encoder

PRECISIONS = ("fp32", "bf16", "int8")

# What is computed here instead, before anybody replaces it.
_FORWARDS = [
    (TransformerClassifier, "forward", TransformerClassifier.forward),
    (Encoder, "encode", Encoder.encode),
    (EncoderBlock, "forward", EncoderBlock.forward),
    (PostNormBlock, "forward", PostNormBlock.forward),
    (ClassifierHead, "forward", ClassifierHead.forward),
    (nn.Linear, "forward", nn.Linear.forward),
    (nn.LayerNorm, "forward", nn.LayerNorm.forward),
]


class NativeClassifier:
    """`model` in this precision, by one call of the library wherever it `applies`."""

    def __init__(self, model: TransformerClassifier, precision: str = "fp32") -> None:
        if precision not in PRECISIONS:
            raise ConfigError(
                f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}"
            )
        self.model, self.precision = model, precision
        self._lock = threading.Lock()
        self._packed: _Packed | None = None

    def unavailable_reasons(self) -> list[str]:
        """Why this model cannot be called so, as it is now; each reason says what to do."""
        if self._computes_otherwise():
            return ["training mode or autocast: call model.eval(), and leave autocast"]
        if self._fresh() is not None:
            return []
        return list(_reasons(self.model, self.precision))

    def _computes_otherwise(self) -> bool:
        return self.model.training or torch.is_autocast_enabled("cpu")

    def require(self) -> None:
        """Raises ConfigError, with the reasons, where it does not apply."""
        if reasons := self.unavailable_reasons():
            raise ConfigError(
                f"precision {self.precision} cannot be had here:\n"
                + "\n".join(f"  - {reason}" for reason in reasons)
                + "\nUse another precision, or backend cpu on the CPU"
            )

    def logits(self, ids: RaggedIds, *, batch_size: int = 64) -> Tensor | None:
        """(B, C) float32; None where it does not apply. Raises ValueError and IndexError as the
        model does, for texts that are too long and for ids outside the embedding table."""
        if self._computes_otherwise():
            return None
        packed = self._fresh()
        if packed is None:
            with self._lock:
                packed = self._fresh() or self._pack()
        return None if packed is None else packed.logits(ids, batch_size)

    def _fresh(self) -> _Packed | None:
        """The packed copy, if it is still one of the model."""
        packed = self._packed
        return packed if packed is not None and packed.is_of(self.model) else None

    def _pack(self) -> _Packed | None:
        self._packed = None  # before there are two
        if any(_reasons(self.model, self.precision)):
            return None
        self._packed = _Packed(self.model, self.precision)
        return self._packed

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "precision": self.precision}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


class _Packed:
    """The weights of a model, packed, and what tells whether they are still its own."""

    def __init__(self, model: TransformerClassifier, precision: str) -> None:
        from fasttx.kernels.cpu import encoder

        modules = list(model.modules())
        # What a module is made of. A tensor that is changed in place counts its version up, unless
        # it is changed through `.data` or NumPy: then its numbers show it. One whose memory is
        # exchanged has another address.
        parents: list[dict[str, Any]] = [m._modules for m in modules if m._modules]
        holders: list[dict[str, Any]] = [
            *parents,
            *(m._parameters for m in modules if m._parameters),
            model._buffers,
        ]
        self._parents, self._counts = parents, list(map(len, parents))
        self._held_in = [held for held in holders for _ in held]
        self._names = [name for held in holders for name in held]
        self._parts = [part for held in holders for part in held.values()]
        self._tensors = [part for part in self._parts if isinstance(part, Tensor)]
        self._state = self._current_state()
        self._own_names = [m.__dict__ for m in modules]
        self._hooks = [*_hooks_of(torch_module, "_global"), *chain(*map(_hooks_of, modules))]
        self._norms = [m for m in modules if isinstance(m, nn.LayerNorm)]
        self._eps = [m.eps for m in self._norms]
        self._encoder = encoder.Encoder(_weights(model), encoder.Precision[precision.upper()])

    def _current_state(self) -> list[Any]:
        return [*map(_VERSION, self._tensors), *map(Tensor.data_ptr, self._tensors)]

    def is_of(self, model: TransformerClassifier) -> bool:
        """Whether `model` is the one that was packed and computes what it did then."""
        return (
            not any(self._hooks)
            and all(getattr(c, name) is forward for c, name, forward in _FORWARDS)
            and list(map(len, self._parents)) == self._counts
            and all(map(operator.is_, map(_PART, self._held_in, self._names), self._parts))
            and self._current_state() == self._state
            and True not in ["forward" in names for names in self._own_names]
            and [m.eps for m in self._norms] == self._eps
            and not self._encoder.changed()
        )

    def logits(self, ids: RaggedIds, batch_size: int) -> Tensor:
        texts = len(ids)
        values = np.ascontiguousarray(ids.values, dtype=np.int32)
        offsets = np.ascontiguousarray(ids.offsets, dtype=np.int64)
        logits = torch.empty(texts, self._encoder.classes)
        threads = torch.get_num_threads()
        for first in range(0, texts, batch_size):
            last = min(texts, first + batch_size)
            wrong = self._encoder.forward(values, offsets, first, last, logits[first:], threads)
            if wrong > 0:
                row = int(offsets[first]) + wrong - 1
                raise IndexError(
                    f"ids holds {values[row]} in row {row}; expected 0 to "
                    f"{self._encoder.vocabulary - 1}, a row of the embedding table"
                )
            if wrong:
                length = ids.lengths[first - 2 - wrong]
                raise ValueError(
                    f"max_seqlen allows for {length} tokens; expected at most max_len = "
                    f"{self._encoder.places}. Truncate the texts, or build a model with a larger "
                    "max_len"
                )
        return logits


_PART: Callable[[dict[str, Any], str], Any] = dict.get
_VERSION = operator.attrgetter("_version")


_HOOKS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")


def _hooks_of(owner: Any, prefix: str = "") -> list[dict[Any, Any]]:
    return [getattr(owner, f"{prefix}_{name}") for name in _HOOKS]


def _reasons(model: TransformerClassifier, precision: str) -> Iterator[str]:
    parameters = list(model.parameters())
    if type(model) is not TransformerClassifier:
        yield f"the model is a {type(model).__name__}: expected a TransformerClassifier"
        return
    if model.embedding.device.type != "cpu":
        yield f"device {model.embedding.device.type}: needs cpu"
        return
    try:
        backend = model.backend
    except BackendUnavailableError as error:
        backend = str(error)
    if backend != "cpu":
        yield f"attention backend {backend}: it is part of backend cpu"
        return
    if any(x.dtype != torch.float32 for x in (*parameters, model.positions)):
        yield "weights of another type than float32"
    if any(x.is_inference() or type(x) not in (nn.Parameter, Tensor) for x in parameters):
        yield "weights whose changes cannot be seen (inference tensors, or a subclass of Tensor)"
    if any(getattr(c, name) is not forward for c, name, forward in _FORWARDS):
        yield "a forward function was replaced"
    plain: list[nn.Module] = [model, model.blocks, model.head]  # type: ignore[list-item]
    kind = EncoderBlock if model.config.norm_first else PostNormBlock
    if any(type(block) is not kind for block in model.blocks):
        yield "a block was replaced or wrapped"
        return
    plain += model.blocks
    if any("forward" in m.__dict__ or any(_hooks_of(m)) for m in plain):
        yield "a module has hooks, or a forward function of its own"
    linears = [m for b in model.blocks for m in (b.qkv, b.out, b.up, b.down)]
    linears += [model.head.dense, model.head.classify]
    if model.embedding_projection is not None:
        linears.append(model.embedding_projection)
    outer = [m for m in (model.norm, model.embedding_norm) if m is not None]
    norms = [*outer, *(m for b in model.blocks for m in (b.norm1, b.norm2))]
    if not all(map(is_linear, linears)) or not all(
        is_layer_norm(m) and m.elementwise_affine and m.bias is not None for m in norms
    ):
        yield "a layer was replaced, wrapped or hooked"
        return
    yield from _precision_reasons(model, precision)


def _precision_reasons(model: TransformerClassifier, precision: str) -> Iterator[str]:
    from fasttx.kernels.cpu import encoder, library

    if not encoder.offers(encoder.Precision[precision.upper()]):
        yield (
            f"precision {precision}: this processor ({library.instruction_set()}) has no products "
            "of it"
        )
    widest = max(model.config.d_model, model.config.d_ff)
    if precision == "int8" and widest > encoder.DEEPEST_INT8:
        yield f"precision int8: the model is {widest:,} wide; expected {encoder.DEEPEST_INT8:,}"


def _weights(model: TransformerClassifier) -> encoder.Weights:
    from fasttx.kernels.cpu import encoder

    def values(x: Tensor) -> Tensor:
        return x.detach().contiguous()

    def norm(layer: nn.LayerNorm) -> encoder.Norm:
        return encoder.Norm(values(layer.weight), values(layer.bias), layer.eps)

    def linear(layer: nn.Linear) -> encoder.Linear:
        bias: Tensor | None = layer.bias
        return encoder.Linear(values(layer.weight), None if bias is None else values(bias))

    c = model.config
    blocks = [
        encoder.Block(
            norm(b.norm1), norm(b.norm2), linear(b.qkv), linear(b.out), linear(b.up), linear(b.down)
        )
        for b in model.blocks
    ]
    inner, last, projection = model.embedding_norm, model.norm, model.embedding_projection
    return encoder.Weights(
        c.num_heads, c.activation == "gelu", not c.norm_first, c.pooling == "cls",
        c.head_activation, 1.0 if c.positions == "learned" else math.sqrt(c.d_model),
        values(model.embedding), values(model.positions), None if inner is None else norm(inner),
        None if projection is None else linear(projection), blocks,
        None if last is None else norm(last), linear(model.head.dense),
        linear(model.head.classify),
    )  # fmt: skip
