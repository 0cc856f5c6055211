"""Tables of labelled texts: finding the columns of texts and labels, and reading them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from fasttx.errors import DataError

Label = int | str

TEXT_NAMES = (
    "text", "review", "sentence", "content", "body", "document", "comment", "message", "tweet",
    "utterance", "question", "headline", "description", "title",
)  # fmt: skip
LABEL_NAMES = (
    "label", "labels", "sentiment", "class", "target", "category", "polarity", "stars", "rating",
    "score", "intent", "topic",
)  # fmt: skip
ROW_NUMBERS = ("", "id", "idx", "index", "unnamed: 0", "__index_level_0__")

NUMBER = re.compile(r"-?(?:0|[1-9][0-9]{0,17})(?:\.0+)?")
# What a cell of CSV means by a number: as JSON and parquet, which know numbers from words, hold it.
# 007 is a word.
_INTEGER = re.compile(r"[+-]?(?:0|[1-9][0-9]{0,99})")
_NUMERAL = re.compile(
    r"[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?|nan|inf|infinity)", re.IGNORECASE
)
_PADDED = re.compile(r"[+-]?0[0-9]+")
_EXACT = 2**53  # beyond it a float is no certain integer


@dataclass(frozen=True, eq=False)
class Rows:
    """The texts and labels of one split, labels as the file writes them (numerals are integers)."""

    texts: list[str]
    labels: list[Label]
    where: str
    label_names: list[str] | None = None  # of integer labels, where the file gives them
    notes: list[str] = field(default_factory=list)


def some(values: Sequence[Any], limit: int = 10) -> str:
    names = ", ".join(_cut(repr(v), 100) for v in values[:limit])
    return names if len(values) <= limit else f"{names} and {len(values) - limit:,} more"


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


@dataclass(frozen=True, eq=False)
class Table:
    """The columns of one file.

    where: the file, for messages. kinds: whether each column is text. read: the values of a column.
    place: where the row with this index is in the file, for messages. class_names: the names of a
    column's integer labels, where the file has them. notes: lines to show.
    """

    where: str
    kinds: dict[str, bool]
    read: Callable[[str], list[Any]]
    place: Callable[[int], str] = lambda row: f"row {row + 1}"
    class_names: Callable[[str], list[str] | None] = lambda column: None
    notes: Sequence[str] = ()


def _find_columns(
    table: Table, text_column: str | None, label_column: str | None
) -> tuple[str, str]:
    columns = table.kinds
    shown = f"{table.where} has the columns {some(list(columns), 30)}"
    for flag, name in (("--text-column", text_column), ("--label-column", label_column)):
        if name is not None and name not in columns:
            raise DataError(f"{shown}; {flag} is {name!r}, which is none of them")
    if text_column is not None and text_column == label_column:
        raise DataError(
            f"--text-column and --label-column are both {text_column!r}: a model that reads the "
            f"label learns nothing else. {shown}; name two of them"
        )

    free = [c for c in columns if c.lower() not in ROW_NUMBERS]
    free = [c for c in free if c not in (text_column, label_column)]

    def known(names: tuple[str, ...]) -> str | None:
        return next((c for name in names for c in free if c.lower() == name), None)

    def only(candidates: list[str]) -> str | None:
        return candidates[0] if len(candidates) == 1 else None

    label = label_column or known(LABEL_NAMES)
    text = text_column or known(TEXT_NAMES)
    text = text or only([c for c in free if c != label and columns[c]])
    label = label or only([c for c in free if c != text])
    for flag, found, what in (
        ("--text-column", text, "texts"), ("--label-column", label, "labels")
    ):  # fmt: skip
        if found is None:
            raise DataError(f"{shown}; which of them holds the {what}? Name it with {flag}")
    assert text is not None and label is not None
    return text, label


def refuse_twice(where: str, columns: Sequence[str]) -> None:
    if len(set(columns)) < len(columns):
        raise DataError(f"{where} has two columns of one name: {some(columns)}; rename one")


def table_texts(table: Table, text_column: str | None) -> list[str]:
    """The texts of a table, whose labels are missing or not used. Raises DataError."""
    names = [c for c in table.kinds if c.lower() in TEXT_NAMES]
    text = text_column or next(iter(sorted(names, key=lambda c: TEXT_NAMES.index(c.lower()))), None)
    if text not in table.kinds:
        raise DataError(
            f"{table.where} has the columns {some(list(table.kinds), 30)}; which of them holds the "
            f"texts? Name it with --text-column"
        )
    return _texts(table, text)


def _texts(table: Table, column: str) -> list[str]:
    """The texts of a column; "" is a text without words, and what is missing is refused."""
    texts = table.read(column)
    if not texts:
        raise DataError(f"{table.where} holds no rows; expected at least one text")
    for row, value in enumerate(texts):
        if not isinstance(value, str):
            raise DataError(
                f"{table.where}, {table.place(row)}: the text (column {column!r}) is "
                f"{shown(value)}; mend or remove that row, or name another --text-column"
            )
    return texts


def blank_note(texts: Sequence[str], where: str, place: Callable[[int], str]) -> list[str]:
    """A line about the texts that have no words, if there are any."""
    blank = [i for i, text in enumerate(texts) if not text or text.isspace()]
    if not blank:
        return []
    said = f"{len(blank):,} of {len(texts):,} texts are empty or blank"
    return [f"{where}: {said}, the first in {place(blank[0])}"]


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
    if isinstance(value, Decimal) or (isinstance(value, str) and value.strip()):
        value = float(value)
    if isinstance(value, float):
        if math.isnan(value):
            return "missing (nan)"
        return f"{value:g}, which is no integer" if abs(value) < _EXACT else f"{value:g}"
    return shown(value)


def table_rows(table: Table, text_column: str | None, label_column: str | None) -> Rows:
    text, label = _find_columns(table, text_column, label_column)
    texts = _texts(table, text)
    labels: list[Label] = []
    for row, value in enumerate(table.read(label)):
        found = as_label(value)
        if found is None:
            raise DataError(
                f"{table.where}, {table.place(row)}: the label (column {label!r}) is "
                f"{why_no_label(value)}; expected an integer or a word. Mend or remove that row, "
                "or name another --label-column"
            )
        labels.append(found)
    notes = [*table.notes, *blank_note(texts, table.where, table.place)]
    if (text, label) != ("text", "label"):
        notes.append(f"columns: the texts are in {text!r}, the labels in {label!r}")
    return Rows(texts, labels, table.where, table.class_names(label), notes)


def shown(value: Any) -> str:
    if value is None or value != value or (isinstance(value, str) and not value.strip()):
        return "missing"
    return _cut(repr(value), 60)
