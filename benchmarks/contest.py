"""What is timed: a contest is one question, its inputs, and who may answer it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fasttx.ops.registry import BACKENDS, Backend

if TYPE_CHECKING:
    from limit import Limit

# How far an outcome may be from the reference's, in the norm; beyond, it is another function's.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


# The dtype that each precision of a model multiplies in.
DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def backends() -> dict[str, Backend]:
    """The registry's backends, under the names that they have as contestants."""
    return {f"fasttx-{name}": backend for name, backend in BACKENDS.items()}


class Unavailable(Exception):
    """A contestant cannot take part here; the message gives its reasons."""


class Contestant(Protocol):
    """One way to do the work. Its constructor is cheap; `note` says how its function differs."""

    note: str

    def prepare(self) -> None:
        """Build what is timed, with its inputs. Raises Unavailable."""

    def verify(self) -> None:
        """Raises AssertionError unless it does the contest's work, on inputs that are timed."""

    def step(self, i: int) -> object:
        """The work on input i, as asynchronous as the device is."""


@dataclass
class Contest:
    """One question. `samples` are done a step; inputs 0 ... `inputs` - 1 take turns.

    facts: what the question is, for those who read saved figures.
    """

    title: str
    device: torch.device
    inputs: int
    samples: int
    entrants: dict[str, Contestant]
    limit: Limit | None = None
    warmup: int = 2  # untimed steps before the first timed one
    facts: dict[str, Any] = field(default_factory=dict)
    infos: dict[str, dict[str, Any]] = field(default_factory=dict)  # by who was timed
    entered: dict[str, Contestant] = field(default_factory=dict)

    def enter(self, name: str) -> Contestant:
        """The contestant, built and verified, once. Raises Unavailable, AssertionError."""
        if name not in self.entered:
            contestant = self.entrants[name]
            contestant.prepare()
            contestant.verify()
            self.entered[name] = contestant
        return self.entered[name]


def check_same(name: str, what: str, mine: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    """Raises AssertionError where `mine` is not the reference's outcome, up to rounding."""
    assert mine.shape == theirs.shape, (
        f"{name}: {what} has shape {tuple(mine.shape)}; the reference's is {tuple(theirs.shape)}"
    )
    mine, theirs = mine.detach().float(), theirs.detach().float()
    error = float((mine - theirs).norm() / theirs.norm().clamp(min=1e-30))
    assert error <= TOLERANCE[dtype], (
        f"{name}: {what} is {error:.2g} from the reference's (relative, in the norm); "
        f"{TOLERANCE[dtype]:g} is rounding. It computes something else, or rounds more (small "
        "models do, in half precision), so it is not timed"
    )


def check_dropout(name: str, without: Tensor, once: Tensor, again: Tensor) -> None:
    """Raises AssertionError where dropout is asked for and nothing is dropped at random."""
    assert once.isfinite().all(), f"{name}: with dropout the outcome is not finite"
    assert not torch.equal(once, without), f"{name}: dropout is asked for and changes nothing"
    assert not torch.equal(once, again), f"{name}: two steps drop the same"
