"""What differs between the kinds of problem, in one table: loss, metrics, answers.

The names are transformers' own (`problem_type`). What labels are as arrays stands in
`fasttx.text.targets`. Shapes: n or B texts, C label names (1 in regression).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttx.config import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from fasttx.text.cells import SEPARATOR
from fasttx.training.measures import ACCURACY, Measure
from fasttx.training.metrics import Metrics, classification_metrics, format_metrics
from fasttx.training.multilabel_metrics import (
    MultiLabelMetrics,
    format_multilabel,
    multilabel_metrics,
)
from fasttx.training.regression_metrics import (
    RegressionMetrics,
    format_regression,
    regression_metrics,
)
from fasttx.training.results import time_to_accuracy

AnyMetrics = Metrics | MultiLabelMetrics | RegressionMetrics


# --- answers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """The likeliest label of a text, its probability, and those of all labels."""

    label: str
    probability: float
    probabilities: dict[str, float]

    def __str__(self) -> str:
        return f"{self.label}  {self.probability:7.2%}"


@dataclass(frozen=True)
class MultiLabelPrediction:
    """The labels of a text, those with a probability of at least 0.5, and all probabilities."""

    labels: tuple[str, ...]
    probabilities: dict[str, float]

    def __str__(self) -> str:
        shown = ", ".join(f"{name} {self.probabilities[name]:.2%}" for name in self.labels)
        return shown or "(no label)"


@dataclass(frozen=True)
class NumberPrediction:
    """The number that was fitted, for a text."""

    value: float

    def __str__(self) -> str:
        return f"{self.value:.4f}"


AnyPrediction = Prediction | MultiLabelPrediction | NumberPrediction


# --- the kinds ------------------------------------------------------------------------------------


class Problem(ABC):
    """One kind of problem. It has no state."""

    measure: ClassVar[Measure]
    metrics_class: ClassVar[type]  # one of `AnyMetrics`
    # For a model card: what the model does; title, key and Hugging Face's name of its metrics.
    purpose: ClassVar[str]
    card_metrics: ClassVar[tuple[tuple[str, str, str], ...]]

    @abstractmethod
    def loss(self, logits: Tensor, labels: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
        """Of logits (B, C): the sums over texts of the loss, and of `measure.trained`."""

    def prepare(self, last: nn.Linear, labels: np.ndarray) -> None:
        """The last layer of a new model, before it meets the labels of train."""
        return  # most begin as torch makes them

    @abstractmethod
    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> Any:
        """`AnyMetrics` of logits (n, C). Raises ValueError, NotFiniteError."""

    def metrics_of(self, values: Mapping[str, Any]) -> Any:
        """The inverse of the metrics' `to_dict`."""
        found = {k: np.array(v) if isinstance(v, list) else v for k, v in values.items()}
        of_numbers = {
            k: v.astype(np.float64) if isinstance(v, np.ndarray) and v.dtype == object else v
            for k, v in found.items()
        }
        return self.metrics_class(**of_numbers)

    @abstractmethod
    def format(self, metrics: Any, names: Sequence[str]) -> str:
        """The metrics as text."""

    @abstractmethod
    def scores(self, logits: Tensor) -> Tensor:
        """(n, C) float64: what a text is told, probabilities or numbers."""

    @abstractmethod
    def prediction(self, names: Sequence[str], scores: Sequence[float]) -> AnyPrediction:
        """One row of `scores`."""

    @abstractmethod
    def columns(
        self, names: Sequence[str], scores: np.ndarray, every: bool
    ) -> dict[str, np.ndarray]:
        """Columns of a table for `scores` (n, C); with `every` one for each probability too."""

    @abstractmethod
    def decision(self, logits: Tensor) -> tuple[int, int | None]:
        """Of logits (C,): the label that is to be explained, and the one that it is held against;
        None where its own logit is explained."""

    def probability(self, logits: Tensor, target: int) -> float | None:
        """Of one label, by logits (C,); None where there are none."""
        return float(self.scores(logits)[target])

    @abstractmethod
    def sureness(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """(n,): how good an example of a right answer each is, -inf for a wrong one."""

    def more_results(
        self, found: Mapping[str, Any], history: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """What results.json has of the test metrics `found` and of the epochs besides."""
        return {}


class SingleLabel(Problem):
    measure, metrics_class = ACCURACY, Metrics
    purpose = "tells {labels} apart"
    card_metrics = (("accuracy", "accuracy", "accuracy"), ("macro F1", "macro_f1", "f1"))

    def loss(self, logits: Tensor, labels: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
        loss = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="sum")
        likeliest = labels if labels.dim() == 1 else labels.argmax(-1)
        return loss, (logits.argmax(-1) == likeliest).sum()

    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> Metrics:
        return classification_metrics(logits, labels)

    def format(self, metrics: Metrics, names: Sequence[str]) -> str:
        return format_metrics(metrics, names)

    def scores(self, logits: Tensor) -> Tensor:
        return logits.double().softmax(-1)

    def prediction(self, names: Sequence[str], scores: Sequence[float]) -> Prediction:
        best = max(range(len(scores)), key=scores.__getitem__)
        return Prediction(names[best], scores[best], dict(zip(names, scores, strict=True)))

    def columns(
        self, names: Sequence[str], scores: np.ndarray, every: bool
    ) -> dict[str, np.ndarray]:
        best = scores.argmax(-1)
        found = {
            "predicted_label": np.array(names, dtype=object)[best],
            "predicted_probability": scores[np.arange(len(scores)), best],
        }
        return found | (_every(names, scores) if every else {})

    def decision(self, logits: Tensor) -> tuple[int, int | None]:
        target, rival = logits.argsort(descending=True, stable=True).tolist()[:2]
        return target, rival

    def sureness(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        sure = torch.from_numpy(logits).double().softmax(-1).amax(-1).numpy()
        return np.where(logits.argmax(-1) == labels, sure, -math.inf)

    def more_results(
        self, found: Mapping[str, Any], history: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        return {
            "confusion_matrix": found["confusion_matrix"],
            "time_to_accuracy": time_to_accuracy(history),
        }


class MultiLabel(Problem):
    """The best epoch has the highest micro F1: it counts every decision alike, and does not reward
    a model that gives no label, as accuracy would where labels are rare."""

    measure = Measure("label_accuracy", "micro_f1", "labels right", "micro F1")
    metrics_class = MultiLabelMetrics
    purpose = "says which of these a text has: {labels}"
    card_metrics = (
        ("micro F1", "micro_f1", "f1"),
        ("macro F1", "macro_f1", "f1"),
        ("micro average precision", "micro_average_precision", "average_precision"),
    )

    def loss(self, logits: Tensor, labels: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
        """The mean over labels, as transformers has it."""
        each = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        return each.mean(-1).sum(), ((logits >= 0) == labels.bool()).float().mean(-1).sum()

    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> MultiLabelMetrics:
        return multilabel_metrics(logits, labels)

    def format(self, metrics: MultiLabelMetrics, names: Sequence[str]) -> str:
        return format_multilabel(metrics, names)

    def scores(self, logits: Tensor) -> Tensor:
        return logits.double().sigmoid()

    def prediction(self, names: Sequence[str], scores: Sequence[float]) -> MultiLabelPrediction:
        given = tuple(name for name, p in zip(names, scores, strict=True) if p >= 0.5)
        return MultiLabelPrediction(given, dict(zip(names, scores, strict=True)))

    def columns(
        self, names: Sequence[str], scores: np.ndarray, every: bool
    ) -> dict[str, np.ndarray]:
        """The labels as the reader of files takes them."""
        given = [SEPARATOR.join(np.array(names, dtype=object)[row >= 0.5]) for row in scores]
        found = {"predicted_labels": np.array(given, dtype=object)}
        return found | (_every(names, scores) if every else {})

    def decision(self, logits: Tensor) -> tuple[int, int | None]:
        return int(logits.argmax()), None

    def sureness(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        right = ((logits >= 0) == labels.astype(bool)).all(-1)
        return np.where(right, np.abs(logits).min(-1), -math.inf)


class Regression(Problem):
    """The best epoch has the lowest RMSE on validation texts: what is trained for. Correlations
    would be undefined for a model that still says one number."""

    measure = Measure("absolute_error", "rmse", "abs error", "RMSE", is_share=False)
    metrics_class = RegressionMetrics
    purpose = "fits a number to a text: {labels}"
    card_metrics = (
        ("RMSE", "rmse", "rmse"),
        ("Pearson", "pearson", "pearsonr"),
        ("Spearman", "spearman", "spearmanr"),
    )

    def loss(self, logits: Tensor, labels: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
        error = logits - labels
        return error.square().mean(-1).sum(), error.abs().mean(-1).sum()

    def prepare(self, last: nn.Linear, labels: np.ndarray) -> None:
        """The mean of the labels as bias: steps would reach it slowly where it is far from 0."""
        with torch.no_grad():
            last.bias.copy_(torch.from_numpy(labels.mean(0, dtype=np.float64)))

    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> RegressionMetrics:
        return regression_metrics(logits, labels)

    def format(self, metrics: RegressionMetrics, names: Sequence[str]) -> str:
        return format_regression(metrics, names)

    def scores(self, logits: Tensor) -> Tensor:
        return logits.double()

    def prediction(self, names: Sequence[str], scores: Sequence[float]) -> NumberPrediction:
        return NumberPrediction(scores[0])

    def columns(
        self, names: Sequence[str], scores: np.ndarray, every: bool
    ) -> dict[str, np.ndarray]:
        return {"predicted_value": scores[:, 0]}

    def decision(self, logits: Tensor) -> tuple[int, int | None]:
        return 0, None

    def probability(self, logits: Tensor, target: int) -> float | None:
        return None

    def sureness(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        return -np.abs(logits - labels)[:, 0]


def _every(names: Sequence[str], scores: np.ndarray) -> dict[str, np.ndarray]:
    return {f"probability_{name}": scores[:, i] for i, name in enumerate(names)}


PROBLEMS: dict[str, Problem] = {
    SINGLE_LABEL: SingleLabel(),
    MULTI_LABEL: MultiLabel(),
    REGRESSION: Regression(),
}
