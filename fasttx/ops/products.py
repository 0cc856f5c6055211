"""Who multiplies the matrices of linear layers on the `cpu` backend: its own kernels, or torch.

torch's library is the faster one on some processors, and less than half as fast on others. So both
are timed once a process. A run keeps what was chosen, and goes on with it.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fasttx.errors import ConfigError
from fasttx.kernels.cpu import library, linear

VARIABLE = "FASTTX_PRODUCTS"
OWN, TORCH = "own", "torch"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# torch has to be so many times as fast: only its own kernels keep a row's bits whatever the batch.
ADVANTAGE = 1.15
# Sets of processors that have no products of bfloat16; an arm64 processor may.
WITHOUT_BFLOAT16 = ("avx512", "avx2", "baseline")
ROWS, INPUTS, OUTPUTS, ROUNDS = 512, 256, 768, 5

log = logging.getLogger("fasttx")


def choices() -> dict[str, str]:
    """`OWN` or `TORCH` for each of `DTYPES`: by the environment variable, or as `measured`.

    Raises ConfigError for a variable with another value.
    """
    if given := _given():
        return dict.fromkeys(DTYPES, given)
    return {name: who for name, (who, _) in measured().items()}


def described(own: Collection[torch.dtype]) -> dict[str, dict[str, str]]:
    """Who multiplies, where those of `own` are ours, and why: for reports."""
    found = {}
    for name, dtype in DTYPES.items():
        who = OWN if dtype in own else TORCH
        if who != choices()[name]:
            why = "as the run began"
        else:
            why = f"{VARIABLE} says so" if _given() else measured()[name][1]
        found[f"products {name}"] = {"path": who, "reason": why}
    return found


def _given() -> str:
    """The environment variable, or ""."""
    given = os.environ.get(VARIABLE, "")
    if given and given not in (OWN, TORCH):
        raise ConfigError(
            f"the environment variable {VARIABLE} is {given!r}; expected {OWN}, {TORCH}, or none: "
            "then the faster one is chosen"
        )
    return given


@functools.cache  # once: the measurement and its log line
def measured() -> dict[str, tuple[str, str]]:
    """Who is faster on this machine, with the number of threads that torch has now, and why."""
    found = {}
    for name, dtype in DTYPES.items():
        if dtype == torch.bfloat16 and library.instruction_set() in WITHOUT_BFLOAT16:
            # Nothing to time: torch reaches a tenth of float32's rate there.
            found[name] = OWN, "the processor lacks the instruction that torch's need"
            continue
        own, others = rates(dtype)
        who = TORCH if others > ADVANTAGE * own else OWN
        found[name] = who, f"ours are {own / others:.2f} times as fast as torch's"
    said = "; ".join(f"{name}: {who} ({why})" for name, (who, why) in found.items())
    log.info("products of linear layers: %s", said)
    return found


def rates(dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of a product and a weight's gradient: ours, and torch's. In turn; the best of each."""
    generator = torch.Generator("cpu").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(dtype)

    # Also where somebody builds a model of tensors without values, or on another default device.
    with _disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        x, g, weight = draw(ROWS, INPUTS), draw(ROWS, OUTPUTS), draw(OUTPUTS, INPUTS)
        wide = weight.float()
        y, dweight = torch.empty_like(g), torch.empty_like(wide)

        def own() -> None:
            linear.forward(x, wide, None, y)
            linear.backward(g, x, dweight, None)

        def others() -> None:
            F.linear(x, weight)
            torch.mm(g.t(), x)

        best = {own: float("inf"), others: float("inf")}
        for _ in range(ROUNDS):
            for run in best:
                best[run] = min(best[run], _seconds(run))
    flop = 4 * ROWS * INPUTS * OUTPUTS
    return flop / best[own], flop / best[others]


def _seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
