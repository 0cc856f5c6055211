"""How kernels run on the machine, of every launch from now on. Imports no Triton."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tests.ptx.machine import Counts


@dataclass(frozen=True)
class Ran:
    """One launch."""

    kernel: str
    grid: tuple[int, int, int]
    text: str
    counts: Counts


class Settings:
    seed = 0  # of the schedule and of what nobody wrote
    rewrite: Callable[[str, str], str] | None = None  # (kernel, PTX) -> PTX to run instead
    note: Callable[[Ran], None] | None = None  # is told of every launch


@contextmanager
def changed(**values: Any) -> Iterator[None]:
    """These settings, until the end of the block."""
    before = {name: getattr(Settings, name) for name in values}
    try:
        for name, value in values.items():
            setattr(Settings, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(Settings, name, value)
