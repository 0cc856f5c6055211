"""What is timed: a contest is one question, its inputs, and the contestants that may answer it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fasttx.ops.registry import BACKENDS, Backend
from fasttx.testing import Case, Measure, length

if TYPE_CHECKING:
    from limit import Limit

VERIFIED_TOKENS = 1024  # of an input: float64 takes a second or two for them on a CPU


def backends() -> dict[str, Backend]:
    """The registry's backends, under the names that they have as contestants."""
    return {f"fasttx-{name}": backend for name, backend in BACKENDS.items()}


class Unavailable(Exception):
    """A contestant cannot take part here; the message gives its reasons."""


def require(reasons: Sequence[str]) -> None:
    """Raises Unavailable if there is a reason."""
    if reasons:
        raise Unavailable("; ".join(reasons))


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
    """One question. A step does `samples` texts; inputs 0 ... `inputs` - 1 take turns.

    facts: what the question is, for readers of saved figures.
    """

    title: str
    device: torch.device
    inputs: int
    samples: int
    entrants: dict[str, Contestant]
    limit: Limit | None = None
    warmup: int = 2  # untimed steps before the first timed one
    facts: dict[str, Any] = field(default_factory=dict)
    infos: dict[str, dict[str, Any]] = field(default_factory=dict)  # by the contestant's name
    entered: dict[str, Contestant] = field(default_factory=dict)

    def enter(self, name: str) -> Contestant:
        """The contestant, built and verified, once. Raises Unavailable, AssertionError."""
        if name not in self.entered:
            contestant = self.entrants[name]
            contestant.prepare()
            contestant.verify()
            self.entered[name] = contestant
        return self.entered[name]


class Expected:
    """Exact values by name, and how far off a contestant's may be: the rule of `fasttx.testing`.

    Each value is measured by its own length: gradients can be much smaller than outputs.
    """

    def __init__(
        self, exact: dict[str, Tensor], plain: dict[str, Tensor], dtype: torch.dtype
    ) -> None:
        self.measures = {
            name: Measure.of({name: x}, {name: plain[name]}, dtype, norm=length)
            for name, x in exact.items()
        }

    @classmethod
    def within(cls, exact: dict[str, Tensor], tolerance: float) -> Expected:
        """Each value as far off as this part of its length."""
        expected = cls.__new__(cls)
        expected.measures = {
            name: Measure({name: x}, {}, {name: tolerance * length(x)}, length)
            for name, x in exact.items()
        }
        return expected

    @classmethod
    def of(cls, case: Case, dtype: torch.dtype, p: float) -> Expected:
        """What a case comes to, with the masks of seed 1 that backends share."""
        exact, plain = (case.define(dtype, wide, p, seed=1) for wide in (torch.float64, dtype))
        return cls(exact, plain, dtype)

    def check(self, who: str, actual: dict[str, Tensor]) -> None:
        """Raises AssertionError where one of these values is too far off."""
        found = [self.measures[name].compare(f"{who}:", {name: x}) for name, x in actual.items()]
        failures = [line for outcome in found for line in outcome.failures]
        assert not failures, "; ".join(failures)


def verified_texts(lengths: Sequence[int]) -> int:
    """How many texts of an input, from its first one on, are held to float64."""
    return max(1, int((np.cumsum(lengths) <= VERIFIED_TOKENS).sum()))


class OneOperation:
    """A contestant of one operation; `backend` None: a peer. Subclasses compute outcomes.

    work: has p and, with the masks that backends share (seed 1), `expected(p)`.
    """

    def __init__(self, name: str, work: Any, backend: Backend | None, note: str = "") -> None:
        self.name, self.work, self.note = name, work, note or mask_note(backend, work.p)
        self.shares_masks = backend is not None and backend.dropout == "shared"

    def outcome(self, p: float, seed: int) -> dict[str, Tensor]:
        """The values of input 0 by name, "out" and gradients."""
        raise NotImplementedError

    def verify(self) -> None:
        work, without = self.work, self.outcome(0.0, 1)
        work.expected(0.0).check(self.name, without)
        if work.p and "no dropout" not in self.note:
            once, again = self.outcome(work.p, 1), self.outcome(work.p, 2)
            check_dropout(self.name, without["out"], once["out"], again["out"])
            if self.shares_masks:
                work.expected(work.p).check(f"{self.name}, with dropout", once)


def mask_note(backend: Backend | None, p: float) -> str:
    own = backend is not None and backend.dropout == "torch" and p
    return "torch's own dropout masks" if own else ""


def check_dropout(who: str, without: Tensor, once: Tensor, again: Tensor) -> None:
    """Raises AssertionError where dropout is asked for and nothing is dropped at random."""
    assert once.isfinite().all(), f"{who}: with dropout the outcome is not finite"
    assert not torch.equal(once, without), f"{who}: dropout is asked for and changes nothing"
    assert not torch.equal(once, again), f"{who}: two steps drop the same"
