"""The labels of a dataset as arrays, for each kind of problem: one table, three small classes.

Shapes: n texts, C classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fasttx.config import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from fasttx.errors import DataError
from fasttx.text import labels
from fasttx.text.cells import some
from fasttx.text.labels import Numbered
from fasttx.text.tables import Rows


class Target(ABC):
    """What the labels of one kind of problem are."""

    @abstractmethod
    def numbered(self, rows: Mapping[str, Rows], name: str) -> Numbered:
        """The labels of each split. name: the dataset's. Raises DataError."""

    @abstractmethod
    def numbered_as_saved(
        self, rows: Rows, names: Sequence[str], numbers: Sequence[int] | None
    ) -> tuple[np.ndarray, list[str]]:
        """The labels of a split for a saved model with these label names, and lines to show. Raises
        DataError."""

    @abstractmethod
    def strata(self, found: np.ndarray) -> np.ndarray:
        """(n,) int64: a subset has these in equal shares."""

    @abstractmethod
    def described(self, splits: Mapping[str, np.ndarray], names: Sequence[str]) -> dict[str, Any]:
        """What config.json keeps of the labels of each split."""

    def is_described(self, described: Mapping[str, Any], names: Sequence[str]) -> bool:
        """Whether `described`, which a hand may have changed, has what was kept."""
        counts = described.get("label_counts", {})
        each = [split.get(name) for split in counts.values() for name in names]
        return list(counts) == list(_SPLITS) and all(isinstance(n, int) for n in each)

    @abstractmethod
    def table(self, described: Mapping[str, Any]) -> str:
        """`described`, for people."""

    @abstractmethod
    def warning(self, described: Mapping[str, Any]) -> str | None:
        """Why a measurement on these labels says little."""


class Class(Target):
    """One class a text: (n,) int64."""

    def numbered(self, rows: Mapping[str, Rows], name: str) -> Numbered:
        return labels.numbered(rows, name)

    def numbered_as_saved(
        self, rows: Rows, names: Sequence[str], numbers: Sequence[int] | None
    ) -> tuple[np.ndarray, list[str]]:
        return labels.numbered_as_saved(rows, names, numbers)

    def strata(self, found: np.ndarray) -> np.ndarray:
        return found

    def described(self, splits: Mapping[str, np.ndarray], names: Sequence[str]) -> dict[str, Any]:
        counts = {k: np.bincount(v, minlength=len(names)).tolist() for k, v in splits.items()}
        return _by_name(counts, names)

    def table(self, described: Mapping[str, Any]) -> str:
        return labels.label_table(described["label_counts"])

    def warning(self, described: Mapping[str, Any]) -> str | None:
        return labels.single_class_warning(described["label_counts"])


class Classes(Target):
    """Any number of classes a text: (n, C) float32, 1 where the text has the class, else 0."""

    def numbered(self, rows: Mapping[str, Rows], name: str) -> Numbered:
        rows = _as_lists(dict(rows))
        flat = {split: _flat(r) for split, r in rows.items()}
        if not flat["train"].labels:
            raise DataError(f"no text of {rows['train'].where} has a label; expected some")
        found = labels.numbered(flat, name)
        arrays = {
            split: _indicators(codes, rows[split], len(found.names))
            for split, codes in found.codes.items()
        }
        return found._replace(codes=arrays)

    def numbered_as_saved(
        self, rows: Rows, names: Sequence[str], numbers: Sequence[int] | None
    ) -> tuple[np.ndarray, list[str]]:
        rows = _as_lists({"": rows}, names)[""]
        flat = _flat(rows)
        codes, notes = np.zeros(0, dtype=np.int64), list[str]()
        if flat.labels:
            codes, notes = labels.numbered_as_saved(flat, names, numbers)
        return _indicators(codes, rows, len(names)), notes

    def strata(self, found: np.ndarray) -> np.ndarray:
        return np.zeros(len(found), dtype=np.int64)

    def described(self, splits: Mapping[str, np.ndarray], names: Sequence[str]) -> dict[str, Any]:
        counts = {k: v.sum(0).astype(np.int64).tolist() for k, v in splits.items()}
        mean = {k: float(v.sum(1).mean()) for k, v in splits.items()}
        return {**_by_name(counts, names), "labels_per_text": mean}

    def table(self, described: Mapping[str, Any]) -> str:
        sizes = {"train": "train_samples", "validation": "val_samples", "test": "test_samples"}
        lines = []
        for split, counts in described["label_counts"].items():
            mean = described["labels_per_text"][split]
            shown = labels.counted(counts)
            lines.append(
                f"{split:>10}: {described[sizes[split]]:6d} texts, {mean:.2f} labels each  ({shown}"
            )
        return "\n".join(lines)

    def warning(self, described: Mapping[str, Any]) -> str | None:
        counts = described["label_counts"]
        never = [name for name, n in counts["train"].items() if not n]
        always = [n for n, k in counts["train"].items() if k == described["train_samples"]]
        said = [
            f"{what}: {some(found)}"
            for what, found in (("no text of train has", never), ("every one has", always))
            if found
        ]
        if not said:
            return None
        return (
            f"LABELS THAT CANNOT BE LEARNT ({'; '.join(said)}). What the model says of them is a "
            "guess, or always the same. Train on more texts, or leave these labels out."
        )


