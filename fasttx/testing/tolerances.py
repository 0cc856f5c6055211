"""How far from float64 a computation may be: a multiple of plain torch's own error, and roundings.

This is the only place where tolerances stand. Plain torch runs the definition twice, in float64
and in the dtypes under test; the difference says which error is to be expected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

# How many times plain torch's own error in a dtype the error of a result may be ...
OUT_FACTOR = {torch.float64: 1.0, torch.float32: 4.0, torch.bfloat16: 2.0, torch.float16: 2.0}
GRAD_FACTOR = {torch.float64: 1.0, torch.float32: 4.0, torch.bfloat16: 3.0, torch.float16: 3.0}
# ... beside so many roundings of the largest value.
ROUNDINGS = {torch.float64: 8.0, torch.float32: 8.0, torch.bfloat16: 1.0, torch.float16: 1.0}


def largest(x: Tensor) -> float:
    """The largest absolute value; 0 of nothing."""
    return float(x.abs().max()) if x.numel() else 0.0


def length(x: Tensor) -> float:
    """The Euclidean norm."""
    return float(torch.linalg.vector_norm(x))


@dataclass
class Outcome:
    """What a comparison found: what is wrong, and each error relative to the largest value."""

    failures: list[str] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)

    def add(self, other: Outcome) -> None:
        self.failures += other.failures
        self.errors |= other.errors


@dataclass(frozen=True)
class Measure:
    """Exact values by name, plain torch's own error in each, and the error that is allowed.

    The names of gradients begin with "d". dead: (T,) bool, rows in which nothing but 0 is right.
    """

    exact: dict[str, Tensor]
    own: dict[str, float]
    allowed: dict[str, float]
    norm: Callable[[Tensor], float] = largest
    dead: Tensor | None = None

    @classmethod
    def of(
        cls,
        exact: dict[str, Tensor],
        plain: dict[str, Tensor],
        dtype: torch.dtype,
        *,
        condition: float = 1.0,
        norm: Callable[[Tensor], float] = largest,
        dead: Tensor | None = None,
    ) -> Measure:
        """From values in float64, and those of plain torch in `dtype`, both on the CPU.

        condition: by how much the function magnifies roundings of its inputs. norm: `largest` or
        `length`, of the error and of the values that it is compared with.
        """
        own = {name: norm(plain[name].double() - x) for name, x in exact.items()}
        size = max(map(norm, exact.values()), default=0.0)
        roundings = ROUNDINGS[dtype] * torch.finfo(dtype).eps * size * condition
        factors = {
            name: (GRAD_FACTOR if name.startswith("d") else OUT_FACTOR)[dtype] for name in exact
        }
        allowed = {name: factors[name] * error + roundings for name, error in own.items()}
        return cls(exact, own, allowed, norm, dead)

    def error(self, name: str, x: Tensor) -> float:
        return self.norm(x.detach().cpu().double() - self.exact[name])

    def compare(self, what: str, actual: dict[str, Tensor]) -> Outcome:
        """These values, of any device, against the exact ones; `what` begins each line."""
        outcome = Outcome()
        for name, x in actual.items():
            key, exact, x = f"{what} {name}", self.exact[name], x.detach().cpu()
            if x.shape != exact.shape:
                shapes = f"{tuple(x.shape)}; expected {tuple(exact.shape)}"
                outcome.failures.append(f"{key} has shape {shapes}")
                continue
            error, size = self.error(name, x), self.norm(exact)
            outcome.errors[key] = error / size if size else error
            if not x.isfinite().all():
                outcome.failures.append(f"{key} is not finite")
            elif not error <= self.allowed[name]:
                outcome.failures.append(
                    f"{key} is {error:.2g} off, {self.allowed[name]:.2g} allowed "
                    f"(its size is {size:.2g})"
                )
            elif self.dead is not None and x[self.dead].any():
                outcome.failures.append(f"{key} is not 0 in a row outside every sequence")
        return outcome
