"""`fasttx report RUN`: all that a finished run has to show, on one HTML page, and as PNGs."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fasttx import classifier, findings, page, plots, report, runs
from fasttx.attributions import Explanation, explain
from fasttx.checkpoint import CheckpointError, RunConfig, RunFolder, read_json
from fasttx.config import ModelConfig, TrainConfig
from fasttx.data import DataError, TextDataset
from fasttx.files import atomic_write, write_text_atomic
from fasttx.findings import percent
from fasttx.metrics import Metrics
from fasttx.predictions import Predictions
from fasttx.token_cache import encode_cached

MISTAKES = 8


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """What a report is made from. `texts` and `lengths` (in words) are None where the dataset
    cannot be had any more, and `predictions` too where the run saved none; `notes` say why."""

    folder: RunFolder
    config: RunConfig
    results: dict[str, Any]
    rows: list[dict[str, Any]]  # of metrics.jsonl
    model: classifier.TextClassifier
    predictions: Predictions | None
    texts: list[str] | None
    lengths: np.ndarray | None
    notes: list[str]

    @property
    def names(self) -> tuple[str, ...]:
        return self.config.label_names

    @property
    def metrics(self) -> Metrics:
        """Of the test split, as results.json has them."""
        values = self.results["test"]
        return Metrics(**{k: np.array(v) if isinstance(v, list) else v for k, v in values.items()})

    @property
    def samples_per_step(self) -> int:
        return self.config.train.batch_size * self.config.train.grad_accumulation

    @property
    def steps_per_epoch(self) -> int:
        return -(-int(self.config.dataset["train_samples"]) // self.samples_per_step)


def open_run(path: Path, device: str = "auto") -> FinishedRun:
    """Raises CheckpointError for a run that is not finished: its test split is not touched yet."""
    model = classifier.load(path, device=device, attn_backend="sdpa")  # which runs everywhere
    folder = RunFolder(path)
    config = RunConfig.load(folder.config)
    if not folder.results.exists():
        raise CheckpointError(
            f"{folder.results} does not exist: the run is not finished, and its test split is "
            f"measured once, at the end. Go on with it: python train.py --resume {path}"
        )
    results, notes = read_json(folder.results), []
    dataset: TextDataset | None = None
    try:
        dataset = runs.load_dataset(folder, config)
    except (DataError, CheckpointError) as error:
        notes.append(
            f"The texts of this run cannot be had any more, so what needs them is missing: {error}"
        )
    predictions = _predictions(folder, config, model, dataset)
    if predictions and predictions.metrics.accuracy != results["test_accuracy"]:
        notes.append(
            f"{folder.test_predictions.name} has an accuracy of "
            f"{percent(predictions.metrics.accuracy, 2)}, results.json of "
            f"{percent(results['test_accuracy'], 2)}: it was computed again, on another device or "
            "in another precision."
        )
    texts = dataset.test.texts if dataset else None
    lengths = encode_cached(model.tokenizer, texts).lengths if texts is not None else None
    return FinishedRun(
        folder, config, results, _rows(folder.metrics), model, predictions, texts, lengths, notes
    )


def _predictions(
    folder: RunFolder, config: RunConfig, model: classifier.TextClassifier,
    dataset: TextDataset | None,
) -> Predictions | None:  # fmt: skip
    """Those that the run saved; of an older run, computed now and saved for the next time."""
    if folder.test_predictions.exists():
        found = Predictions.load(folder.test_predictions, len(config.label_names))
        if len(found) != config.dataset["test_samples"] or (
            dataset is not None and not np.array_equal(found.labels, dataset.test.labels)
        ):
            raise CheckpointError(
                f"{folder.test_predictions} does not belong to the {len(found):,} labels of this "
                "run's test split. Delete it: `fasttx report` makes it again"
            )
        return found
    if dataset is None:
        return None
    print(f"predicting the {len(dataset.test.texts):,} test texts once more ...", flush=True)
    found = Predictions(model.logits(dataset.test.texts).numpy(), dataset.test.labels)
    found.save(folder.test_predictions)
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as lines of JSON: {error}") from error
    return [row for row in rows if row["kind"] in ("train", "epoch")]


# --- the page -------------------------------------------------------------------------------------


@dataclass
class Pages:
    """The sections of a page as they come to be, and the pictures in them by name."""

    sections: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    pictures: dict[str, plots.Picture] = field(default_factory=dict)

    def add(self, anchor: str, kicker: str, heading: str, *content: str) -> None:
        self.sections.append(page.section(anchor, kicker, heading, *content))
        self.links.append(f'<a href="#{anchor}">{page.escaped(kicker)}</a>')

    def draw(self, name: str, alt: str, draw: Callable[..., Any], *data: Any) -> plots.Picture:
        self.pictures[name] = plots.picture(name, alt, draw, *data)
        return self.pictures[name]


def build(run: FinishedRun) -> tuple[str, dict[str, plots.Picture]]:
    """The page, and its pictures by name. Raises PlotsError where matplotlib is missing."""
    out = Pages()
    _curves(out, run)
    _confusion(out, run)
    if run.predictions is not None:
        _calibration(out, run.predictions)
        if run.texts is not None and run.lengths is not None:
            _lengths(out, run.predictions, run.lengths, run.config.train.model.max_len)
            _texts(out, run, run.predictions, run.texts, run.lengths)
    _throughput(out, run)
    _configuration(out, run)

    name, metrics = str(run.config.dataset["name"]), run.metrics
    warning = report.single_class_warning(run.config.dataset["label_counts"])
    alarms = [page.alarm(text) for text in ([warning] if warning else []) + run.notes]
    head = [
        f'<p class="kicker">{page.escaped(f"fasttx, run {run.folder.path.resolve().name}")}</p>',
        f"<h1>{page.escaped(name)}: {page.escaped(findings.accuracy_sentence(metrics))}</h1>",
        *alarms,
        page.tiles(_tiles(run)),
        f"<nav>{''.join(out.links)}</nav>",
    ]
    title = f"{name}: {percent(metrics.accuracy, 2)}"
    return page.document(title, "\n".join([*head, *out.sections, _footer(run)])), out.pictures


def _tiles(run: FinishedRun) -> list[tuple[str, str, str]]:
    r, metrics = run.results, run.metrics
    reached = report.time_to_accuracy(r["history"])
    first = [
        ("test accuracy", percent(metrics.accuracy, 2), f"{metrics.n:,} texts"),
        ("validation accuracy", percent(r["val_accuracy"], 2), f"epoch {r['best_epoch']}, chosen"),
        ("macro F1", percent(metrics.macro_f1, 2), f"{len(run.names)} labels"),
        ("calibration error", percent(metrics.expected_calibration_error), "expected, 15 bins"),
        ("training", report.clock(r["seconds"]), f"{r['samples_per_second']:,.1f} samples/s"),
    ]
    targets = [
        (f"until {percent(float(target), 0)}", report.clock(s) if s is not None else "not reached",
         "of training; validation accuracy")
        for target, s in reached.items()
    ]  # fmt: skip
    return [
        *first,
        *targets,
        ("parameters", f"{r['parameters']:,}", f"backend {r['attn_backend']}"),
    ]


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
         report.clock(e["seconds"]), f"{e['samples_per_second']:,.1f}"]
        for e in history
    ]  # fmt: skip
    names = ("epoch", "train loss", "train accuracy", "val loss", "val accuracy", "time",
             "samples/s")  # fmt: skip
    out.add("curves", "Learning curves", heading, page.figure(drawn, caption),
            page.table(names, rows))  # fmt: skip


def _confusion(out: Pages, run: FinishedRun) -> None:
    metrics, names = run.metrics, run.names
    heading = findings.confusion_sentence(metrics, names)
    drawn = out.draw("confusion-matrix", heading, plots.confusion, metrics, names)
    width = f"{min(62, 20 + 3 * len(names))}rem"
    out.add("confusion", "Confusion matrix", heading, page.figure(
        drawn, "Shade and percentage: the share of all texts with the true label of the row.",
        "18rem" if len(names) <= plots.MOST_CELLS else "34rem", width))  # fmt: skip
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


def _lengths(out: Pages, predictions: Predictions, lengths: np.ndarray, limit: int) -> None:
    heading = findings.length_sentence(lengths, predictions.correct)
    drawn = out.draw("accuracy-by-length", heading, plots.accuracy_by_length,
                     findings.by_length(lengths, predictions.correct), limit)  # fmt: skip
    caption = (
        "Bins of about equally many texts, by words (punctuation marks count as words), before "
        "truncation; bars are 95 % Wilson intervals."
    )
    out.add("length", "Accuracy by length", heading, page.figure(drawn, caption))


def _texts(
    out: Pages, run: FinishedRun, predictions: Predictions, texts: list[str], lengths: np.ndarray
) -> None:
    """The mistakes with their words shaded, and attention maps of two texts."""
    if len(run.names) < 2:
        return
    shown = findings.confident_mistakes(predictions, MISTAKES)
    explained = {int(i): explain(run.model, texts[i]) for i in shown}
    articles = [
        article(found, f"true label {run.names[predictions.labels[i]]}, test text {i:,}")
        for i, found in explained.items()
    ]
    note = [page.paragraph(page.ATTRIBUTION_NOTE)] if articles else []
    heading = findings.mistakes_sentence(predictions, shown)
    out.add("mistakes", "Mistakes", heading, *note, *articles)

    chosen: list[tuple[str, str, Explanation]] = []
    sure = findings.shortest_confident_answer(predictions, lengths)
    if sure is not None:
        what = "The shortest of the most confident right answers"
        chosen.append(("right", what, explain(run.model, texts[sure])))
    if len(shown):
        what = "The most confident mistake"
        chosen.append(("wrong", what, explained[int(shown[0])]))
    maps = [attention(out.draw, f"attention-{key}", what, found) for key, what, found in chosen]
    if any(maps):
        size = run.config.train.model
        heading = f"Where {size.num_layers} layers of {size.num_heads} heads look, in two texts"
        if len(maps) == 1:
            heading = heading.replace("two texts", "one text")
        out.add("attention", "Attention maps", heading, page.paragraph(page.ATTENTION_NOTE), *maps)


def article(found: Explanation, about: str) -> str:
    """A text with its words shaded by what they contributed."""
    heading = f"{found.label}, {percent(found.probability)} sure"
    sums = (
        f"Margin over {found.rival}: {found.margin:+.2f}; of as many unknown words: "
        f"{found.baseline_margin:+.2f}; the words add {found.attributions.sum():+.2f}."
    )
    return (
        f"<article><h3>{page.escaped(heading)}</h3>{page.paragraph(about, 'kicker')}"
        f"{page.coloured_text(found)}{page.strongest(found)}{page.paragraph(sums)}</article>"
    )


def attention(
    draw: Callable[..., plots.Picture], name: str, what: str, found: Explanation
) -> str:  # fmt: skip
    """The maps of one text; nothing for a model without layers and for a text without words."""
    if not found.attention.size:
        return ""
    drawn = draw(name, f"{what}: attention maps", plots.attention_maps, found.attention,
                 [page.printable(word) for word in found.words])  # fmt: skip
    n = len(found.words)
    words = f"its {n} words" if n <= plots.MOST_WORDS else (
        f"the {plots.MOST_WORDS} of its {n} words that receive most attention, in their order"
    )  # fmt: skip
    heading = f"{what}: {found.label}, {percent(found.probability)} sure; {words}"
    heads = found.attention.shape[1]
    return (
        f"<h3>{page.escaped(heading)}</h3>"
        + page.figure(drawn, "", f"{max(24, 9 * heads)}rem", f"{14 * heads}rem")
    )  # fmt: skip


def _throughput(out: Pages, run: FinishedRun) -> None:
    r = run.results
    seconds, rates = findings.throughput(
        run.rows, int(run.config.dataset["train_samples"]), run.samples_per_step
    )
    heading = (
        f"{r['samples_per_second']:,.1f} samples/s on average; {report.clock(r['seconds'])} of "
        "training"
    )
    drawn = out.draw("throughput", heading, plots.throughput, seconds, rates,
                     r["samples_per_second"])  # fmt: skip
    where = r["hardware"].get("gpu") or r["hardware"].get("cpu")
    caption = (
        f"On {where}, {r['device']}, {r['precision']}; peak memory {r['peak_memory_mb']:,.0f} MB."
    )
    out.add("throughput", "Throughput", heading, page.figure(drawn, caption))


def _configuration(out: Pages, run: FinishedRun) -> None:
    """Every setting by group; those that are not the defaults first."""
    t = run.config.train
    changed, kept = [], []
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
    splits = [[split, *(f"{counts[split][name]:,}" for name in run.names)] for split in counts]
    recipe = f"Recipe {run.config.recipe}" if run.config.recipe else "Configuration"
    heading = f"{recipe}, seed {t.seed}: {len(changed)} settings differ from the defaults"
    out.add(
        "configuration", "Configuration", heading,
        page.table(head, both[0], numbers=False),
        f"<details><summary>{len(kept)} settings at their defaults</summary>"
        f"{page.table(head, both[1], numbers=False)}</details>",
        "<h3>Texts by split and label</h3>", page.table(("split", *run.names), splits),
    )  # fmt: skip


def _footer(run: FinishedRun) -> str:
    versions = ", ".join(f"{name} {v}" for name, v in run.results["versions"].items())
    hardware = ", ".join(f"{name} {v}" for name, v in run.results["hardware"].items())
    return f"<footer>{page.paragraph(f'Trained with {versions}; {hardware}.')}</footer>"


# --- the command ----------------------------------------------------------------------------------


def write(out: Path, html: str, pictures: Mapping[str, plots.Picture]) -> Path | None:
    """The page at `out`, its pictures in a folder of the same name beside it, which is returned."""
    try:
        write_text_atomic(out, html)
        if not pictures:
            return None
        folder = out.with_suffix("")
        folder.mkdir(exist_ok=True)
        for name, drawn in pictures.items():
            with atomic_write(folder / f"{name}.png") as f:
                f.write(drawn.png)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error}") from error
    return folder


def _report(args: argparse.Namespace) -> None:
    path = Path(args.run)
    out = Path(args.out) if args.out else path / "report.html"
    html, pictures = build(open_run(path, args.device))
    folder = write(out, html, pictures)
    print(f"{out}: open it in a browser; its {len(pictures)} pictures: {folder}/*.png")


def add_command(commands: Any) -> None:
    """`fasttx report`, among the subparsers `commands`."""
    parser = commands.add_parser(
        "report", help="one HTML page of a finished run: curves, confusion, calibration, mistakes"
    )
    parser.add_argument("run", metavar="RUN", help="a run folder that train.py wrote")
    parser.add_argument(
        "--out", metavar="FILE", help="the page (default: RUN/report.html); PNGs go beside it"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.set_defaults(run_command=_report)
