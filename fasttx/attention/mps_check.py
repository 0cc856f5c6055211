"""Is the machine what the Metal kernels take it for, are they right on it, and are they faster?

The kernels were written without a Mac. So the first use on one compares them with plain tensor
algebra (`lean`, and the specification of the row operations), forward and backward.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fasttx.attention import lean
from fasttx.rowops import RowOps, specification

# How far apart the two may be, of the largest value; roundings alone stay 10 times below.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
PARTS = ("attention", "rowops")
SEED = 0x1234567_89ABCDEF


@dataclass(frozen=True)
class Shape:
    """What is timed: texts of these lengths, heads; d_model is heads * head_dim."""

    lens: tuple[int, ...] = tuple(range(104, 257, 8)) + (256,) * 12  # 32 texts, 212 on average
    heads: int = 8


@dataclass
class Outcome:
    """What a check found: reasons against the kernels, and the largest error of each quantity."""

    failures: list[str] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)

    def compare(
        self, what: str, got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float
    ) -> None:
        for name, x in wanted.items():
            key, y = f"{what} {name}", got[name]
            size = max(1e-6, float(x.float().abs().max()))
            error = float((y.float() - x.float()).abs().max()) / size
            self.errors[key] = error
            if not error <= tolerance:  # NaN too
                self.failures.append(f"{key} is {error:.2g} off, {tolerance:g} allowed")


def check(part: str, device: str, dtype: torch.dtype, head_dim: int) -> Outcome:
    """Compiles and runs a part ("attention", "rowops") on a device; never raises."""
    outcome = Outcome()
    try:
        from fasttx.attention import metal
    except Exception as error:
        outcome.failures.append(f"the kernels cannot be loaded: {_line(error)}")
        return outcome
    try:
        _probe(outcome, device)
        if not outcome.failures:
            cases = _attention_cases if part == "attention" else _row_cases
            for what, run in cases(device, dtype, head_dim):
                plain = lean if part == "attention" else specification
                kernels = metal if part == "attention" else metal.rowops
                outcome.compare(what, run(kernels), run(plain), TOLERANCES[dtype])
    except Exception as error:  # of the compiler, the driver, or a launch
        outcome.failures.append(_line(error))
    return outcome


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def _probe(outcome: Outcome, device: str) -> None:
    from fasttx.kernels.metal import shaders

    found = torch.full((32, 2), -1.0, device=device)
    width = torch.zeros(1, dtype=torch.int32, device=device)
    numbers = torch.arange(64, dtype=torch.float32, device=device)
    probe = shaders.kernel(device, "probe", "probe")
    probe(numbers, found, width, threads=(32,), group_size=(32,))
    if (lanes := int(width)) != 32:
        outcome.failures.append(f"a simdgroup has {lanes} lanes; the kernels need 32")
    lane = torch.arange(32)
    row, column = (lane >> 2 & 4) + (lane >> 1 & 3), (lane >> 1 & 4) + (lane << 1 & 2)
    expected = torch.stack([row * 8 + column, row * 8 + column + 1], 1).float()
    if not torch.equal(found.cpu(), expected):
        outcome.failures.append("lanes hold other elements of an 8 x 8 matrix than they should")


def _random(*shape: int, seed: int, device: str, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def _gradients(outs: tuple[Tensor, ...], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    grads = [
        _random(*x.shape, seed=9 + i, device=str(x.device), dtype=x.dtype)
        for i, x in enumerate(outs)
    ]
    found = torch.autograd.grad(outs, tuple(leaves.values()), grads)
    return {f"d{name}": x for name, x in zip(leaves, found, strict=True)}


Case = tuple[str, Callable[[Any], dict[str, Tensor]]]


def _attention_cases(device: str, dtype: torch.dtype, head_dim: int) -> Iterator[Case]:
    """Sequences out of order, of lengths 0 and 1 too, between rows of NaN."""
    spans = torch.tensor([(75, 33), (2, 1), (3, 0), (4, 70), (110, 8)], dtype=torch.int32)
    starts, lens = spans.to(device).unbind(1)
    qkv = _random(120, 3, 2, head_dim, seed=1, device=device, dtype=dtype)
    live = torch.zeros(120, dtype=torch.bool)
    for start, length in spans.tolist():
        live[start : start + length] = True
    qkv[(~live).to(device)] = float("nan")
    seed = torch.tensor(SEED, device=device)

    for p, causal in ((0.0, False), (0.1, False), (0.1, True)):

        def run(adapter: Any, p: float = p, causal: bool = causal) -> dict[str, Tensor]:
            leaf = qkv.clone().requires_grad_()
            out = adapter.attention(
                leaf, starts, lens, max_seqlen=70, dropout_p=p, seed=seed, causal=causal
            )
            return {"out": out.detach(), **_gradients((out,), {"qkv": leaf})}

        yield f"dropout {p:g}{', causal' if causal else ''}:", run


def off_the_kink(x: Tensor, shift: float) -> Tensor:
    """Multiples of 1/4, shifted: sums of two that no dtype rounds to 0, where ReLU has a kink."""
    return (x.detach() * 4).round().div(4).add(shift).requires_grad_()


def _row_cases(device: str, dtype: torch.dtype, head_dim: int) -> Iterator[Case]:
    seed = torch.tensor(SEED, device=device)
    for columns, branch in ((256, dtype), (20, torch.float32), (256, torch.float32)):
        stream = dtype if branch == dtype else torch.float32

        def leaf(*shape: int, at: int, kind: torch.dtype) -> Tensor:
            return _random(*shape, seed=at, device=device, dtype=kind).requires_grad_()

        def run(
            ops: RowOps, d: int = columns, stream: torch.dtype = stream, leaf: Any = leaf
        ) -> dict[str, Tensor]:
            ids = torch.arange(50, device=device) * 7 % 11
            x = {"table": leaf(11, d, at=1, kind=stream)}
            pe = _random(50, d, seed=2, device=device, dtype=stream)
            h = ops.embed(ids, ids.int(), *x.values(), pe, 0.1, seed)
            values = {"embed": h.detach(), **_gradients((h,), x)}
            x = {
                "h": leaf(50, d, at=3, kind=stream), "y": leaf(50, d, at=4, kind=dtype),
                "bias": leaf(d, at=5, kind=stream), "gamma": leaf(d, at=6, kind=stream),
                "beta": leaf(d, at=7, kind=stream),
            }  # fmt: skip
            outs = ops.add_norm(*x.values(), 0.1, seed)
            values |= {"add_norm": outs[1].detach(), **_gradients(outs, x)}
            for act in ("relu", "gelu"):
                u = {
                    f"u of {act}": off_the_kink(leaf(50, d, at=8, kind=dtype), 0.0),
                    f"bias of {act}": off_the_kink(leaf(d, at=5, kind=stream), 0.125),
                }
                out = ops.bias_act(*u.values(), 0.1, seed, act)
                values |= {act: out.detach(), **_gradients((out,), u)}
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
    qkv = _random(rows, 3, shape.heads, head_dim, seed=1, device=device, dtype=dtype)
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
    h, y = (_random(rows, d, seed=i, device=device, dtype=dtype) for i in (1, 2))
    u = _random(rows, 4 * d, seed=3, device=device, dtype=dtype)
    bias, gamma, beta = (_random(d, seed=i, device=device, dtype=dtype) for i in (4, 5, 6))
    wide = _random(4 * d, seed=7, device=device, dtype=dtype)
    leaves = [x.requires_grad_() for x in (h, y, u, bias, gamma, beta, wide)]
    seed = torch.tensor(SEED, device=device)
    grads = [torch.ones_like(x) for x in (h, h, u)]

    def step() -> Any:
        outs = (*ops.add_norm(h, y, bias, gamma, beta, 0.1, seed),
                ops.bias_act(u, wide, 0.1, seed, "relu"))  # fmt: skip
        return torch.autograd.grad(outs, leaves, grads)

    return step


def timings(
    part: str, device: str, dtype: torch.dtype, head_dim: int, shape: Shape
) -> dict[str, float]:
    """Milliseconds of `metal` and `lean`."""
    from fasttx.attention import metal

    if part == "attention":
        steps = {
            name: attention_step(adapter.attention, device, dtype, head_dim, shape)
            for name, adapter in (("metal", metal), ("lean", lean))
        }
    else:
        steps = {
            name: rowops_step(ops, device, dtype, head_dim, shape)
            for name, ops in (("metal", metal.rowops), ("lean", specification))
        }
    return {name: milliseconds(step, device) for name, step in steps.items()}
