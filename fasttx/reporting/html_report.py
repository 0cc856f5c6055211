"""The page of a finished run, and its pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fasttx.config import ModelConfig, TrainConfig
from fasttx.reporting import attributions, explain, findings, page, plots
from fasttx.reporting.attributions import Explanation
from fasttx.reporting.escaping import escaped
from fasttx.reporting.findings import percent
from fasttx.reporting.finished import FinishedRun
from fasttx.text.duplicates import duplicates_text, overlap_warning
from fasttx.text.labels import single_class_warning
from fasttx.training.metrics import Metrics
from fasttx.training.predictions import Predictions
from fasttx.training.progress import clock
from fasttx.training.results import time_to_accuracy

MISTAKES = 8
MOST_WINDOWS = 20  # of a mistake that is explained: more would take minutes each
LONGEST_NAME = 60  # characters of a label


@dataclass
class Pages:
    """The sections of a page, and its pictures by name; filled section by section."""

    sections: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    pictures: dict[str, plots.Picture] = field(default_factory=dict)

    def add(self, anchor: str, kicker: str, heading: str, *content: str) -> None:
        self.sections.append(page.section(anchor, kicker, heading, *content))
        self.links.append(f'<a href="#{anchor}">{escaped(kicker)}</a>')

    def draw(self, name: str, alt: str, draw: Callable[..., Any], *data: Any) -> plots.Picture:
        self.pictures[name] = plots.picture(name, alt, draw, *data)
        return self.pictures[name]


def build(run: FinishedRun) -> tuple[str, dict[str, plots.Picture]]:
    """The page, and its pictures by name. Raises PlotsError if matplotlib is missing."""
    out = Pages()
    _curves(out, run)
    _confusion(out, run)
    if run.predictions is not None:
        _calibration(out, run.predictions)
        if run.texts is not None and run.lengths is not None:
            _lengths(out, run.predictions, run.lengths, run.config.train)
            _texts(out, run, run.predictions, run.texts, run.lengths)
    _throughput(out, run)
    _configuration(out, run)

    name, metrics = str(run.config.dataset["name"]), run.metrics
    dataset = run.config.dataset
    warnings = single_class_warning(dataset["label_counts"]), overlap_warning(dataset)
    alarms = [page.alarm(text) for text in (*warnings, *run.notes) if text]
    head = [
        f'<p class="kicker">{escaped(f"fasttx, run {run.folder.path.resolve().name}")}</p>',
        f"<h1>{escaped(name)}: {escaped(findings.accuracy_sentence(metrics))}</h1>",
        *alarms,
        page.tiles(_tiles(run)),
        f"<nav>{''.join(out.links)}</nav>",
    ]
    title = f"{name}: {percent(metrics.accuracy, 2)}"
    return page.document(title, "\n".join([*head, *out.sections, _footer(run)])), out.pictures


def _tiles(run: FinishedRun) -> list[tuple[str, str, str]]:
    r, metrics = run.results, run.metrics
    reached = time_to_accuracy(r["history"])
    first = [
        ("test accuracy", percent(metrics.accuracy, 2), f"{metrics.n:,} texts"),
        ("validation accuracy", percent(r["val_accuracy"], 2), f"epoch {r['best_epoch']}, chosen"),
        ("macro F1", percent(metrics.macro_f1, 2), _labels_text(metrics)),
        ("calibration error", percent(metrics.expected_calibration_error), "expected, 15 bins"),
        ("training", clock(r["seconds"]), f"{r['samples_per_second']:,.1f} samples/s"),
    ]
    targets = [
        (f"training until {percent(float(target), 0)}",
         clock(s) if s is not None else "not reached", "validation accuracy")
        for target, s in reached.items()
    ]  # fmt: skip
    return [
        *first,
        *targets,
        ("parameters", f"{r['parameters']:,}", f"backend {r['attn_backend']}"),
    ]


def _labels_text(metrics: Metrics) -> str:
    absent = int((metrics.support == 0).sum())
    more = f"; {absent:,} without a text count as 0" if absent else ""
    return f"{len(metrics.support):,} labels{more}"


def _curves(out: Pages, run: FinishedRun) -> None:
    history, best = run.results["history"], run.results["best_epoch"]
    heading = findings.curves_sentence(history, best)
    train = run.config.train
    measures = [
        text
        for text, there in (
            (f"dropout {train.model.dropout_text}", train.model.dropout),
            (f"word dropout {train.word_dropout:g}", train.word_dropout),
            (f"label smoothing {train.label_smoothing:g}", train.label_smoothing),
        )
        if there
    ]
    caption = (
        f"Training figures are taken while the weights move, with {', '.join(measures)}; those of "
        "validation with none of it, so training may look worse than it is."
        if measures
        else "Training figures are taken while the weights move."
    )
    drawn = out.draw("learning-curves", heading, plots.learning_curves, run.rows,
                     run.steps_per_epoch, best)  # fmt: skip
    rows = [
        [str(e["epoch"]) + (" (chosen)" if e["epoch"] == best else ""), f"{e['train_loss']:.4f}",
         percent(e["train_accuracy"], 2), f"{e['val_loss']:.4f}", percent(e["val_accuracy"], 2),
         clock(e["seconds"]), f"{e['samples_per_second']:,.1f}"]
        for e in history
    ]  # fmt: skip
    names = ("epoch", "train loss", "train accuracy", "val loss", "val accuracy", "time",
             "samples/s")  # fmt: skip
    out.add("curves", "Learning curves", heading, page.figure(drawn, caption),
            page.table(names, rows))  # fmt: skip


def _confusion(out: Pages, run: FinishedRun) -> None:
    metrics, names = run.metrics, [plots.shortened(name, LONGEST_NAME) for name in run.names]
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
    shown = findings.confident_mistakes(predictions, MISTAKES, _explainable(run, lengths))
    explained = {int(i): attributions.explain(run.model, texts[i]) for i in shown}
    articles = [
        explain.article(
            found,
            f"true label {plots.shortened(run.names[predictions.labels[i]], LONGEST_NAME)}, "
            f"test text {i:,}",
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
    maps = [
        explain.attention(out.draw, f"attention-{key}", what, found) for key, what, found in chosen
    ]
    if any(maps):
        size = run.config.train.model
        heading = f"Where {size.num_layers} layers of {size.num_heads} heads look, in two texts"
        if len(maps) == 1:
            heading = heading.replace("two texts", "one text")
        out.add(
            "attention", "Attention maps", heading, page.paragraph(explain.ATTENTION_NOTE), *maps
        )


def _explainable(run: FinishedRun, lengths: np.ndarray) -> np.ndarray:
    """(n,) bool: the texts that are not read in very many windows."""
    train = run.config.train
    most = MOST_WINDOWS * train.model.max_len
    return (lengths <= most) | (train.long_texts != "windows")


def _throughput(out: Pages, run: FinishedRun) -> None:
    r = run.results
    seconds, rates = findings.throughput(run.rows, run.samples_per_epoch, run.samples_per_step)
    heading = (
        f"{r['samples_per_second']:,.1f} samples/s on average; {clock(r['seconds'])} of training"
    )
    drawn = out.draw("throughput", heading, plots.throughput, seconds, rates,
                     r["samples_per_second"])  # fmt: skip
    where = r["hardware"].get("gpu") or r["hardware"].get("cpu")
    caption = (
        f"On {where}, {r['device']}, {r['precision']}; peak memory {r['peak_memory_mb']:,.0f} MB."
    )
    out.add("throughput", "Throughput", heading, page.figure(drawn, caption))


def _configuration(out: Pages, run: FinishedRun) -> None:
    """All settings by group; first those that differ from the defaults."""
    t = run.config.train
    changed: list[list[str]] = []
    kept: list[list[str]] = []
    for config, cls in ((t, TrainConfig), (t.model, ModelConfig)):
        for f in dataclasses.fields(cls):
            if "group" in f.metadata:
                row = [f.metadata["group"], f.name.replace("_", "-"), str(getattr(config, f.name))]
                (kept if getattr(config, f.name) == f.default else changed).append(row)
    order: Mapping[str, int] = {
        g: i for i, g in enumerate(("data", "model", "optimisation", "run"))
    }
    both: Sequence[list[list[str]]] = [
        sorted(rows, key=lambda row: order.get(row[0], len(order))) for rows in (changed, kept)
    ]
    head = ("group", "setting", "value")
    counts = run.config.dataset["label_counts"]
    splits = [[name, *(f"{counts[split][name]:,}" for split in counts)] for name in run.names]
    repeated = duplicates_text(run.config.dataset)
    recipe = f"Recipe {run.config.recipe}" if run.config.recipe else "Configuration"
    heading = f"{recipe}, seed {t.seed}: {len(changed)} settings differ from the defaults"
    out.add(
        "configuration", "Configuration", heading,
        page.table(head, both[0], numbers=False),
        f"<details><summary>{len(kept)} settings at their defaults</summary>"
        f"{page.table(head, both[1], numbers=False)}</details>",
        "<h3>Texts by split and label</h3>", page.table(("label", *counts), splits),
        *([page.paragraph(f"{repeated[0].upper()}{repeated[1:]}.")] if repeated else []),
    )  # fmt: skip


def _footer(run: FinishedRun) -> str:
    versions = ", ".join(f"{name} {v}" for name, v in run.results["versions"].items())
    hardware = ", ".join(f"{name} {v}" for name, v in run.results["hardware"].items())
    return f"<footer>{page.paragraph(f'Trained with {versions}; {hardware}.')}</footer>"
