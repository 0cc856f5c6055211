"""The report's part on regression: predicted against true numbers, and the largest errors."""

from __future__ import annotations

import numpy as np

from fasttx.reporting import attributions, explain, page, plots
from fasttx.reporting.finished import FinishedRun
from fasttx.reporting.pages import MISTAKES, Pages, Tile, attention_section, explainable, named
from fasttx.training.predictions import Predictions
from fasttx.training.regression_metrics import number_or_dash


def headline(run: FinishedRun) -> tuple[str, str]:
    """A sentence, and a short form for the title."""
    m = run.metrics
    return f"RMSE {m.rmse:.4f} on {m.n:,} test texts", f"RMSE {m.rmse:.4f}"


def tiles(run: FinishedRun) -> list[Tile]:
    r, m = run.results, run.metrics
    return [
        ("RMSE", f"{m.rmse:.4f}", f"{m.n:,} test texts"),
        ("validation RMSE", f"{r['val_rmse']:.4f}", f"epoch {r['best_epoch']}, chosen"),
        ("mean absolute error", f"{m.mean_absolute_error:.4f}", f"of {named(run)[0]}"),
        ("Pearson", number_or_dash(m.pearson), "correlation with the true numbers"),
        ("Spearman", number_or_dash(m.spearman), "correlation of the ranks"),
        ("R^2", number_or_dash(m.r2), "1: no error; 0: as good as the mean"),
    ]


def sections(out: Pages, run: FinishedRun) -> None:
    if run.predictions is None:
        return
    _scatter(out, run, run.predictions)
    if run.texts is not None and run.lengths is not None:
        _errors(out, run, run.predictions, run.texts, run.lengths)


def _scatter(out: Pages, run: FinishedRun, predictions: Predictions) -> None:
    predicted, true = predictions.logits[:, 0].astype(np.float64), predictions.labels[:, 0]
    error = predicted - true
    low, high = np.quantile(error, [0.05, 0.95])
    heading = f"Nine of ten errors lie between {low:+.3f} and {high:+.3f}; their mean is "
    heading += f"{error.mean():+.3f}"
    drawn = out.draw("predicted-against-true", heading, plots.predicted_against_true, predicted,
                     true, run.names[0])  # fmt: skip
    caption = (
        "Each dot is a test text. A cloud that is flatter than the dashed line means numbers that "
        "are too close to the mean."
    )
    out.add("errors", "Predicted against true", heading, page.figure(drawn, caption))


def _errors(
    out: Pages, run: FinishedRun, predictions: Predictions, texts: list[str], lengths: np.ndarray
) -> None:
    error = np.abs(predictions.logits - predictions.labels)[:, 0]
    among = np.flatnonzero(explainable(run, lengths))
    shown = among[np.argsort(-error[among], kind="stable")][:MISTAKES].tolist()
    explained = [attributions.explain(run.model, texts[i]) for i in shown]
    articles = [
        explain.article(found, f"true number {predictions.labels[i, 0]:.4g}, test text {i:,}")
        for i, found in zip(shown, explained, strict=True)
    ]
    heading = "No text is short enough to be explained"
    if shown:
        heading = (
            f"The {len(shown)} largest errors: {error[shown[0]]:.3f} to {error[shown[-1]]:.3f}"
        )
    note = [page.paragraph(explain.ATTRIBUTION_NOTE)] if articles else []
    out.add("mistakes", "Largest errors", heading, *note, *articles)
    if explained:
        attention_section(out, run, [("wrong", "The largest error", explained[0])])
