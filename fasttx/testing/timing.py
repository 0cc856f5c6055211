"""What is timed of a backend, forward and backward: attention, and a block's operations on rows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fasttx.ops.contract import Operations, Spans
from fasttx.ops.dropout import Dropout

SEED = 0x1234567_89ABCDEF


@dataclass(frozen=True)
class Shape:
    """A batch of texts of these lengths, and heads; d_model is heads * head_dim.

    The default is IMDB cut at 256: 32 texts of 181 tokens on average, where a padded batch is 30 %
    padding.
    """

    lens: tuple[int, ...] = tuple(range(64, 256, 8)) + (256,) * 8
    heads: int = 8


def milliseconds(
    step: Callable[[], Any], device: torch.device | str, warm_up: int = 3, runs: int = 7
) -> float:
    """The median time of a call, the device waited for inside it."""
    kind, times = torch.device(device).type, []
    for i in range(warm_up + runs):
        start = time.perf_counter()
        step()
        if kind == "mps":
            torch.mps.synchronize()
        elif kind == "cuda":
            torch.cuda.synchronize()
        if i >= warm_up:
            times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def _random(*shape: int, at: int, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(at)
    return torch.randn(shape, generator=generator).to(device, dtype)


def attention_step(
    operations: Operations,
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    shape: Shape,
) -> Callable[[], Any]:
    """Forward and backward of one layer's attention, dropout 0.1, at a shape."""
    lens = torch.tensor(shape.lens, dtype=torch.int32, device=device)
    rows = sum(shape.lens)
    spans = Spans.of(lens.cumsum(0) - lens, lens, max(shape.lens), rows)
    qkv = _random(rows, 3, shape.heads, head_dim, at=1, device=device, dtype=dtype)
    qkv.requires_grad_()
    dropout = Dropout.of(0.1, torch.tensor(SEED, device=device))
    grad = torch.ones(rows, shape.heads, head_dim, device=device, dtype=dtype)

    def step() -> Any:
        out = operations.attention(qkv, spans, dropout)
        return torch.autograd.grad(out, qkv, grad)

    return step


def rows_step(
    operations: Operations,
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    shape: Shape,
) -> Callable[[], Any]:
    """Forward and backward of one block's add_norm and bias_act, dropout 0.1, at a shape."""
    rows, d = sum(shape.lens), shape.heads * head_dim

    def leaf(*size: int, at: int) -> Tensor:
        return _random(*size, at=at, device=device, dtype=dtype).requires_grad_()

    h, y, u, wide = (
        leaf(rows, d, at=1),
        leaf(rows, d, at=2),
        leaf(rows, 4 * d, at=3),
        leaf(4 * d, at=7),
    )
    bias, gamma, beta = (leaf(d, at=i) for i in (4, 5, 6))
    dropout = Dropout.of(0.1, torch.tensor(SEED, device=device))
    grads = [torch.ones_like(x) for x in (h, h, u)]

    def step() -> Any:
        total, normed = operations.add_norm(h, y, bias, gamma, beta, dropout)
        outs = (total, normed, operations.bias_act(u, wide, dropout, "relu"))
        return torch.autograd.grad(outs, (h, y, bias, gamma, beta, u, wide), grads)

    return step
