"""Who multiplies matrices here, and how fast: python benchmarks/products.py [--precision bf16]

The three products of a linear layer, y = x w^T and the gradients dx = dy w and dw = dy^T x, by each
library and kernel at hand. A result is compared with float64 before it is timed; then all take
turns, each after a pause, since the threads of some spin on for a while.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

from fasttx import device as devices
from fasttx.config import ModelConfig
from fasttx.ops.registry import BACKENDS
from fasttx.testing import Measure, length

PAUSE = 0.01  # seconds
TURNS = 3
OPENBLAS_VARIABLES = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")  # one of them set, and it is slower


class Product(NamedTuple):
    """(m, k) @ (k, n); layout says which operand is read transposed, as BLAS does: n or t each."""

    m: int
    k: int
    n: int
    layout: str = "nt"  # y = x w^T; "nn" is dx = dy w, "tn" dw = dy^T x

    @property
    def flops(self) -> int:
        return 2 * self.m * self.k * self.n


def linear_products(rows: int, inputs: int, outputs: int, backward: bool) -> list[Product]:
    """A linear layer's x w^T; with `backward` also the gradients of x, dy w, and of w, dy^T x."""
    forward = [Product(rows, inputs, outputs, "nt")]
    gradients = [Product(rows, outputs, inputs, "nn"), Product(outputs, rows, inputs, "tn")]
    return forward + gradients if backward else forward


# --------------------------------------------------------------------------------------- libraries
# A library is a function of (product, left, right, out) to a call that multiplies; it may write to
# `out`, and returns the result.

Multiply = Callable[[], Tensor]
Library = Callable[[Product, Tensor, Tensor, Tensor], Multiply]


def _torch(product: Product, left: Tensor, right: Tensor, out: Tensor) -> Multiply:
    return lambda: torch.mm(left, right, out=out)


def _onednn(product: Product, left: Tensor, right: Tensor, out: Tensor) -> Multiply:
    weight = right.t()
    return lambda: torch.ops.mkldnn._linear_pointwise(left, weight, None, "none", [], "")


def _openblas(product: Product, left: Tensor, right: Tensor, out: Tensor) -> Multiply:
    a, b, filled = left.numpy(), right.numpy(), out.numpy()

    def multiply() -> Tensor:
        np.matmul(a, b, out=filled)
        return out

    return multiply


def _backend(linear: Callable[..., Tensor]) -> Library:
    """A backend's operator `linear`: forward, or the one gradient that is asked for.

    Its weights are float32, as in training.
    """

    def multiplier(product: Product, left: Tensor, right: Tensor, out: Tensor) -> Multiply:
        if product.layout == "nt":
            weight = right.t().float()
            return lambda: linear(left, weight, None)
        if product.layout == "nn":  # of x
            leaf = left.new_zeros(product.m, product.n, requires_grad=True)
            y, dy = linear(leaf, right.float(), None), left
        else:  # of w
            leaf = left.new_zeros(product.m, product.n, dtype=torch.float32, requires_grad=True)
            y, dy = linear(right, leaf, None), left.t()
        return lambda: torch.autograd.grad(y, leaf, dy, retain_graph=True)[0]

    return multiplier


