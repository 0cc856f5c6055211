"""Labels: class numbers and names from labels as files write them, and counts for people."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fasttx.errors import DataError
from fasttx.text.cells import NUMBER, Label, some
from fasttx.text.tables import Rows

IMDB_NAMES = ["negative", "positive"]  # of the labels 0 and 1
PLAIN_NAMES = {"neg": "negative", "pos": "positive"}

# Texts by split and label name.
Counts = Mapping[str, Mapping[str, int]]


class Numbered(NamedTuple):
    """Class names; class numbers (n,) int64 of each split; for each class the number that the file
    writes, None where it writes words; lines to show."""

    names: list[str]
    codes: dict[str, np.ndarray]
    numbers: list[int] | None
    notes: list[str]


def numbered(rows: Mapping[str, Rows], name: str) -> Numbered:
    """What the labels of train, and of the other splits, are as class numbers.

    name: the dataset's. Raises DataError.
    """
    joined = _of_one_type(list(rows.values()))
    labels, start = {}, 0
    for split, r in rows.items():
        labels[split] = joined[start : start + len(r.labels)]
        _check_labelled(set(labels[split]), r.where)
        start += len(r.labels)

    train = rows["train"]
    codes, label_names = _codes(labels["train"], train, name)
    for split, r in rows.items():
        if r.label_names and train.label_names and r.label_names != train.label_names:
            raise DataError(
                f"{r.where} names its labels {r.label_names}, {train.where} {train.label_names}; "
                "expected the same names in the same order"
            )
        if unknown := sorted(set(labels[split]) - codes.keys()):
            raise DataError(
                f"{r.where} has labels that {train.where} has not: {some(unknown)}; that has "
                f"{some(list(codes))}. Remove those rows, or train on every label"
            )
    numbers = [label for label in codes if isinstance(label, int)] or None
    notes = []
    if numbers and not train.label_names and label_names != [str(n) for n in numbers]:
        notes.append(f"labels: {_pairs(codes, label_names)}, as IMDB numbers them")
    for split, r in rows.items():
        if numbers and train.label_names and not r.label_names:
            notes.append(f"labels: the numbers of {split} are read as {train.where} names its own")
    arrays = {
        split: np.array([codes[v] for v in found], dtype=np.int64)
        for split, found in labels.items()
    }
    return Numbered(label_names, arrays, numbers, notes)


def numbered_as_saved(
    rows: Rows, label_names: Sequence[str], label_numbers: Sequence[int] | None = None
) -> tuple[np.ndarray, list[str]]:
    """(n,) int64, labels as class numbers of a saved model; and lines to show.

    Labels are matched by name: words, the names that the file gives its numbers, and numbers that
    are the model's names. Other numbers are read only where it is known what they stand for:
    label_numbers, those of the data that the model was trained on, or IMDB's 0 and 1. Raises
    DataError for a label that the model does not know, and where nobody knows.
    """
    labels = _of_one_type([rows])
    _check_labelled(set(labels), rows.where)
    values = sorted(set(labels))  # all integers or all strings
    number = {name: i for i, name in enumerate(label_names)}
    own, notes = rows.label_names, []
    shown: dict[Label, Label] = {v: v for v in values}
    codes: dict[Label, int | None]

    def by_name(label: Label) -> int | None:
        return number.get(str(label), number.get(PLAIN_NAMES.get(str(label), "")))

    if isinstance(values[0], int) and own:
        shown = {v: own[int(v)] if 0 <= int(v) < len(own) else v for v in values}
        codes = {v: by_name(shown[v]) if isinstance(shown[v], str) else None for v in values}
    elif isinstance(values[0], str) or any(NUMBER.fullmatch(name) for name in label_names):
        codes = {v: by_name(v) for v in values}
    else:
        if label_numbers is not None:
            meant = {n: i for i, n in enumerate(label_numbers)}
            whose = "as the model's training data numbers them"
        elif set(label_names) == set(IMDB_NAMES):
            meant = {n: number[name] for n, name in enumerate(IMDB_NAMES)}
            whose = "as IMDB numbers them"
        else:
            raise DataError(
                f"{rows.where} has the labels {some(values)}, and the classes of the model are "
                f"{some(list(label_names))}: which number stands for which class is not known. "
                "Write the names of the classes instead of numbers"
            )
        codes = {v: meant.get(int(v)) for v in values}
        known = {v: code for v, code in codes.items() if code is not None}
        notes.append(f"labels: {_pairs(known, label_names)}, {whose}")
    if unknown := [shown[label] for label, code in codes.items() if code is None]:
        raise DataError(
            f"{rows.where} has labels that the model was not trained on: {some(unknown)}; it "
            f"knows {some(list(label_names))}. Relabel or remove those rows"
        )
    return np.array([codes[label] for label in labels], dtype=np.int64), notes


def _pairs(codes: Mapping[Label, int], label_names: Sequence[str]) -> str:
    pairs = [f"{label} is {label_names[code]!r}" for label, code in codes.items()]
    return ", ".join(pairs[:10]) + (", ..." if len(pairs) > 10 else "")


def _of_one_type(parts: Sequence[Rows]) -> list[Label]:
    """All labels, end to end: integers if every one is, else words without the space around them.

    Raises DataError for labels that are alike and not the same.
    """
    labels = [label for r in parts for label in r.labels]
    if all(isinstance(label, int) for label in labels):
        return labels
    _check_alike([(r.where, sorted(set(r.labels), key=repr)) for r in parts])
    return [str(label).strip() for label in labels]


def _check_alike(parts: Sequence[tuple[str, Sequence[Label]]]) -> None:
    """Raise DataError for labels that look the same. parts: where labels are, and which."""
    seen: dict[str, tuple[Label, str]] = {}
    for where, labels in parts:
        for label in labels:
            key = _key(str(label))
            if not key:
                raise DataError(
                    f"{where} has the label {label!r}, of which nothing is to be seen; "
                    "expected an integer or a word"
                )
            first, there = seen.setdefault(key, (label, where))
            if first != label:
                raise DataError(
                    f"{where if there == where else f'{there} and {where}'}: the labels {first!r} "
                    f"and {label!r} differ only in capitals, white space, leading zeros, Unicode "
                    "form or what cannot be seen; write each label in one way"
                )


def _key(label: str) -> str:
    """Equal for labels that a reader takes for the same."""
    for _ in range(2):  # a compatibility form may have capitals, and its lower case another form
        label = unicodedata.normalize("NFKC", label).casefold()
    label = " ".join(label.split())
    label = "".join(c for c in label if unicodedata.category(c) not in ("Cc", "Cf"))  # no width
    label = " ".join(label.split())
    return str(int(label)) if re.fullmatch("[+-]?[0-9]{1,99}", label) else label


def _plain(names: Sequence[str]) -> list[str]:
    """`neg` and `pos`, IMDB's short names, become `negative` and `positive`."""
    return [PLAIN_NAMES[n] for n in names] if sorted(names) == ["neg", "pos"] else list(names)


