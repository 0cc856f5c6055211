"""The report's part on multi-label classification: scores by label, and the worst texts."""

from __future__ import annotations

import numpy as np

from fasttx.reporting import attributions, explain, page, plots
from fasttx.reporting.findings import percent
from fasttx.reporting.finished import FinishedRun
from fasttx.reporting.pages import MISTAKES, Pages, Tile, attention_section, explainable, named
from fasttx.training.predictions import Predictions

MOST_LABELS = 40  # in the picture; the table has all


def headline(run: FinishedRun) -> tuple[str, str]:
    """A sentence, and a short form for the title."""
    m = run.metrics
    short = f"micro F1 {percent(m.micro_f1, 2)}"
    return f"{short}, macro F1 {percent(m.macro_f1, 2)} on {m.n:,} test texts", short


def tiles(run: FinishedRun) -> list[Tile]:
    r, m = run.results, run.metrics
    return [
        ("micro F1", percent(m.micro_f1, 2), f"{m.n:,} test texts"),
        ("validation micro F1", percent(r["val_micro_f1"], 2), f"epoch {r['best_epoch']}, chosen"),
        ("macro F1", percent(m.macro_f1, 2), f"{len(m.support):,} labels"),
        ("average precision", _share(m.micro_average_precision),
         f"micro; macro {_share(m.macro_average_precision)}"),
        ("every label right", percent(m.subset_accuracy, 2), "of the texts"),
        ("labels right", percent(m.label_accuracy, 2), "of all decisions"),
    ]  # fmt: skip


def sections(out: Pages, run: FinishedRun) -> None:
    _labels(out, run)
    if run.predictions is not None and run.texts is not None and run.lengths is not None:
        _mistakes(out, run, run.predictions, run.texts, run.lengths)


def _share(value: float | None) -> str:
    return "-" if value is None or np.isnan(value) else percent(value)


def _labels(out: Pages, run: FinishedRun) -> None:
    m, names = run.metrics, named(run)
    there = np.flatnonzero(m.support)
    heading = "No test text has a label"
    if len(there):
        worst, best = there[m.f1[there].argmin()], there[m.f1[there].argmax()]
        low, high = percent(m.f1[worst]), percent(m.f1[best])
        heading = f"F1 is between {low} ({names[worst]}) and {high} ({names[best]})"
    shown = np.sort(np.argsort(-m.support, kind="stable")[:MOST_LABELS])
    drawn = out.draw("labels", heading, plots.label_scores, [names[i] for i in shown], m.f1[shown],
                     m.average_precision[shown])  # fmt: skip
    left = len(names) - len(shown)
    caption = (
        "A text gets a label where its probability is at least 0.5. Average precision needs no "
        "threshold: the mean over the texts with the label of the precision at the score of each. "
        "A label that no test text has has none (-), and the macro mean leaves it out."
        + (f" The {left:,} labels with fewer texts are in the table only." if left else "")
    )
    rows = [
        [names[i], *map(percent, (float(m.precision[i]), float(m.recall[i]), float(m.f1[i]))),
         _share(float(m.average_precision[i])), f"{m.support[i]:,}"]
        for i in range(len(names))
    ]  # fmt: skip
    head = ("label", "precision", "recall", "F1", "average precision", "texts")
    out.add("labels", "Labels", heading, page.figure(drawn, caption), page.table(head, rows))


def _mistakes(
    out: Pages, run: FinishedRun, predictions: Predictions, texts: list[str], lengths: np.ndarray
) -> None:
    """The texts with the most confident wrong decision, which is explained."""
    logits, truth = predictions.logits, predictions.labels.astype(bool)
    wrong = np.where((logits >= 0) != truth, np.abs(logits), 0.0)  # (n, C): how far it is off
    count = int((wrong.max(1) > 0).sum())
    worst = np.where(explainable(run, lengths), wrong.max(1), 0.0)
    shown = [int(i) for i in np.argsort(-worst, kind="stable")[:MISTAKES] if worst[i] > 0]
    names = named(run)
    articles, explained = [], []
    for i in shown:
        label = int(wrong[i].argmax())
        found = attributions.explain(run.model, texts[i], label)
        true = ", ".join(names[c] for c in np.flatnonzero(truth[i])) or "none"
        kind = "which the text has" if truth[i, label] else "which the text does not have"
        about = f"label {names[label]}, {kind}; true labels: {true}; test text {i:,}"
        articles.append(explain.article(found, about))
        explained.append(found)
    heading = f"{count:,} of {len(texts):,} texts have a wrong decision"
    if shown:
        heading += f"; the {len(shown)} most confident ones"
    note = [page.paragraph(explain.ATTRIBUTION_NOTE)] if articles else []
    out.add("mistakes", "Mistakes", heading, *note, *articles)
    if explained:
        attention_section(out, run, [("wrong", "The most confident mistake", explained[0])])
