"""The numbers and the sentences of a report, from the predictions and the history of a run.

A sentence claims a difference only where a test of the numbers supports it. Shapes: n texts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fasttx.training.measures import ACCURACY, Measure
from fasttx.training.metrics import CALIBRATION_BINS, Metrics, calibration_bins
from fasttx.training.predictions import Predictions

Z95 = 1.959963984540054  # the standard normal holds 95 % between -z and z


def wilson(right: ArrayLike, n: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of a proportion of `right` in `n` (n > 0), elementwise.

    Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 22 (1927).
    """
    k, n = np.asarray(right, dtype=np.float64), np.asarray(n, dtype=np.float64)
    p, z2 = k / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * np.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return np.maximum(centre - half, 0.0), np.minimum(centre + half, 1.0)


@dataclass(frozen=True, eq=False)
class Reliability:
    """Accuracy by bin of confidence, without empty bins; arrays (bins,)."""

    low: np.ndarray  # edges
    high: np.ndarray
    count: np.ndarray
    confidence: np.ndarray  # mean
    accuracy: np.ndarray


def reliability(predictions: Predictions) -> Reliability:
    """The reliability diagram of Guo et al. (2017): 15 bins of equal width on [0, 1]."""
    bins = calibration_bins(predictions.confidence)

    def total(weights: np.ndarray | None = None) -> np.ndarray:
        return np.bincount(bins, weights, minlength=CALIBRATION_BINS)

    count = total()
    held = np.flatnonzero(count)
    return Reliability(
        held / CALIBRATION_BINS,
        (held + 1) / CALIBRATION_BINS,
        count[held],
        total(predictions.confidence)[held] / count[held],
        total(predictions.correct)[held] / count[held],
    )


@dataclass(frozen=True, eq=False)
class LengthBins:
    """Accuracy by length in words, about equally many texts a bin; arrays (bins,)."""

    shortest: np.ndarray
    longest: np.ndarray
    count: np.ndarray
    right: np.ndarray

    @property
    def accuracy(self) -> np.ndarray:
        share: np.ndarray = self.right / self.count
        return share


def by_length(lengths: np.ndarray, correct: np.ndarray, bins: int = 8) -> LengthBins:
    """Texts of equal length share a bin, so there may be fewer than `bins`."""
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, bins + 1)[1:-1], method="lower"))
    member = np.searchsorted(edges, lengths)  # bin i holds (edges[i - 1], edges[i]]
    held = np.unique(member)
    return LengthBins(
        np.array([lengths[member == m].min() for m in held]),
        np.array([lengths[member == m].max() for m in held]),
        np.array([(member == m).sum() for m in held]),
        np.array([correct[member == m].sum() for m in held]),
    )


def confident_mistakes(
    predictions: Predictions, count: int, among: np.ndarray | None = None
) -> np.ndarray:
    """Indices of at most `count` wrong answers, the most confident first; of the texts `among` (n,)
    bool, if given."""
    wrong = np.flatnonzero(~predictions.correct if among is None else ~predictions.correct & among)
    return wrong[np.argsort(-predictions.confidence[wrong], kind="stable")][:count]


def shortest_confident_answer(predictions: Predictions, lengths: np.ndarray) -> int | None:
    """The shortest text of several words among the most confident tenth of the right answers."""
    right = np.flatnonzero(predictions.correct & (lengths > 1))
    if not len(right):
        return None
    sure = right[predictions.confidence[right] >= np.quantile(predictions.confidence[right], 0.9)]
    return int(sure[np.argmin(lengths[sure])])


# --- sentences ------------------------------------------------------------------------------------


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def accuracy_sentence(metrics: Metrics) -> str:
    hits = int(np.trace(metrics.confusion_matrix))
    low, high = (percent(float(x)) for x in wilson(hits, metrics.n))
    return (
        f"{percent(metrics.accuracy, 2)} of {metrics.n:,} test texts are right "
        f"(95 % interval {low} to {high})"
    )


def shown(measure: Measure, value: float) -> str:
    """A share in per cent, an error as a number."""
    return percent(value, 2) if measure.is_share else f"{value:.4f}"


def curves_sentence(
    history: Sequence[Mapping[str, Any]], best_epoch: int, measure: Measure = ACCURACY
) -> str:
    best = next(row for row in history if row["epoch"] == best_epoch)
    value = shown(measure, best[f"val_{measure.chosen}"])
    reached = f"validation {measure.chosen_title} {value}"
    if len(history) == 1:
        return f"One epoch: {reached}"
    said = f"Epoch {best_epoch} of {len(history)} is the best: {reached}"
    losses = [row["val_loss"] for row in history]
    lowest = int(np.argmin(losses))
    falling = history[-1]["train_loss"] < history[lowest]["train_loss"]
    if lowest < len(history) - 1 and falling:
        said += f"; after epoch {history[lowest]['epoch']} the validation loss rises (overfitting)"
    return said


