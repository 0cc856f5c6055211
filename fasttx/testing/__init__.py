"""One oracle for tests, `fasttx doctor`, the self-check of `mps`, and the benchmarks.

It is written without the backends' code: it has a Philox of its own, attention as a loop over
sequences, the other operations in plain torch. It runs on the CPU, so a device needs no float64.

    from fasttx.testing import check, quick_cases
    found = check(operations, quick_cases(head_dim=32), device, dtype, p=0.1)
    found.failures   # what is wrong, a line each; an exception too. Empty: right
    found.errors     # {"attention, dropout 0.1: dq": 3e-7, ...}, of the largest value

`philox` draws the masks; `attention` and `rows` hold the cases and what they should come to;
`tolerances` has the rule for errors, of whole outcomes too (`Measure.of(exact, plain, dtype,
norm=length)`, then `compare`); `checking` runs the cases; `timing` has what is timed.
"""

from __future__ import annotations

from fasttx.testing import attention, rows
from fasttx.testing.attention import AttentionCase
from fasttx.testing.checking import Case, check, compare, describe, dropout_of, measure
from fasttx.testing.rows import RowCase
from fasttx.testing.timing import Shape, attention_step, milliseconds, rows_step
from fasttx.testing.tolerances import Measure, Outcome, largest, length

__all__ = [
    "AttentionCase",
    "Case",
    "Measure",
    "Outcome",
    "RowCase",
    "Shape",
    "attention_step",
    "check",
    "compare",
    "describe",
    "dropout_of",
    "largest",
    "length",
    "measure",
    "milliseconds",
    "quick_cases",
    "rows_step",
]


def quick_cases(head_dim: int) -> list[Case]:
    """Attention and the row operations, for a check in the field."""
    return [*attention.cases(head_dim), *rows.cases()]
