"""How good a classifier's logits are: accuracy, loss, confusion, per-class scores, calibration.

Shapes: n texts, C classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fasttx.errors import NotFiniteError
from fasttx.terminal import one_line

CALIBRATION_BINS = 15
MOST_SHOWN = 40  # labels, in a table for people


@dataclass(frozen=True, eq=False)
class Metrics:
    """n texts, C classes; precision, recall, f1, support are (C,), with 0 where undefined."""

    n: int
    accuracy: float
    loss: float  # mean negative log-likelihood of the true label, in nats
    confusion_matrix: np.ndarray  # (C, C) int64: row = true label, column = predicted label
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    support: np.ndarray  # texts that have the label
    macro_f1: float  # mean of f1 over all C classes
    expected_calibration_error: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, ready for JSON."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in values.items()}


def classification_metrics(logits: ArrayLike, labels: ArrayLike) -> Metrics:
    """Metrics of `logits` (n, C), any float dtype, against `labels` (n,), integers in [0, C).

    The calibration error is the expected calibration error of Guo et al., "On Calibration of Modern
    Neural Networks" (ICML 2017), eq. 3: 15 bins of equal width on the probability of the predicted
    class. Among equal logits the first class is predicted. Computed in float64.
    Raises ValueError for shapes, labels or logits (NaN, inf) that cannot be measured.
    """
    scores = checked_logits(np.asarray(logits))
    truth = _checked_labels(np.asarray(labels), scores.shape)
    n, classes = scores.shape
    every = np.arange(n)

    log_probabilities = log_softmax(scores)
    predicted = scores.argmax(1)
    correct = predicted == truth

    cells = np.bincount(truth * classes + predicted, minlength=classes * classes)
    confusion = cells.reshape(classes, classes)
    hits, support, chosen = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    f1 = ratio(2 * hits, support + chosen)
    return Metrics(
        n=n,
        accuracy=float(correct.mean()),
        loss=float(-log_probabilities[every, truth].mean()),
        confusion_matrix=confusion,
        precision=ratio(hits, chosen),
        recall=ratio(hits, support),
        f1=f1,
        support=support,
        macro_f1=float(f1.mean()),
        expected_calibration_error=_calibration_error(
            np.exp(log_probabilities[every, predicted]), correct
        ),
    )


def log_softmax(logits: ArrayLike) -> np.ndarray:
    """Log-probabilities (n, C) of `logits` (n, C), computed in float64."""
    scores = np.asarray(logits, dtype=np.float64)
    shifted = scores - scores.max(1, keepdims=True)
    log_probabilities: np.ndarray = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return log_probabilities


def checked_logits(logits: np.ndarray) -> np.ndarray:
    """(n, C) float64, finite. Raises ValueError, NotFiniteError."""
    if logits.ndim != 2:
        raise ValueError(f"logits have shape {logits.shape}; expected (texts, classes)")
    n, classes = logits.shape
    if not n:
        raise ValueError("logits have no rows: there is nothing to measure; give at least one text")
    if not classes:
        raise ValueError(f"logits have shape {logits.shape}; expected at least one class")
    logits = logits.astype(np.float64)
    bad = int((~np.isfinite(logits)).any(1).sum())
    if bad:
        raise NotFiniteError(
            f"the logits of {bad} of {n} texts are NaN or infinite; expected finite numbers. "
            "A model that diverged gives such: try a lower learning rate"
        )
    return logits


def _checked_labels(labels: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(n,) int64 in [0, C), for logits of this shape. Raises ValueError."""
    n, classes = shape
    if labels.shape != (n,):
        raise ValueError(f"labels have shape {labels.shape}; expected ({n},), one for each text")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels are {labels.dtype}; expected integers")
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        i = wrong[0]
        raise ValueError(
            f"labels[{i}] is {labels[i]}; expected 0 to {classes - 1} for {classes} classes"
        )
    return labels.astype(np.int64)


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, and 0 where whole is 0."""
    share: np.ndarray = part / np.maximum(whole, 1)
    return share


def calibration_bins(confidence: np.ndarray) -> np.ndarray:
    """(n,) int64: the bin of each confidence (n,); bin m holds (m / bins, (m + 1) / bins]."""
    bins = np.ceil(confidence * CALIBRATION_BINS).astype(np.int64) - 1
    return bins.clip(0, CALIBRATION_BINS - 1)


def _calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    bins = calibration_bins(confidence)
    # |accuracy - confidence| of a bin, times its share of the texts.
    gaps = np.bincount(bins, weights=correct - confidence, minlength=CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(confidence))


def format_metrics(metrics: Metrics, label_names: Sequence[str]) -> str:
    """The metrics as text, some lines long. Raises ValueError unless each class has a name."""
    classes = len(metrics.support)
    if len(label_names) != classes:
        raise ValueError(f"label_names has {len(label_names)} names; expected {classes}")
    names = [one_line(name) for name in label_names]
    confusion = [
        [name, *map(str, row)]
        for name, row in zip(names, metrics.confusion_matrix[:MOST_SHOWN].tolist(), strict=False)
    ]
    scores = zip(names, metrics.precision, metrics.recall, metrics.f1, metrics.support, strict=True)
    per_class = [[name, *(f"{s:.2%}" for s in (p, r, f)), str(n)] for name, p, r, f, n in scores]
    how = f"(ECE, {CALIBRATION_BINS} bins)"
    head = [
        f"texts              {metrics.n}",
        f"accuracy           {metrics.accuracy:.2%}",
        f"loss               {metrics.loss:.4f}",
        f"macro F1           {metrics.macro_f1:.2%}{absent_labels(metrics)}",
        f"calibration error  {metrics.expected_calibration_error:.2%} {how}",
    ]
    matrix = [
        "confusion matrix (rows: true label, columns: predicted label)",
        *table([["", *names], *confusion]),
    ]
    if classes > MOST_SHOWN:
        matrix = [f"The confusion matrix of {classes:,} labels is not shown here; the JSON has it."]
        most = np.sort(np.argsort(-metrics.support, kind="stable")[:MOST_SHOWN])
        per_class = [per_class[i] for i in most]
    rows = table([["label", "precision", "recall", "F1", "texts"], *per_class])
    left = classes - len(per_class)
    more = [f"and {left:,} labels with fewer texts"] if left else []
    return "\n".join([*head, "", *matrix, "", *rows, *more])


def absent_labels(metrics: Metrics) -> str:
    """Why the macro F1 is low where labels are absent, and what it is without them; else ""."""
    there = metrics.support > 0
    if there.all():
        return ""
    absent, classes = int((~there).sum()), len(there)
    mean = float(metrics.f1[there].mean())
    which = "1 label has" if absent == 1 else f"{absent:,} labels have"
    return (
        f"  ({which} no text here and {'counts' if absent == 1 else 'count'} as 0; "
        f"over the other {classes - absent:,} it is {mean:.2%})"
    )


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
