"""What one cell of a column of labels says: a class, several classes, or a number."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np

from fasttx.config import MULTI_LABEL, REGRESSION, SINGLE_LABEL

Label = int | str

SEPARATOR = "|"  # between the labels of a text, where a cell is text

NUMBER = re.compile(r"-?(?:0|[1-9][0-9]{0,17})(?:\.0+)?")
# What a cell of CSV means by a number: as JSON and parquet, which know numbers from words, hold it.
# 007 is a word.
_INTEGER = re.compile(r"[+-]?(?:0|[1-9][0-9]{0,99})")
_NUMERAL = re.compile(
    r"[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?|nan|inf|infinity)", re.IGNORECASE
)
_PADDED = re.compile(r"[+-]?0[0-9]+")
_EXACT = 2**53  # beyond it a float is no certain integer
_LARGEST = float(np.finfo(np.float32).max)


def some(values: Sequence[Any], limit: int = 10) -> str:
    names = ", ".join(_cut(repr(v), 100) for v in values[:limit])
    return names if len(values) <= limit else f"{names} and {len(values) - limit:,} more"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def shown(value: Any) -> str:
    if value is None or value != value or (isinstance(value, str) and not value.strip()):
        return "missing"
    return _cut(repr(value), 60)


def as_label(value: Any) -> Label | None:
    """A label as integer or as the word that the file has; None if it is neither."""
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, int):
        return value if abs(value) < 10**100 else None
    if isinstance(value, Decimal):
        return as_label(float(value))
    if isinstance(value, float):
        return int(value) if abs(value) < _EXACT and value == int(value) else None
    if not isinstance(value, str) or not value.strip():
        return None
    numeral = value.strip()
    if _INTEGER.fullmatch(numeral):
        return int(numeral)
    if _NUMERAL.fullmatch(numeral) and not _PADDED.fullmatch(numeral):
        return as_label(float(numeral))
    return value


def why_no_label(value: Any) -> str:
    """What a value is that `as_label` does not take, alike for a number and for the text of one."""
    if isinstance(value, Decimal) or (isinstance(value, str) and _NUMERAL.fullmatch(value.strip())):
        value = float(value)
    if isinstance(value, float):
        if math.isnan(value):
            return "missing (nan)"
        return f"{value:g}, which is no integer" if abs(value) < _EXACT else f"{value:g}"
    return shown(value)


def as_labels(value: Any) -> tuple[Label, ...] | None:
    """Several labels; None for what is no list of labels.

    A list holds names or numbers; it may be empty. A text holds names with bars between (`a|b`),
    and an empty text none. One label may stand by itself.
    """
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, str):
        if value.strip().startswith("["):  # a list that was written as text
            return None
        value = [name.strip() for name in value.split(SEPARATOR)] if value.strip() else []
    elif not isinstance(value, list | tuple):
        value = [value]
    found = [as_label(int(v) if isinstance(v, bool) else v) for v in value]
    return None if None in found else tuple(found)  # type: ignore[arg-type]


def as_number(value: Any) -> float | None:
    """A number, also one that is written as text; None for what is none, or not finite."""
    if isinstance(value, Decimal) or (isinstance(value, str) and _NUMERAL.fullmatch(value.strip())):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # A NaN fails the comparison, and so does what float32 cannot hold.
    return float(value) if abs(value) <= _LARGEST else None


def as_flag(value: Any) -> int | None:
    """A cell of a column that says whether a text has a label: 0 or 1, or False or True."""
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        value = value.strip().lower() == "true"
    found = as_label(int(value) if isinstance(value, bool) else value)
    return found if found in (0, 1) else None  # type: ignore[return-value]


# --- for messages ---------------------------------------------------------------------------------


def _single_expected(value: Any) -> str:
    if isinstance(value, list | tuple | np.ndarray):
        return f"an integer or a word. For several labels a text: --problem-type {MULTI_LABEL}"
    if as_number(value) is not None:
        return f"an integer or a word. To fit numbers: --problem-type {REGRESSION}"
    return "an integer or a word"


class Cell(NamedTuple):
    """How a column of labels is read. expected: what a value should have been, for messages."""

    read: Callable[[Any], Any]
    expected: Callable[[Any], str]


CELLS: dict[str, Cell] = {
    SINGLE_LABEL: Cell(as_label, _single_expected),
    MULTI_LABEL: Cell(
        as_labels, lambda value: f"a list of integers or words, or a text such as a{SEPARATOR}b"
    ),
    REGRESSION: Cell(as_number, lambda value: "a finite number"),
}