def confusion_sentence(metrics: Metrics, names: Sequence[str]) -> str:
    wrong = metrics.confusion_matrix.copy()
    np.fill_diagonal(wrong, 0)
    if not wrong.any():
        return f"No mistake among {metrics.n:,} texts"
    row, column = map(int, np.unravel_index(wrong.argmax(), wrong.shape))
    count = int(wrong[row, column])
    share = count / int(metrics.support[row])
    return (
        f"Most often, {names[row]} is taken for {names[column]}: {count:,} times, "
        f"{percent(share)} of all {names[row]}"
    )


def classes_sentence(metrics: Metrics, names: Sequence[str]) -> str:
    there = np.flatnonzero(metrics.support)
    worst = there[metrics.f1[there].argmin()]
    best = there[metrics.f1[there].argmax()]
    low, high = percent(metrics.f1[worst]), percent(metrics.f1[best])
    if low == high:
        return f"F1 is {low} for every label"
    return f"F1 is between {low} ({names[worst]}) and {high} ({names[best]})"


def calibration_sentence(predictions: Predictions) -> str:
    """Over- or underconfident if the mean confidence is outside the 95 % interval of accuracy."""
    right, n = int(predictions.correct.sum()), len(predictions)
    low, high = wilson(right, n)
    mean, accuracy = float(predictions.confidence.mean()), right / n
    error = percent(predictions.metrics.expected_calibration_error)
    if float(low) <= mean <= float(high):
        return f"Confidence fits accuracy on average ({percent(mean)}); calibration error {error}"
    kind = "Overconfident" if mean > accuracy else "Underconfident"
    return (
        f"{kind}: {percent(mean)} sure on average, {percent(accuracy)} right; "
        f"calibration error {error}"
    )


def length_sentence(lengths: np.ndarray, correct: np.ndarray) -> str:
    """The longer half against the shorter; a two-proportion z-test at 5 % decides the sentence."""
    middle = float(np.median(lengths))
    long = lengths > middle
    n1, n0 = int(long.sum()), int((~long).sum())
    if not n1 or not n0:
        return "All texts are about equally long"
    p1, p0 = float(correct[long].mean()), float(correct[~long].mean())
    pooled = float(correct.mean())
    error = math.sqrt(pooled * (1 - pooled) * (1 / n1 + 1 / n0))
    halves = (
        f"{percent(p1)} of the longer half are right, {percent(p0)} of the shorter "
        f"(up to {middle:.0f} words)"
    )
    if abs(p1 - p0) <= Z95 * error:
        return f"Length makes no difference that {len(lengths):,} texts could show: {halves}"
    return f"Longer texts are {'easier' if p1 > p0 else 'harder'}: {halves}"


def mistakes_sentence(predictions: Predictions, shown: np.ndarray) -> str:
    wrong = int((~predictions.correct).sum())
    if not wrong:
        return "No mistake to show"
    if not len(shown):
        return f"{wrong:,} mistakes, all of them on texts too long to be explained"
    first, last = predictions.confidence[shown[0]], predictions.confidence[shown[-1]]
    if len(shown) == 1:
        return f"The most confident of {wrong:,} mistakes: {percent(first)} sure"
    return (
        f"The {len(shown)} most confident of {wrong:,} mistakes: "
        f"{percent(first)} to {percent(last)} sure"
    )


# --- throughput -----------------------------------------------------------------------------------


def throughput(
    rows: Sequence[Mapping[str, Any]], samples_per_epoch: int, samples_per_step: int
) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of training at the end of each interval of metrics.jsonl, and samples/s in it.

    A line has the rate since its epoch began. The rate and the step give the seconds, and these
    give the rate of each interval.
    """
    steps_per_epoch = -(-samples_per_epoch // samples_per_step)
    ends, rates = [], []
    begun = done = 0.0  # seconds before this epoch; seconds of this epoch at the last line
    seen = 0  # samples of this epoch at the last line
    for row in rows:
        at_end = row["kind"] == "epoch"
        step = steps_per_epoch if at_end else row["step"] - steps_per_epoch * (row["epoch"] - 1)
        samples = min(step * samples_per_step, samples_per_epoch)
        seconds = samples / row["samples_per_second"]
        if samples > seen and seconds > done:
            ends.append(begun + seconds)
            rates.append((samples - seen) / (seconds - done))
        seen, done = samples, seconds
        if at_end:
            begun, seen, done = begun + seconds, 0, 0.0
    return np.array(ends), np.array(rates)
