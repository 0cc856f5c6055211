"""The layers of a BERT-family model of transformers on our operations, in place and reversible.

    replaced = fasttx.hf.accelerate(model)
    print(replaced)                              # 12 x MLP ...
    replaced.restore()

Modules, weights and names stay; only what a module computes with is exchanged, as Liger Kernel does
it (https://github.com/linkedin/Liger-Kernel). With attn_implementation="fasttx" the attention is
ours too. B texts, L tokens, d columns.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation

from fasttx.errors import UnsupportedError
from fasttx.models import layers
from fasttx.ops import registry
from fasttx.ops.contract import Operations
from fasttx.ops.dropout import NO_DROPOUT, Dropout
from fasttx.ops.functional import seed_of_generator

log = logging.getLogger("fasttx")

# Whose blocks are BERT's, by the name that their classes begin with.
FAMILIES = ("Bert", "Roberta", "XLMRoberta", "Camembert", "Electra")


class Replaced:
    """What `accelerate` exchanged: how many of each kind, and the way back."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._places: list[tuple[nn.Module, str]] = []

    def put(self, module: nn.Module, method: str, kind: str, function: Callable[..., Any]) -> None:
        # A partial, not a method: it can be pickled, and copied with its module.
        module.__dict__[method] = functools.partial(function, module)
        self._places.append((module, method))
        self.counts[kind] += 1

    def restore(self) -> None:
        """The model computes as before. A second call changes nothing."""
        for module, method in self._places:
            module.__dict__.pop(method, None)
        self._places.clear()

    def __str__(self) -> str:
        return ", ".join(f"{count} x {kind}" for kind, count in self.counts.items())


def accelerate(model: nn.Module, backend: str = "auto") -> Replaced:
    """Linear layers, the MLP, and dropout + residual + LayerNorm of `model` on `backend`.

    BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA and DistilBERT; of other models the linear layers
    alone. A layer that has hooks, was wrapped or quantised stays as it is. Dropout masks are those
    that all backends share, their seeds drawn from torch's default generator.

    Raises ConfigError for an unknown backend, UnsupportedError where nothing can be exchanged.
    """
    registry.check_name(backend)
    replaced = Replaced()
    inside: set[nn.Module] = set()  # what an exchanged module computes itself
    for module in model.modules():
        for method, kind, function, parts in _exchanges(module):
            inside.update(parts)
            if method not in module.__dict__:
                replaced.put(module, method, kind, functools.partial(function, backend))
    for module in model.modules():
        if layers.is_linear(module) and module not in inside:
            replaced.put(module, "forward", "linear layer", functools.partial(_linear, backend))
    if not replaced.counts:
        raise UnsupportedError(
            f"{type(model).__name__} has no layer that fasttx can exchange, or all are exchanged "
            f"already; expected nn.Linear, or the blocks of {', '.join(FAMILIES)} or DistilBERT"
        )
    log.info("%s: %s on fasttx", type(model).__name__, replaced)
    return replaced


Exchange = tuple[str, str, Callable[..., Any], tuple[nn.Module, ...]]


def _exchanges(module: Any) -> Iterator[Exchange]:
    """(method, what it is, what stands in for it, the layers that this computes)."""
    cls = type(module)
    if not cls.__module__.startswith("transformers.models."):
        return
    name = cls.__name__
    if name in {f"{family}SelfOutput" for family in FAMILIES}:
        yield "forward", _ADD_NORM, _dense_add_norm, (module.dense,)
    elif name in {f"{family}Layer" for family in FAMILIES} and _activation(_act_of(module)):
        up, down = module.intermediate.dense, module.output.dense
        yield "feed_forward_chunk", _MLP, _feed_forward, (up, down)
    elif name == "TransformerBlock" and ".distilbert." in cls.__module__:
        ffn = module.ffn
        if _activation(ffn.activation):
            yield "forward", _MLP, _distilbert_block, (ffn.lin1, ffn.lin2)


_ADD_NORM = "dropout, residual and LayerNorm"
_MLP = "MLP with its LayerNorm"


def _act_of(layer: Any) -> Any:
    return layer.intermediate.intermediate_act_fn


def _activation(function: Any) -> str | None:
    """Our name of an activation, if a backend computes it."""
    if type(function) is nn.ReLU:
        return "relu"
    exact = type(function) is GELUActivation and function.act is torch.nn.functional.gelu
    exact |= type(function) is nn.GELU and function.approximate == "none"
    return "gelu" if exact else None


# --- what stands in: (backend, module, and what the module is called with) ------------------------


@functools.cache
def _resolve(backend: str, device: str, dtype: torch.dtype) -> Operations:
    return registry.resolve(backend, device, dtype, head_dim=32)  # attention is not asked for


def _operations(backend: str, x: Tensor) -> Operations:
    return _resolve(backend, x.device.type, x.dtype)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _site(dropout: nn.Module, x: Tensor) -> Dropout:
    p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    return Dropout.of(p, seed_of_generator(x.device)) if p else NO_DROPOUT


def _linear(backend: str, layer: nn.Linear, input: Tensor) -> Tensor:
    y = _operations(backend, input).linear(_rows(input), layer.weight, layer.bias)
    return y.view(*input.shape[:-1], y.shape[-1])


def _dense_add_norm(
    backend: str, module: Any, hidden_states: Tensor, input_tensor: Tensor
) -> Tensor:
    """LayerNorm(input + dropout(dense(hidden)))."""
    ops = _operations(backend, hidden_states)
    y, bias = layers.product_and_bias(ops, module.dense, _rows(hidden_states))
    site = _site(module.dropout, hidden_states)
    _, n = layers.add_norm(ops, _rows(input_tensor), y, bias, module.LayerNorm, site)
    return n.view(input_tensor.shape)


def _feed_forward(backend: str, layer: Any, attention_output: Tensor) -> Tensor:
    """LayerNorm(x + dropout(down(act(up(x)))))."""
    ops, x = _operations(backend, attention_output), _rows(attention_output)
    out, act = layer.output, _activation(_act_of(layer)) or ""
    y, bias = layers.feed_forward(ops, layer.intermediate.dense, out.dense, x, NO_DROPOUT, act)
    _, n = layers.add_norm(ops, x, y, bias, out.LayerNorm, _site(out.dropout, x))
    return n.view(attention_output.shape)


def _distilbert_block(
    backend: str, block: Any, hidden_states: Tensor, attention_mask: Any = None, **options: Any
) -> Tensor:
    attended, _ = block.attention(hidden_states, attention_mask=attention_mask, **options)
    ops, y = _operations(backend, attended), _rows(attended)
    h, zeros = _rows(hidden_states), y.new_zeros(y.shape[-1])
    _, n = layers.add_norm(ops, h, y, zeros, block.sa_layer_norm, NO_DROPOUT)
    ffn, act = block.ffn, _activation(block.ffn.activation) or ""
    y, bias = layers.feed_forward(ops, ffn.lin1, ffn.lin2, n, NO_DROPOUT, act)
    _, n = layers.add_norm(ops, n, y, bias, block.output_layer_norm, _site(ffn.dropout, n))
    return n.view(hidden_states.shape)