def _openblas_reasons(threads: int) -> list[str]:
    """Why numpy's OpenBLAS is not measured; else it is told to take this many threads."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"]
    if "openblas" not in blas:
        return [f"numpy multiplies with {blas}"]
    if fixed := [name for name in OPENBLAS_VARIABLES if name in os.environ]:
        return [f"{name} is set, which slows it down: unset it" for name in fixed]
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        return [
            "threadpoolctl, which sets its threads, is not installed: pip install threadpoolctl"
        ]
    threadpool_limits(threads, user_api="blas")
    return []


def libraries(device: torch.device, dtype: torch.dtype) -> dict[str, Library]:
    """Those that multiply in this dtype, by name; says on standard error what is left out."""
    if device.type != "cpu":
        return {"torch": _torch}
    mkl = dtype == torch.float32 and torch.backends.mkl.is_available()
    found: dict[str, Library] = {"MKL" if mkl else "torch": _torch}
    if dtype == torch.float32:  # in others torch multiplies by oneDNN itself
        if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
            found["oneDNN"] = _onednn
        if reasons := _openblas_reasons(torch.get_num_threads()):
            print(f"OpenBLAS is no part of the limit: {'; '.join(reasons)}", file=sys.stderr)
        else:
            found["OpenBLAS"] = _openblas
    for name, backend in BACKENDS.items():
        if not backend.unavailable_reasons(device, dtype, 32):
            backend.operations  # noqa: B018  (which defines its operators)
            # Its own kernels, whoever multiplies for its models on this machine.
            operator = getattr(getattr(torch.ops, f"fasttx_{name}"), "linear", None)
            if operator is not None:
                found[f"fasttx-{name}"] = _backend(operator)
    return found


# ------------------------------------------------------------------------------------------- rates


class Operands:
    """Random factors and room for the result, as large as the largest of these products needs."""

    def __init__(
        self, products: Sequence[Product], device: torch.device, dtype: torch.dtype
    ) -> None:
        sizes = ((p.m * p.k, p.k * p.n, p.m * p.n) for p in products)
        self.flat = [
            torch.randn(max(size), device=device, dtype=dtype) for size in zip(*sizes, strict=True)
        ]

    def of(self, p: Product) -> tuple[Tensor, Tensor, Tensor]:
        """Left (m, k) and right (k, n), stored as the layout says, and the result's (m, n)."""
        sizes = (p.m * p.k, p.k * p.n, p.m * p.n)
        a, b, out = (x[:size] for x, size in zip(self.flat, sizes, strict=True))
        left = a.view(p.k, p.m).t() if p.layout[0] == "t" else a.view(p.m, p.k)
        right = b.view(p.n, p.k).t() if p.layout[1] == "t" else b.view(p.k, p.n)
        return left, right, out.view(p.m, p.n)


def verify(product: Product, operands: Operands, known: dict[str, Library]) -> None:
    """Raises AssertionError where a library's result is too far off."""
    left, right, out = operands.of(product)
    exact = left.cpu().double() @ right.cpu().double()
    plain = (left @ right).cpu()
    measure = Measure.of({"product": exact}, {"product": plain}, left.dtype, norm=length)
    for name, library in known.items():
        out.fill_(torch.nan)
        result = library(product, left, right, out)()
        outcome = measure.compare(f"{name}, {tuple(product)}:", {"product": result})
        assert not outcome.failures, "; ".join(outcome.failures)


def seconds(
    product: Product, operands: Operands, known: dict[str, Library], turns: int
) -> dict[str, float]:
    """Median seconds of each library, in turn; each comes after a pause and an untimed call."""
    calls = {name: library(product, *operands.of(product)) for name, library in known.items()}
    device = operands.flat[0].device
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _, (name, call) in itertools.product(range(turns), calls.items()):
        time.sleep(PAUSE)
        call()
        devices.synchronize(device)
        start = time.perf_counter()
        call()
        devices.synchronize(device)
        times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in times.items()}


def main() -> None:
    import figures  # which imports this

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=6100, help="of a batch (default: %(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    figures.add_allocator(parser)
    arguments = parser.parse_args()
    figures.take_allocator(arguments.allocator)
    torch.set_num_threads(arguments.threads)
    config = ModelConfig()
    d, f = config.d_model, config.d_ff
    layers = {"qkv": (d, 3 * d), "out": (d, d), "up": (d, f), "down": (f, d)}
    dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
    print(f"GFLOP/s of products of {arguments.rows:,} rows, {arguments.precision}, one at a time")
    print(f"{figures.caption(figures.environment(torch.device('cpu')))}, n = {arguments.turns}\n")
    sizes = [f"{o}x{i}" for i, o in layers.values()]
    names = ("y", "dx", "dw")
    by_layer = [linear_products(arguments.rows, i, o, True) for i, o in layers.values()]
    print(f"| | {' | '.join(sizes)} |\n|{' --- |' * (1 + len(sizes))}")
    known = libraries(torch.device("cpu"), dtype)
    for name, products in zip(names, zip(*by_layer, strict=True), strict=True):
        rates: dict[str, list[str]] = {library: [] for library in known}
        for product in products:
            operands = Operands([product], torch.device("cpu"), dtype)
            verify(product, operands, known)
            for library, s in seconds(product, operands, known, arguments.turns).items():
                rates[library].append(f"{product.flops / s / 1e9:,.0f}")
        for library, cells in rates.items():
            print(f"| {name}, {library} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
