"""Compares a backend's operations with their definitions in float64, forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from fasttx.ops.contract import Operations
from fasttx.ops.dropout import NO_DROPOUT, Dropout
from fasttx.testing.attention import AttentionCase
from fasttx.testing.tolerances import Measure, Outcome

SEED = -987654321987654321  # both halves in use, the sign too


class Case(Protocol):
    """What both kinds of cases have: `AttentionCase` and `RowCase`."""

    @property
    def condition(self) -> float: ...

    def define(
        self, dtype: torch.dtype, wide: torch.dtype, p: float, seed: int
    ) -> dict[str, Tensor]: ...

    def run(
        self,
        operations: Operations,
        device: torch.device | str,
        dtype: torch.dtype,
        dropout: Dropout = NO_DROPOUT,
    ) -> dict[str, Tensor]: ...

    def __hash__(self) -> int: ...


def dropout_of(p: float, device: torch.device | str, seed: int = SEED) -> Dropout:
    return Dropout.of(p, torch.tensor(seed, dtype=torch.int64, device=device))


@functools.cache
def measure(case: Case, dtype: torch.dtype, p: float = 0.0, seed: int = SEED) -> Measure:
    """What a case comes to, and how far off it may be."""
    exact, plain = (case.define(dtype, wide, p, seed) for wide in (torch.float64, dtype))
    dead = ~case.live() if isinstance(case, AttentionCase) else None
    return Measure.of(exact, plain, dtype, condition=case.condition, dead=dead)


def compare(
    operations: Operations,
    case: Case,
    device: torch.device | str,
    dtype: torch.dtype,
    p: float = 0.0,
) -> Outcome:
    """One case, by every entry that it has. Raises what the backend raises."""
    dropout, judge = dropout_of(p, device), measure(case, dtype, p)
    what = f"{case}, dropout {p:g}:"
    outcome = judge.compare(what, case.run(operations, device, dtype, dropout))
    if isinstance(case, AttentionCase):
        apart = case.run(operations, device, dtype, dropout, packed=False)
        outcome.add(judge.compare(f"{case} of q, k, v apart, dropout {p:g}:", apart))
    return outcome


def check(
    operations: Operations,
    cases: Iterable[Case],
    device: torch.device | str,
    dtype: torch.dtype,
    p: float = 0.1,
) -> Outcome:
    """Every case without and with dropout. Never raises: an exception is the last failure.

    p: 0.1, or 0 where the masks are torch's own. The oracle runs on the CPU, so the device needs no
    float64.
    """
    outcome = Outcome()
    try:
        for case in cases:
            for rate in dict.fromkeys((0.0, p)):
                outcome.add(compare(operations, case, device, dtype, rate))
    except Exception as error:  # of a compiler, a driver, a launch
        outcome.failures.append(describe(error))
    return outcome


def describe(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
