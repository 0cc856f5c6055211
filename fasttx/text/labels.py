"""Labels: class numbers and names from labels as files write them, and counts for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fasttx.errors import DataError
from fasttx.text.tables import NUMBER, Label, Rows, some

IMDB_NAMES = ["negative", "positive"]  # of the labels 0 and 1
PLAIN_NAMES = {"neg": "negative", "pos": "positive"}

# Texts by split and label name.
Counts = Mapping[str, Mapping[str, int]]


def numbered(rows: Mapping[str, Rows], name: str) -> tuple[list[str], dict[str, np.ndarray]]:
    """The class names of train, and the class numbers (n,) int64 of each split.

    name: the dataset's. Raises DataError.
    """
    joined = _of_one_type([label for r in rows.values() for label in r.labels])
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
    return label_names, {
        split: np.array([codes[v] for v in found], dtype=np.int64)
        for split, found in labels.items()
    }


def numbered_as_saved(rows: Rows, label_names: Sequence[str]) -> np.ndarray:
    """(n,) int64: labels as class numbers of a saved model.

    Labels are matched by name; integers without names are class numbers. Raises DataError for a
    label that the model does not know.
    """
    number = {name: i for i, name in enumerate(label_names)}
    numeric = any(NUMBER.fullmatch(name) for name in label_names)
    own = _plain(rows.label_names or [])
    by_name = bool(own) and set(own) <= number.keys()

    def find(label: Label) -> int | None:
        if isinstance(label, int) and by_name:
            return number[own[label]] if 0 <= label < len(own) else None
        if isinstance(label, str) or numeric:
            return number.get(str(label), number.get(PLAIN_NAMES.get(str(label), "")))
        return label if 0 <= label < len(number) else None

    labels = _of_one_type(rows.labels)
    _check_labelled(set(labels), rows.where)
    codes = {label: find(label) for label in set(labels)}
    if unknown := sorted(label for label, code in codes.items() if code is None):
        raise DataError(
            f"{rows.where} has labels that the model was not trained on: {some(unknown)}; it "
            f"knows {some(list(label_names))}. Relabel or remove those rows"
        )
    return np.array([codes[label] for label in labels], dtype=np.int64)


def _of_one_type(labels: list[Label]) -> list[Label]:
    """Integers if every label is an integer or the text of one; else strings."""
    kinds = {type(label) for label in labels}
    if kinds == {str} and all(NUMBER.fullmatch(str(label)) for label in set(labels)):
        return [int(str(label).partition(".")[0]) for label in labels]
    return labels if len(kinds) == 1 else [str(label) for label in labels]


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
        f"{split:>10}: {sum(labels.values()):6d} reviews  ("
        + ", ".join(f"{n} {label}" for label, n in list(labels.items())[:_MOST_SHOWN])
        + (f" and {len(labels) - _MOST_SHOWN:,} labels more)" if len(labels) > _MOST_SHOWN else ")")
        for split, labels in counts.items()
    )


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