class Number(Target):
    """A number: (n, 1) float32."""

    def numbered(self, rows: Mapping[str, Rows], name: str) -> Numbered:
        arrays = {split: _column(r) for split, r in rows.items()}
        train = arrays["train"].astype(np.float64)
        notes = []
        if (spread := float(train.std())) > _WIDE:
            notes.append(
                f"labels: they spread by {spread:g} (standard deviation); a model fits numbers "
                "faster that spread by about 1: divide them"
            )
        return Numbered(rows["train"].label_names or ["label"], arrays, None, notes)

    def numbered_as_saved(
        self, rows: Rows, names: Sequence[str], numbers: Sequence[int] | None
    ) -> tuple[np.ndarray, list[str]]:
        return _column(rows), []

    def strata(self, found: np.ndarray) -> np.ndarray:
        return np.zeros(len(found), dtype=np.int64)

    def described(self, splits: Mapping[str, np.ndarray], names: Sequence[str]) -> dict[str, Any]:
        def of(found: np.ndarray) -> dict[str, float]:
            x = found.astype(np.float64)
            numbers = {"min": x.min(), "mean": x.mean(), "max": x.max(), "deviation": x.std()}
            return {name: float(value) for name, value in numbers.items()}

        return {"label_range": {split: of(found) for split, found in splits.items()}}

    def is_described(self, described: Mapping[str, Any], names: Sequence[str]) -> bool:
        ranges = described.get("label_range", {})
        return list(ranges) == list(_SPLITS) and all(
            isinstance(r, dict) and all(isinstance(x, float) for x in r.values())
            for r in ranges.values()
        )

    def table(self, described: Mapping[str, Any]) -> str:
        return "\n".join(
            f"{split:>10}: {r['min']:g} to {r['max']:g}, mean {r['mean']:.4g}, standard deviation "
            f"{r['deviation']:.4g}"
            for split, r in described["label_range"].items()
        )

    def warning(self, described: Mapping[str, Any]) -> str | None:
        single = [k for k, r in described["label_range"].items() if r["min"] == r["max"]]
        if not single:
            return None
        return (
            f"ONE NUMBER ONLY (every label of {' and of '.join(single)} is the same): a model that "
            "always gives it makes no error, which says nothing about the model."
        )


TARGETS: dict[str, Target] = {
    SINGLE_LABEL: Class(),
    MULTI_LABEL: Classes(),
    REGRESSION: Number(),
}

_SPLITS = ("train", "validation", "test")
_WIDE = 20.0  # standard deviations of labels beyond which a hint is shown


def _by_name(counts: Mapping[str, Sequence[int]], names: Sequence[str]) -> dict[str, Any]:
    return {"label_counts": {k: dict(zip(names, v, strict=True)) for k, v in counts.items()}}


def _column(rows: Rows) -> np.ndarray:
    return np.array(rows.labels, dtype=np.float32)[:, None]


def _as_lists(rows: dict[str, Rows], names: Sequence[str] | None = None) -> dict[str, Rows]:
    """`rows`, or where their labels are vectors of 0 and 1, all of one length above 1, the numbers
    of the ones: named by the file, else by `names` where there are as many, else by their place."""
    lengths = {len(found) for r in rows.values() for found in r.labels}
    values = {value for r in rows.values() for found in r.labels for value in found}
    own = next((r.label_names for r in rows.values() if r.label_names), None)
    width = max(lengths, default=0)
    fits = own is None or len(own) == width
    if len(lengths) != 1 or width < 2 or not values <= {0, 1} or not fits:
        return rows
    named = names if names is not None and len(names) == width else range(width)
    given = own or [str(name) for name in named]
    return {
        split: Rows(
            r.texts,
            [tuple(i for i, flag in enumerate(found) if flag) for found in r.labels],
            r.where,
            r.label_names or given,
        )
        for split, r in rows.items()
    }


def _flat(rows: Rows) -> Rows:
    """The labels of all texts one after the other, as if each were a text's only one."""
    return Rows([], [v for found in rows.labels for v in found], rows.where, rows.label_names)


def _indicators(codes: np.ndarray, rows: Rows, classes: int) -> np.ndarray:
    """(n, C) float32 from the class numbers of all labels, one after the other."""
    found = np.zeros((len(rows.labels), classes), dtype=np.float32)
    found[np.repeat(np.arange(len(found)), [len(labels) for labels in rows.labels]), codes] = 1.0
    return found
