"""How good fitted numbers are: errors, and correlations with the true ones. Shapes: n texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fasttx.terminal import one_line
from fasttx.training.metrics import checked_logits


@dataclass(frozen=True, eq=False)
class RegressionMetrics:
    """The correlations are None where they are undefined: where all predictions or all true
    numbers are equal. So is R^2 where all true numbers are."""

    n: int
    loss: float  # mean squared error
    rmse: float  # its root
    mean_absolute_error: float
    r2: float | None  # 1 - squared error / squared deviation of the true numbers from their mean
    pearson: float | None
    spearman: float | None  # Pearson's of the ranks, equal numbers sharing their mean rank

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        return dataclasses.asdict(self)


def regression_metrics(logits: ArrayLike, labels: ArrayLike) -> RegressionMetrics:
    """Metrics of the predicted numbers `logits` (n, 1) against the true ones `labels` (n, 1).

    Computed in float64. Raises ValueError for shapes or numbers that cannot be measured.
    """
    found, truth = checked_logits(np.asarray(logits)), np.asarray(labels, dtype=np.float64)
    if found.shape[1] != 1 or truth.shape != found.shape:
        raise ValueError(
            f"logits have shape {found.shape} and labels {truth.shape}; expected one number a text"
        )
    if not np.isfinite(truth).all():
        raise ValueError("labels hold NaN or infinity; expected finite numbers")
    x, y = found[:, 0], truth[:, 0]
    error = x - y
    squared = float((error**2).mean())
    spread = float(((y - y.mean()) ** 2).mean())
    return RegressionMetrics(
        n=len(x),
        loss=squared,
        rmse=squared**0.5,
        mean_absolute_error=float(np.abs(error).mean()),
        r2=1 - squared / spread if np.ptp(y) else None,
        pearson=_correlation(x, y),
        spearman=_correlation(_ranks(x), _ranks(y)),
    )


def _correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Pearson's; None where x or y is constant."""
    if not np.ptp(x) or not np.ptp(y):
        return None
    x, y = x - x.mean(), y - y.mean()
    # Each by its own length, for the product of very small numbers would be 0.
    return float(np.clip((x / np.linalg.norm(x)) @ (y / np.linalg.norm(y)), -1.0, 1.0))


def _ranks(x: np.ndarray) -> np.ndarray:
    """(n,) float64: 1 for the least number; equal numbers have the mean of their ranks."""
    _, group, counts = np.unique(x, return_inverse=True, return_counts=True)
    ranks: np.ndarray = (counts.cumsum() - (counts - 1) / 2)[group]
    return ranks


def format_regression(metrics: RegressionMetrics, label_names: Sequence[str]) -> str:
    """The metrics as text, some lines long."""
    return "\n".join(
        [
            f"texts                {metrics.n}",
            f"number               {one_line(label_names[0])}",
            f"RMSE                 {metrics.rmse:.4f}",
            f"mean absolute error  {metrics.mean_absolute_error:.4f}",
            f"Pearson              {number_or_dash(metrics.pearson)}",
            f"Spearman             {number_or_dash(metrics.spearman)}",
            f"R^2                  {number_or_dash(metrics.r2)}",
        ]
    )


def number_or_dash(value: float | None) -> str:
    """A number, or - where it is undefined."""
    return "-" if value is None else f"{value:.4f}"
