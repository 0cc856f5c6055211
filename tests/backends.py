"""The backends that tests run over: those of the registry and two beside it, where they run here.

To be listed in the registry is to be tested: `over_backends` parametrises by `target`.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fasttx import testing
from fasttx.ops.contract import Operations
from fasttx.ops.registry import BACKENDS, Backend
from fasttx.testing import Case, RowCase

# Under Triton's interpreter its kernels take tensors of the CPU, and there the tests find them.
# It computes products of bfloat16 wrongly (triton-lang/triton#11584), so these are left out.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    BACKENDS["triton"] = dataclasses.replace(
        BACKENDS["triton"], devices=("cpu",), dtypes=(torch.float32, torch.float16)
    )
# What `mps` chooses between, the Metal kernels by emulation. They are in no table; the fixture
# unlisted_backends lets tests ask for them by name.
_FLOATS = BACKENDS["reference"].dtypes
UNLISTED = (
    Backend(
        "metal",
        "tests.metal.adapter",
        "the Metal kernels, emulated",
        ("cpu",),
        BACKENDS["mps"].dtypes,
        "shared",
    ),
    Backend("lean", "fasttx.ops.mps.lean", "what mps falls back to", (), _FLOATS, "shared"),
    *(
        Backend(
            f"sm_{capability}",
            f"tests.ptx.sm_{capability}",
            "the Triton kernels, compiled for that GPU and executed by the PTX machine",
            ("cpu",),
            BACKENDS["mps"].dtypes,
            "shared",
        )
        for capability in (80, 90)
        if not INTERPRETED
    ),
)
EVERY = {backend.name: backend for backend in (*BACKENDS.values(), *UNLISTED)}

HALVES = (torch.bfloat16, torch.float16)
POISONED = [
    pytest.mark.usefixtures("poisoned_memory", "unlisted_backends"),
    pytest.mark.filterwarnings("ignore:.*deterministic"),  # the fixture's mode, on CUDA
]


def _devices() -> list[str]:
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return ["cpu", *(device for device, is_there in there.items() if is_there)]


DEVICES = _devices()


@dataclass(frozen=True)
class Target:
    """A backend on one of its devices."""

    backend: Backend
    device: str

    @property
    def name(self) -> str:
        return self.backend.name

    @property
    def operations(self) -> Operations:
        return self.backend.operations

    def takes(self, dtype: torch.dtype, head_dim: int = 16) -> bool:
        if self.device == "mps" and dtype == torch.float64:
            return False  # torch has none there
        return not self.backend.unavailable_reasons(self.device, dtype, head_dim)

    def __str__(self) -> str:
        return f"{self.name}-{self.device}"


def _targets() -> tuple[list[Target], dict[str, str]]:
    """Those that run here, and for each backend that runs nowhere here the reasons."""
    targets, missing = [], {}
    for backend in EVERY.values():
        here = [Target(backend, d) for d in DEVICES if d in (backend.devices or DEVICES)]
        runs = [target for target in here if target.takes(torch.float32)]
        targets += runs
        if not runs:
            device = here[0].device if here else DEVICES[0]
            reasons = backend.unavailable_reasons(device, torch.float32, 16)
            missing[backend.name] = "; ".join(reasons)
    return targets, missing


TARGETS, MISSING = _targets()
# Those of the CPU that run Triton's kernels: its interpreter, or the PTX machine for two GPUs.
TRITON = [t for t in TARGETS if t.name in ("triton", "sm_80", "sm_90") and t.device == "cpu"]
CPU_TARGET = Target(BACKENDS["cpu"], "cpu")


def over_backends(
    *dtypes: torch.dtype, p: Sequence[float] = (), dropout: str | None = None
) -> pytest.MarkDecorator:
    """Parametrise by `target`, and by `dtype` and `p` where there are any.

    Only targets that take the dtype; dropout ("shared", "torch"): only such masks. A `p` other than
    0 is for those whose masks are shared.
    """
    names = ["target", *(["dtype"] if dtypes else []), *(["p"] if p else [])]
    cases = []
    for target, *rest in itertools.product(TARGETS, dtypes or (torch.float32,), p or (0.0,)):
        shared = target.backend.dropout == "shared"
        if not target.takes(rest[0]) or dropout not in (None, target.backend.dropout):
            continue
        if rest[1] == 0 or shared:
            values = [target, *rest[: 1 if dtypes else 0], *rest[1 : 2 if p else 1]]
            identity = "-".join(str(x).removeprefix("torch.") for x in values)
            cases.append(pytest.param(*values, id=identity))
    return pytest.mark.parametrize(names, cases)


def check(target: Target, case: Case, dtype: torch.dtype, *p: float) -> None:
    """A case on a backend, by every entry, against float64: at each p that its masks are known."""
    for probability in p or (0.0,):
        if probability in (0, 1) or target.backend.dropout == "shared":
            found = testing.compare(target.operations, case, target.device, dtype, probability)
            assert not found.failures, f"{target}: " + "\n".join(found.failures)


def of_33_rows(cases: Sequence[RowCase]) -> list[RowCase]:
    return [case for case in cases if case.rows == 33]


def run(function: Any, grad: torch.Tensor, *leaves: torch.Tensor) -> list[torch.Tensor]:
    """The output of function(*leaves) and the gradient of each leaf, on the CPU."""
    leaves = tuple(x.detach().requires_grad_() for x in leaves)
    out = function(*leaves)
    return [x.detach().cpu() for x in (out, *torch.autograd.grad(out, leaves, grad))]


def gradcheck(case: RowCase, p: float) -> bool:
    """Are the gradients of the specification its differences?"""
    operations, dropout = BACKENDS["reference"].operations, testing.dropout_of(p, "cpu")
    names, leaves = zip(*case.leaves().items(), strict=True)

    def function(*leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inputs = dict(zip(names, leaves, strict=True)) | case.fixed()
        return case.call(operations, inputs, dropout)

    return torch.autograd.gradcheck(function, tuple(x.requires_grad_() for x in leaves))
