"""Tables of labelled texts: finding the columns of texts and labels, and reading them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fasttx.config import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from fasttx.errors import DataError
from fasttx.text.cells import CELLS, as_flag, shown, some, why_no_label

TEXT_NAMES = (
    "text", "review", "sentence", "content", "body", "document", "comment", "message", "tweet",
    "utterance", "question", "headline", "description", "title",
)  # fmt: skip
LABEL_NAMES = (
    "label", "labels", "sentiment", "class", "target", "category", "polarity", "stars", "rating",
    "score", "intent", "topic",
)  # fmt: skip
ROW_NUMBERS = ("", "id", "idx", "index", "unnamed: 0", "__index_level_0__")


@dataclass(frozen=True, eq=False)
class Rows:
    """The texts and labels of one split, labels as the file writes them (numerals are integers): by
    the kind of problem each is an integer or a word, a tuple of these, or a number."""

    texts: list[str]
    labels: list[Any]
    where: str
    label_names: list[str] | None = None  # of integer labels, where the file gives them
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Columns:
    """Which columns hold the texts and the labels (None: they are found), and what a label is, by
    its name in `config.PROBLEM_TYPES`."""

    text: str | None = None
    label: str | None = None
    problem_type: str = SINGLE_LABEL


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


def _find_columns(table: Table, asked: Columns) -> tuple[str, list[str]]:
    """The column of texts, and that of labels; or those that are named, of several labels."""
    columns = table.kinds
    shown_columns = f"{table.where} has the columns {some(list(columns), 30)}"
    wanted = [] if asked.label is None else [asked.label]
    if asked.label is not None and asked.label not in columns and "," in asked.label:
        wanted = [name.strip() for name in asked.label.split(",")]
        if asked.problem_type != MULTI_LABEL:
            raise DataError(
                f"--label-column is {asked.label!r}: several columns are read with --problem-type "
                f"{MULTI_LABEL} only; expected one of {some(list(columns), 30)}"
            )
        refuse_twice("--label-column", wanted)
    for flag, name in (("--text-column", asked.text), *(("--label-column", n) for n in wanted)):
        if name is not None and name not in columns:
            raise DataError(f"{shown_columns}; {flag} is {name!r}, which is none of them")
    if asked.text is not None and asked.text in wanted:
        raise DataError(
            f"--text-column and --label-column are both {asked.text!r}: a model that reads the "
            f"label learns nothing else. {shown_columns}; name two of them"
        )

    free = [c for c in columns if c.lower() not in ROW_NUMBERS]
    free = [c for c in free if c != asked.text and c not in wanted]

    def known(names: tuple[str, ...]) -> str | None:
        return next((c for name in names for c in free if c.lower() == name), None)

    def only(candidates: list[str]) -> str | None:
        return candidates[0] if len(candidates) == 1 else None

    label = wanted[0] if wanted else known(LABEL_NAMES)
    text = asked.text or known(TEXT_NAMES)
    text = text or only([c for c in free if c != label and columns[c]])
    label = label or only([c for c in free if c != text])
    for flag, found, what in (
        ("--text-column", text, "texts"), ("--label-column", label, "labels")
    ):  # fmt: skip
        if found is None:
            raise DataError(f"{shown_columns}; which of them holds the {what}? Name it with {flag}")
    assert text is not None and label is not None
    return text, wanted or [label]


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


def table_rows(table: Table, columns: Columns) -> Rows:
    text, found = _find_columns(table, columns)
    texts = _texts(table, text)
    named = len(found) > 1 or columns.problem_type == REGRESSION  # the columns name the labels
    names = found if named else table.class_names(found[0])
    if len(found) > 1:
        labels = _flagged(table, found)
    else:
        labels = _labels(table, found[0], columns.problem_type)
    notes = [*table.notes, *blank_note(texts, table.where, table.place)]
    if (text, *found) != ("text", "label"):
        shown_names = ", ".join(map(repr, found))
        notes.append(f"columns: the texts are in {text!r}, the labels in {shown_names}")
    return Rows(texts, labels, table.where, names, notes)


def _labels(table: Table, column: str, problem_type: str) -> list[Any]:
    cell, labels = CELLS[problem_type], []
    for row, value in enumerate(table.read(column)):
        found = cell.read(value)
        if found is None:
            raise DataError(
                f"{table.where}, {table.place(row)}: the label (column {column!r}) is "
                f"{why_no_label(value)}; expected {cell.expected(value)}. Mend or remove that row, "
                "or name another --label-column"
            )
        labels.append(found)
    return labels


def _flagged(table: Table, columns: Sequence[str]) -> list[Any]:
    """Of columns of 0 and 1, one a label: the numbers of those that are 1."""
    labels: list[list[int]] = [[] for _ in table.read(columns[0])]
    for number, column in enumerate(columns):
        for row, value in enumerate(table.read(column)):
            flag = as_flag(value)
            if flag is None:
                raise DataError(
                    f"{table.where}, {table.place(row)}: the label {column!r} is {shown(value)}; "
                    "expected 0 or 1, for --label-column names several columns"
                )
            if flag:
                labels[row].append(number)
    return [tuple(row) for row in labels]
