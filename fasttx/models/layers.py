"""Layers on the operations of a backend, which take weights and biases instead of modules.

A layer that somebody replaced, wrapped, hooked or quantised is called as a module instead, so that
what it was made to do is done. T rows, d columns.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fasttx.ops.contract import Operations
from fasttx.ops.dropout import Dropout

_LINEAR, _LAYER_NORM = nn.Linear.forward, nn.LayerNorm.forward  # before anybody replaces them


def is_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling `layer` would compute x weight^T + bias and do nothing else."""
    return type(layer) is nn.Linear and nn.Linear.forward is _LINEAR and not _is_changed(layer)


def is_layer_norm(layer: nn.Module) -> TypeGuard[nn.LayerNorm]:
    return (
        type(layer) is nn.LayerNorm
        and nn.LayerNorm.forward is _LAYER_NORM
        and not _is_changed(layer)
    )


def _is_changed(layer: nn.Module) -> bool:
    """Whether it has hooks, or a `forward` of its own that was put on this instance."""
    return bool(
        layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or "forward" in layer.__dict__
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def linear(ops: Operations, layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x): (T, in) -> (T, out)."""
    if is_linear(layer):
        return ops.linear(x, layer.weight, layer.bias)
    y: Tensor = layer(x)
    return y


def product_and_bias(ops: Operations, layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """layer(x) in two parts, (T, out) and (out,), for an operation that adds the bias itself."""
    if is_linear(layer):
        bias: Tensor | None = layer.bias
        if bias is not None:
            return ops.linear(x, layer.weight), bias
    y: Tensor = layer(x)
    return y, y.new_zeros(y.shape[-1])


def feed_forward(
    ops: Operations, up: nn.Module, down: nn.Module, n: Tensor, dropout: Dropout, activation: str
) -> tuple[Tensor, Tensor]:
    """down(dropout(act(up(n)))) in two parts, as `product_and_bias`."""
    if is_linear(up) and is_linear(down):
        first: Tensor | None = up.bias
        last: Tensor | None = down.bias
        if first is not None and last is not None:
            return ops.feed_forward(n, up.weight, first, down.weight, dropout, activation), last
    u, bias = product_and_bias(ops, up, n)
    return product_and_bias(ops, down, ops.bias_act(u, bias, dropout, activation))


def add_norm(
    ops: Operations, h: Tensor, y: Tensor, bias: Tensor, norm: nn.Module, dropout: Dropout
) -> tuple[Tensor, Tensor]:
    """h' = h + dropout(y + bias), and norm(h'); (T, d) each."""
    if is_layer_norm(norm) and norm.elementwise_affine and norm.bias is not None:
        return ops.add_norm(h, y, bias, norm.weight, norm.bias, dropout, norm.eps)
    h = add(ops, h, y, bias, dropout)
    return h, norm(h)


def drop(ops: Operations, x: Tensor, dropout: Dropout) -> Tensor:
    """dropout(x)."""
    if not dropout.threshold:
        return x
    return add(ops, torch.zeros_like(x), x, x.new_zeros(x.shape[-1]), dropout)


def add(ops: Operations, h: Tensor, y: Tensor, bias: Tensor, dropout: Dropout) -> Tensor:
    """h + dropout(y + bias)."""
    ones, zeros = h.new_ones(h.shape[-1]), h.new_zeros(h.shape[-1])
    return ops.add_norm(h, y, bias, ones, zeros, dropout)[0]