def _check_labelled(values: set[Label], where: str) -> None:
    if values == {-1}:
        raise DataError(
            f"every label of {where} is -1, which stands for unlabelled; expected labelled rows"
        )


def _codes(labels: list[Label], train: Rows, name: str) -> tuple[dict[Label, int], list[str]]:
    """The class number of each label as written, and the class names. Raises DataError."""
    values = sorted(set(labels))  # all integers or all strings
    names = train.label_names
    if name == "imdb" and set(values) <= {0, 1}:
        names = IMDB_NAMES
    if names and isinstance(values[0], int):
        if outside := [v for v in values if v not in range(len(names))]:
            raise DataError(
                f"{train.where} has the label {some(outside)}, and names for 0 to "
                f"{len(names) - 1} (-1 stands for unlabelled). Remove or relabel those rows"
            )
        _check_alike([(train.where, names)])
        return {number: number for number in range(len(names))}, _plain(names)
    if len(values) == len(labels) >= 10:
        raise DataError(
            f"{train.where} has another label in every row ({some(values)}): that is no column "
            "of labels; name the right one with --label-column"
        )
    return {v: i for i, v in enumerate(values)}, _plain([str(v) for v in values])


# --- for people -----------------------------------------------------------------------------------


_MOST_SHOWN = 20  # labels, in one line


def label_table(counts: Counts) -> str:
    """Texts by split and label, to be read before any accuracy."""
    return "\n".join(
        f"{split:>10}: {sum(found.values()):6d} reviews  ({counted(found)}"
        for split, found in counts.items()
    )


def counted(found: Mapping[str, int]) -> str:
    """`2 bad, 3 good)`: the texts of each label, the first ones of many."""
    shown = ", ".join(f"{n} {label}" for label, n in list(found.items())[:_MOST_SHOWN])
    more = len(found) - _MOST_SHOWN
    return f"{shown} and {more:,} labels more)" if more > 0 else f"{shown})"


def single_class_warning(counts: Counts) -> str | None:
    """Why accuracy on a split with one label says nothing; None if every split has several."""
    single = {
        split: next(label for label, n in labels.items() if n)
        for split, labels in counts.items()
        if sum(n > 0 for n in labels.values()) == 1
    }
    if not single:
        return None
    where = ", ".join(f"{split}: only {label!r}" for split, label in single.items())
    return (
        f"ONE CLASS ONLY ({where}). The file is sorted by label and its first rows were taken, so "
        "a model that always gives this one answer is right every time: an accuracy of 100 % here "
        "is an artefact and says nothing about the model. Draw the subset shuffled "
        "(--subset-order shuffled) for an honest figure."
    )
