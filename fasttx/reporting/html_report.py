"""The page of a finished run, and its pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from fasttx.config import MULTI_LABEL, REGRESSION, SINGLE_LABEL, ModelConfig, TrainConfig
from fasttx.reporting import findings, multi_label, page, plots, regression, single_label
from fasttx.reporting.escaping import escaped
from fasttx.reporting.findings import shown
from fasttx.reporting.finished import FinishedRun
from fasttx.reporting.pages import Pages, Tile
from fasttx.text.duplicates import duplicates_text, overlap_warning
from fasttx.text.targets import TARGETS
from fasttx.training.progress import clock

# The part of a report that a kind of problem has for itself.
KINDS = {SINGLE_LABEL: single_label, MULTI_LABEL: multi_label, REGRESSION: regression}


def build(run: FinishedRun) -> tuple[str, dict[str, plots.Picture]]:
    """The page, and its pictures by name. Raises PlotsError if matplotlib is missing."""
    out, kind = Pages(), KINDS[run.config.train.problem_type]
    _curves(out, run)
    kind.sections(out, run)
    _throughput(out, run)
    _configuration(out, run)

    name, target = str(run.config.dataset["name"]), TARGETS[run.config.train.problem_type]
    sentence, short = kind.headline(run)
    dataset = run.config.dataset
    warnings = target.warning(dataset), overlap_warning(dataset)
    alarms = [page.alarm(text) for text in (*warnings, *run.notes) if text]
    head = [
        f'<p class="kicker">{escaped(f"fasttx, run {run.folder.path.resolve().name}")}</p>',
        f"<h1>{escaped(name)}: {escaped(sentence)}</h1>",
        *alarms,
        page.tiles([*kind.tiles(run), *_tiles(run)]),
        f"<nav>{''.join(out.links)}</nav>",
    ]
    title = f"{name}: {short}"
    return page.document(title, "\n".join([*head, *out.sections, _footer(run)])), out.pictures


def _tiles(run: FinishedRun) -> list[Tile]:
    """Of any kind of problem."""
    r = run.results
    speed = f"{r['samples_per_second']:,.1f} samples/s"
    return [
        ("training", clock(r["seconds"]), speed),
        ("parameters", f"{r['parameters']:,}", f"backend {r['attn_backend']}"),
    ]


def _curves(out: Pages, run: FinishedRun) -> None:
    history, best = run.results["history"], run.results["best_epoch"]
    train, measure = run.config.train, run.measure
    heading = findings.curves_sentence(history, best, measure)
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
                     run.steps_per_epoch, best, measure)  # fmt: skip
    rows = [
        [str(e["epoch"]) + (" (chosen)" if e["epoch"] == best else ""), f"{e['train_loss']:.4f}",
         shown(measure, e[f"train_{measure.trained}"]), f"{e['val_loss']:.4f}",
         shown(measure, e[f"val_{measure.chosen}"]),
         clock(e["seconds"]), f"{e['samples_per_second']:,.1f}"]
        for e in history
    ]  # fmt: skip
    names = ("epoch", "train loss", f"train {measure.trained_title}", "val loss",
             f"val {measure.chosen_title}", "time", "samples/s")  # fmt: skip
    out.add("curves", "Learning curves", heading, page.figure(drawn, caption),
            page.table(names, rows))  # fmt: skip


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
    counts = run.config.dataset.get("label_counts", {})
    splits = [[name, *(f"{counts[split][name]:,}" for split in counts)] for name in run.names]
    ranges = run.config.dataset.get("label_range", {})
    rows = [[split, *(f"{value:.4g}" for value in ranges[split].values())] for split in ranges]
    titles = ("split", "least", "mean", "most", "standard deviation")
    shares = page.table(titles, rows) if ranges else page.table(("label", *counts), splits)
    repeated = duplicates_text(run.config.dataset)
    recipe = f"Recipe {run.config.recipe}" if run.config.recipe else "Configuration"
    heading = f"{recipe}, seed {t.seed}: {len(changed)} settings differ from the defaults"
    out.add(
        "configuration", "Configuration", heading,
        page.table(head, both[0], numbers=False),
        f"<details><summary>{len(kept)} settings at their defaults</summary>"
        f"{page.table(head, both[1], numbers=False)}</details>",
        "<h3>Texts by split and label</h3>", shares,
        *([page.paragraph(f"{repeated[0].upper()}{repeated[1:]}.")] if repeated else []),
    )  # fmt: skip


def _footer(run: FinishedRun) -> str:
    versions = ", ".join(f"{name} {v}" for name, v in run.results["versions"].items())
    hardware = ", ".join(f"{name} {v}" for name, v in run.results["hardware"].items())
    return f"<footer>{page.paragraph(f'Trained with {versions}; {hardware}.')}</footer>"
