"""Tables of labelled texts: finding the columns of texts and labels, and reading them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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

NUMBER = re.compile(r"-?(?:0|[1-9]\d{0,17})(?:\.0+)?")


@dataclass(frozen=True, eq=False)
class Rows:
    """The texts and labels of one split, labels as the file writes them."""

    texts: list[str]
    labels: list[Label]
    where: str
    label_names: list[str] | None = None  # of integer labels, where the file gives them
    notes: list[str] = field(default_factory=list)


def some(values: Sequence[Any], limit: int = 10) -> str:
    shown = ", ".join(repr(v) for v in values[:limit])
    return shown if len(values) <= limit else f"{shown} and {len(values) - limit:,} more"


@dataclass(frozen=True, eq=False)
class Table:
    """The columns of one file.

    where: the file, for messages. kinds: whether each column is text. read: the values of a column.
    place: where the row with this index is in the file, for messages. class_names: the names of a
    column's integer labels, where the file has them.
    """

    where: str
    kinds: dict[str, bool]
    read: Callable[[str], list[Any]]
    place: Callable[[int], str] = lambda row: f"row {row + 1}"
    class_names: Callable[[str], list[str] | None] = lambda column: None


def _find_columns(
    table: Table, text_column: str | None, label_column: str | None
) -> tuple[str, str]:
    columns = table.kinds
    shown = f"{table.where} has the columns {some(list(columns), 30)}"
    for flag, name in (("--text-column", text_column), ("--label-column", label_column)):
        if name is not None and name not in columns:
            raise DataError(f"{shown}; {flag} is {name!r}, which is none of them")

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


def _label(value: Any) -> Label | None:
    """A label as integer or string; None if it is neither."""
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str):
        return value.strip() or None
    return value if isinstance(value, int) else None


def table_rows(table: Table, text_column: str | None, label_column: str | None) -> Rows:
    text, label = _find_columns(table, text_column, label_column)
    texts = _texts(table, text)
    labels: list[Label] = []
    for row, value in enumerate(table.read(label)):
        found = _label(value)
        if found is None:
            raise DataError(
                f"{table.where}, {table.place(row)}: the label (column {label!r}) is "
                f"{shown(value)}; expected an integer or a word. Mend or remove that row, or name "
                "another --label-column"
            )
        labels.append(found)
    usual = (text, label) == ("text", "label")
    notes = [] if usual else [f"columns: the texts are in {text!r}, the labels in {label!r}"]
    return Rows(texts, labels, table.where, table.class_names(label), notes)


def shown(value: Any) -> str:
    if value is None or value == "" or value != value:
        return "missing"
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
