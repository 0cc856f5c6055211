"""What shows that an attention backend computes what it should, and how long it takes: cases with
gradients to compare with another backend, and steps to time. For self-checks in the field; the
tests have cases and tolerances of their own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fasttx.ops.rows import RowOps

# How far apart two backends may be, of the largest value; roundings alone stay well below.
TOLERANCES = {
    torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2,
}  # fmt: skip
SEED = 0x1234567_89ABCDEF


@dataclass(frozen=True)
class Shape:
    """What is timed: texts of these lengths, heads; d_model is heads * head_dim."""

    # 32 texts of 181 tokens on average: as IMDB cut at 256, where a padded batch is 30 % padding
    lens: tuple[int, ...] = tuple(range(64, 256, 8)) + (256,) * 8
    heads: int = 8


@dataclass
class Outcome:
    """What a comparison found: reasons against one side, and the largest error of each quantity."""

    failures: list[str] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)

    def compare(
        self, what: str, got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float
    ) -> None:
        """Values by name, of any device, against values of the CPU."""
        for name, x in wanted.items():
            key, y = f"{what} {name}", got[name].cpu()
            size = max(1e-6, float(x.float().abs().max()))
            error = float((y.float() - x.float()).abs().max()) / size
            self.errors[key] = error
            if not error <= tolerance:  # NaN too
                self.failures.append(f"{key} is {error:.2g} off, {tolerance:g} allowed")


def random(*shape: int, seed: int, device: str, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def gradients(outs: tuple[Tensor, ...], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    grads = [
        random(*x.shape, seed=9 + i, device=str(x.device), dtype=x.dtype)
        for i, x in enumerate(outs)
    ]
    found = torch.autograd.grad(outs, tuple(leaves.values()), grads)
    return {f"d{name}": x for name, x in zip(leaves, found, strict=True)}


# What it is, and a function that runs it on an adapter (or RowOps) and gives values by name.
Case = tuple[str, Callable[[Any], dict[str, Tensor]]]


def attention_cases(
    device: str, dtype: torch.dtype, head_dim: int, p: float = 0.1
) -> Iterator[Case]:
    """Sequences out of order, of lengths 0 and 1 too, between rows of NaN. p 0: no dropout."""
    spans = torch.tensor([(75, 33), (2, 1), (3, 0), (4, 70), (110, 8)], dtype=torch.int32)
    starts, lens = spans.to(device).unbind(1)
    qkv = random(120, 3, 2, head_dim, seed=1, device=device, dtype=dtype)
    live = torch.zeros(120, dtype=torch.bool)
    for start, length in spans.tolist():
        live[start : start + length] = True
    qkv[(~live).to(device)] = float("nan")
    seed = torch.tensor(SEED, device=device)

    for rate, causal in dict.fromkeys(((0.0, False), (p, False), (p, True))):

        def run(adapter: Any, p: float = rate, causal: bool = causal) -> dict[str, Tensor]:
            leaf = qkv.clone().requires_grad_()
            out = adapter.attention(
                leaf, starts, lens, max_seqlen=70, dropout_p=p, seed=seed, causal=causal
            )
            return {"out": out.detach(), **gradients((out,), {"qkv": leaf})}

        yield f"dropout {rate:g}{', causal' if causal else ''}:", run


def off_the_kink(x: Tensor, shift: float) -> Tensor:
    """Multiples of 1/4, shifted: sums of two that no dtype rounds to 0, where ReLU has a kink."""
    return (x.detach() * 4).round().div(4).add(shift).requires_grad_()


def row_cases(device: str, dtype: torch.dtype, head_dim: int, p: float = 0.1) -> Iterator[Case]:
    """All three operations, with columns that are multiples of 8 and not, and mixed dtypes."""
    seed = torch.tensor(SEED, device=device)
    for columns, branch in ((256, dtype), (20, torch.float32), (256, torch.float32)):
        stream = dtype if branch == dtype else torch.float32

        def leaf(*shape: int, at: int, kind: torch.dtype) -> Tensor:
            return random(*shape, seed=at, device=device, dtype=kind).requires_grad_()

        def run(
            ops: RowOps, d: int = columns, stream: torch.dtype = stream, leaf: Any = leaf
        ) -> dict[str, Tensor]:
            ids = torch.arange(50, device=device) * 7 % 11
            x = {"table": leaf(11, d, at=1, kind=stream)}
            pe = random(50, d, seed=2, device=device, dtype=stream)
            h = ops.embed(ids, ids.int(), *x.values(), pe, p, seed)
            values = {"embed": h.detach(), **gradients((h,), x)}
            x = {
                "h": leaf(50, d, at=3, kind=stream), "y": leaf(50, d, at=4, kind=dtype),
                "bias": leaf(d, at=5, kind=stream), "gamma": leaf(d, at=6, kind=stream),
                "beta": leaf(d, at=7, kind=stream),
            }  # fmt: skip
            outs = ops.add_norm(*x.values(), p, seed)
            values |= {"add_norm": outs[1].detach(), **gradients(outs, x)}
            for act in ("relu", "gelu"):
                u = {
                    f"u of {act}": off_the_kink(leaf(50, d, at=8, kind=dtype), 0.0),
                    f"bias of {act}": off_the_kink(leaf(d, at=5, kind=stream), 0.125),
                }
                out = ops.bias_act(*u.values(), p, seed, act)
                values |= {act: out.detach(), **gradients((out,), u)}
            return values

        yield f"{columns} columns in {str(stream).removeprefix('torch.')}:", run


# ---------------------------------------------------------------------------------------- timing


def milliseconds(step: Callable[[], Any], device: str, warm_up: int = 3, runs: int = 7) -> float:
    """The median time of a call, the device waited for inside it."""
    times = []
    for i in range(warm_up + runs):
        start = time.perf_counter()
        step()
        if device == "mps":
            torch.mps.synchronize()
        elif device == "cuda":
            torch.cuda.synchronize()
        if i >= warm_up:
            times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def attention_step(
    attention: Callable[..., Tensor], device: str, dtype: torch.dtype, head_dim: int, shape: Shape
) -> Callable[[], Any]:
    """Forward and backward of one layer's attention, dropout 0.1, at a shape."""
    lens = torch.tensor(shape.lens, dtype=torch.int32, device=device)
    starts = (lens.cumsum(0) - lens).int()
    rows, longest = sum(shape.lens), max(shape.lens)
    qkv = random(rows, 3, shape.heads, head_dim, seed=1, device=device, dtype=dtype)
    qkv.requires_grad_()
    seed = torch.tensor(SEED, device=device)
    grad = torch.ones(rows, shape.heads, head_dim, device=device, dtype=dtype)

    def step() -> Any:
        out = attention(qkv, starts, lens, max_seqlen=longest, dropout_p=0.1, seed=seed)
        return torch.autograd.grad(out, qkv, grad)

    return step


def rowops_step(
    ops: RowOps, device: str, dtype: torch.dtype, head_dim: int, shape: Shape
) -> Callable[[], Any]:
    """Forward and backward of the row operations of one block, dropout 0.1, at a shape."""
    rows, d = sum(shape.lens), shape.heads * head_dim
    h, y = (random(rows, d, seed=i, device=device, dtype=dtype) for i in (1, 2))
    u = random(rows, 4 * d, seed=3, device=device, dtype=dtype)
    bias, gamma, beta = (random(d, seed=i, device=device, dtype=dtype) for i in (4, 5, 6))
    wide = random(4 * d, seed=7, device=device, dtype=dtype)
    leaves = [x.requires_grad_() for x in (h, y, u, bias, gamma, beta, wide)]
    seed = torch.tensor(SEED, device=device)
    grads = [torch.ones_like(x) for x in (h, h, u)]

    def step() -> Any:
        outs = (*ops.add_norm(h, y, bias, gamma, beta, 0.1, seed),
                ops.bias_act(u, wide, 0.1, seed, "relu"))  # fmt: skip
        return torch.autograd.grad(outs, leaves, grads)

    return step
