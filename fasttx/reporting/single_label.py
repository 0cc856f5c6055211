"""The report's part on single-label classification: confusion, labels, reliability, mistakes."""

from __future__ import annotations

import numpy as np

from fasttx.config import TrainConfig
from fasttx.reporting import attributions, explain, findings, page, plots
from fasttx.reporting.attributions import Explanation
from fasttx.reporting.findings import percent
from fasttx.reporting.finished import FinishedRun
from fasttx.reporting.pages import MISTAKES, Pages, Tile, attention_section, explainable, named
from fasttx.training.metrics import Metrics
from fasttx.training.predictions import Predictions
from fasttx.training.progress import clock
from fasttx.training.results import time_to_accuracy


def headline(run: FinishedRun) -> tuple[str, str]:
    """A sentence, and a short form for the title."""
    return findings.accuracy_sentence(run.metrics), percent(run.metrics.accuracy, 2)


def tiles(run: FinishedRun) -> list[Tile]:
    r, metrics = run.results, run.metrics
    reached = time_to_accuracy(r["history"])
    return [
        ("test accuracy", percent(metrics.accuracy, 2), f"{metrics.n:,} texts"),
        ("validation accuracy", percent(r["val_accuracy"], 2), f"epoch {r['best_epoch']}, chosen"),
        ("macro F1", percent(metrics.macro_f1, 2), _labels_text(metrics)),
        ("calibration error", percent(metrics.expected_calibration_error), "expected, 15 bins"),
        *(
            (f"training until {percent(float(target), 0)}",
             clock(s) if s is not None else "not reached", "validation accuracy")
            for target, s in reached.items()
        ),
    ]  # fmt: skip


def _labels_text(metrics: Metrics) -> str:
    absent = int((metrics.support == 0).sum())
    more = f"; {absent:,} without a text count as 0" if absent else ""
    return f"{len(metrics.support):,} labels{more}"


def sections(out: Pages, run: FinishedRun) -> None:
    _confusion(out, run)
    if run.predictions is not None:
        _calibration(out, run.predictions)
        if run.texts is not None and run.lengths is not None:
            _lengths(out, run.predictions, run.lengths, run.config.train)
            _texts(out, run, run.predictions, run.texts, run.lengths)


def _confusion(out: Pages, run: FinishedRun) -> None:
    metrics, names = run.metrics, named(run)
    heading = findings.confusion_sentence(metrics, names)
    drawn = out.draw("confusion-matrix", heading, plots.confusion, metrics, names)
    more = ""
    if len(names) > plots.MOST_LABELS:
        more = f" Of {len(names):,} labels, the {plots.MOST_LABELS} with the most texts are shown."
    width = f"{min(62, 20 + 3 * len(names))}rem"
    caption = "Shade and percentage: the share of all texts with the true label of the row." + more
    out.add("confusion", "Confusion matrix", heading, page.figure(
        drawn, caption, "18rem" if len(names) <= plots.MOST_CELLS else "34rem", width))  # fmt: skip
    rows = [
        [name, *map(percent, map(float, scores)), f"{support:,}"]
        for name, *scores, support in zip(
            names, metrics.precision, metrics.recall, metrics.f1, metrics.support, strict=True
        )
    ]
    head = ("label", "precision", "recall", "F1", "texts")
    out.add("classes", "Labels", findings.classes_sentence(metrics, names),
            page.table(head, rows))  # fmt: skip


def _calibration(out: Pages, predictions: Predictions) -> None:
    heading = findings.calibration_sentence(predictions)
    drawn = out.draw("reliability", heading, plots.reliability_diagram,
                     findings.reliability(predictions))  # fmt: skip
    caption = (
        "Bars above: the share of right answers among texts of like confidence, with 95 % Wilson "
        "intervals; on the diagonal confidence can be taken at its word. Expected calibration "
        "error: the mean distance from it, weighted by texts, over 15 bins of equal width "
        "(Guo et al., 2017)."
    )
    out.add("calibration", "Reliability", heading, page.figure(drawn, caption, "22rem", "40rem"))


def _lengths(
    out: Pages, predictions: Predictions, lengths: np.ndarray, config: TrainConfig
) -> None:
    heading = findings.length_sentence(lengths, predictions.correct)
    of = "one window" if config.long_texts == "windows" else "what is read"
    bins = findings.by_length(lengths, predictions.correct)
    drawn = out.draw(
        "accuracy-by-length", heading, plots.accuracy_by_length, bins, config.model.max_len, of
    )
    caption = (
        "Bins of about equally many texts, by words of the whole text (punctuation marks "
        "count as words); bars are 95 % Wilson intervals."
    )
    out.add("length", "Accuracy by length", heading, page.figure(drawn, caption))


def _texts(
    out: Pages, run: FinishedRun, predictions: Predictions, texts: list[str], lengths: np.ndarray
) -> None:
    """The mistakes with shaded words, and the attention maps of two texts."""
    if len(run.names) < 2:
        return
    shown = findings.confident_mistakes(predictions, MISTAKES, explainable(run, lengths))
    explained = {int(i): attributions.explain(run.model, texts[i]) for i in shown}
    articles = [
        explain.article(
            found,
            f"true label {named(run)[predictions.labels[i]]}, test text {i:,}",
        )
        for i, found in explained.items()
    ]
    note = [page.paragraph(explain.ATTRIBUTION_NOTE)] if articles else []
    heading = findings.mistakes_sentence(predictions, shown)
    out.add("mistakes", "Mistakes", heading, *note, *articles)

    chosen: list[tuple[str, str, Explanation]] = []
    sure = findings.shortest_confident_answer(predictions, lengths)
    if sure is not None:
        what = "The shortest of the most confident right answers"
        chosen.append(("right", what, attributions.explain(run.model, texts[sure])))
    if len(shown):
        what = "The most confident mistake"
        chosen.append(("wrong", what, explained[int(shown[0])]))
    attention_section(out, run, chosen)
