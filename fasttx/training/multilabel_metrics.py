"""How good a multi-label classifier's logits are: F1, average precision, per label and over all.

A label is given to a text where its probability is at least 0.5. Shapes: n texts, C labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fasttx.terminal import one_line
from fasttx.training.metrics import MOST_SHOWN, checked_logits, ratio, table


@dataclass(frozen=True, eq=False)
class MultiLabelMetrics:
    """precision, recall, f1, average_precision, support are (C,); the first three are 0 where
    undefined. A label that no text has has no average precision (NaN, None in JSON), and the macro
    mean leaves it out, as scikit-learn's own mean would count it as 0."""

    n: int
    loss: float  # mean binary cross-entropy over texts and labels, in nats
    micro_f1: float  # over all decisions, a text and a label each
    macro_f1: float  # mean over labels
    micro_average_precision: float | None
    macro_average_precision: float | None
    subset_accuracy: float  # texts of which every label is right
    label_accuracy: float  # decisions that are right: 1 - Hamming loss
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    average_precision: np.ndarray
    support: np.ndarray

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, ready for JSON."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        found = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in values.items()}
        each = found["average_precision"]
        return found | {"average_precision": [None if p != p else p for p in each]}


def multilabel_metrics(logits: ArrayLike, labels: ArrayLike) -> MultiLabelMetrics:
    """Metrics of `logits` (n, C), any float dtype, against `labels` (n, C) of 0 and 1.

    Computed in float64. Raises ValueError for shapes, labels or logits that cannot be measured.
    """
    scores, truth = checked_logits(np.asarray(logits)), np.asarray(labels)
    if truth.shape != scores.shape:
        raise ValueError(f"labels have shape {truth.shape}; expected that of logits {scores.shape}")
    if not np.isin(truth, (0, 1)).all():
        raise ValueError("labels hold other numbers than 0 and 1")
    truth = truth.astype(bool)
    chosen = scores >= 0
    hits, support, given = (truth & chosen).sum(0), truth.sum(0), chosen.sum(0)
    f1 = ratio(2 * hits, support + given)
    each = np.array([_average_precision(scores[:, c], truth[:, c]) for c in range(len(support))])
    there = each[support > 0]
    # log(1 + exp(-x)) for a label that the text has, log(1 + exp(x)) for another one.
    losses = np.logaddexp(0.0, np.where(truth, -scores, scores))
    return MultiLabelMetrics(
        n=len(scores),
        loss=float(losses.mean()),
        micro_f1=float(ratio(2 * hits.sum(), (support + given).sum())),
        macro_f1=float(f1.mean()),
        micro_average_precision=_average_precision(scores.ravel(), truth.ravel())
        if len(there)
        else None,
        macro_average_precision=float(there.mean()) if len(there) else None,
        subset_accuracy=float((truth == chosen).all(1).mean()),
        label_accuracy=float((truth == chosen).mean()),
        precision=ratio(hits, given),
        recall=ratio(hits, support),
        f1=f1,
        average_precision=each,
        support=support,
    )


def _average_precision(scores: np.ndarray, truth: np.ndarray) -> float:
    """The mean over positives of the precision at the score of each; NaN without positives.

    As scikit-learn has it: precision times the step in recall, summed over the distinct scores from
    above, without interpolation.
    """
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], truth[order].cumsum()
    ends = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)  # of each distinct score
    hits = hits[ends]
    if not hits[-1]:
        return float("nan")
    precision = hits / (ends + 1)
    return float((np.diff(hits, prepend=0) * precision).sum() / hits[-1])


def format_multilabel(metrics: MultiLabelMetrics, label_names: Sequence[str]) -> str:
    """The metrics as text, some lines long. Raises ValueError unless each label has a name."""
    if len(label_names) != len(metrics.support):
        raise ValueError(f"label_names has {len(label_names)}; expected {len(metrics.support)}")
    shown = np.sort(np.argsort(-metrics.support, kind="stable")[:MOST_SHOWN]).tolist()
    m = metrics
    head = [
        f"texts                    {m.n}",
        f"micro F1                 {m.micro_f1:.2%}",
        f"macro F1                 {m.macro_f1:.2%}",
        f"micro average precision  {percent_or_dash(m.micro_average_precision)}",
        f"macro average precision  {percent_or_dash(m.macro_average_precision)}",
        f"every label right        {m.subset_accuracy:.2%} of the texts",
        f"labels right             {m.label_accuracy:.2%} of all decisions",
        f"loss                     {m.loss:.4f}",
    ]
    rows = [
        [one_line(label_names[i]), *(f"{s[i]:.2%}" for s in (m.precision, m.recall, m.f1)),
         percent_or_dash(float(m.average_precision[i])), str(m.support[i])]
        for i in shown
    ]  # fmt: skip
    names = ["label", "precision", "recall", "F1", "average precision", "texts"]
    left = len(m.support) - len(rows)
    more = [f"and {left:,} labels with fewer texts"] if left else []
    return "\n".join([*head, "", *table([names, *rows]), *more])


def percent_or_dash(share: float | None) -> str:
    """A share, or - where it is undefined."""
    return "-" if share is None or share != share else f"{share:.2%}"
