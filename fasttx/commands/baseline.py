"""`fasttx baseline`: how far simpler models get on the very splits that train.py would use."""

from __future__ import annotations

import argparse
import contextlib
import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from fasttx import device as devices
from fasttx import terminal
from fasttx.commands import flags
from fasttx.config import TrainConfig
from fasttx.models import bag_of_words
from fasttx.tasks import TASKS, lstm, read_config
from fasttx.text import splits as data
from fasttx.text.duplicates import duplicates_text, overlap_warning
from fasttx.text.labels import label_table, single_class_warning
from fasttx.training import run as runs
from fasttx.training import trackers
from fasttx.training.checkpoint import read_json
from fasttx.training.folder import RunFolder
from fasttx.training.metrics import Metrics, classification_metrics, format_metrics

# What `fasttx baseline all` fits, one after the other.
ALL = (
    ("nb", 1), ("logreg", 1), ("logreg", 2), ("linear-svm", 2), ("nbsvm", 2), ("linear-svm", 3),
    ("nbsvm", 3),
)  # fmt: skip
DATA_SETTINGS = (
    "dataset text_column label_column train_samples test_samples subset_order allow_single_class "
    "seed split_seed"
).split()


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of TrainConfig that were given."""
    names = {f.name for f in fields(TrainConfig)}
    return {name: value for name, value in vars(args).items() if name in names}


# --- linear models --------------------------------------------------------------------------------


def measure_linear(
    kind: str, ngrams: int, dataset: data.TextDataset, config: TrainConfig
) -> tuple[Metrics, dict[str, Any]]:
    """Fit a linear baseline on training and validation texts together, since nothing is chosen with
    the latter, and measure it on the test texts. Its metrics, and what its results.json holds."""
    texts = [*dataset.train.texts, *dataset.validation.texts]
    labels = np.concatenate([dataset.train.labels, dataset.validation.labels])
    start, cpu_start = time.perf_counter(), time.process_time()
    fitted = bag_of_words.fit(
        kind, ngrams, texts, labels, num_classes=len(dataset.label_names), seed=config.seed
    )
    fitted_at, cpu_seconds = time.perf_counter(), time.process_time() - cpu_start
    test = classification_metrics(fitted.logits(dataset.test.texts), dataset.test.labels)
    measured, described, cpu = test.to_dict(), dataset.describe(), torch.device("cpu")
    results = {
        "baseline": kind,
        "ngrams": ngrams,
        "pipeline": str(fitted),
        "features": fitted.features,
        "fitted_on": ["train", "validation"],
        "test_accuracy": measured["accuracy"],
        "test_loss": measured["loss"],
        "confusion_matrix": measured["confusion_matrix"],
        "test": measured,
        "log_probabilities": bag_of_words.KINDS[kind].probabilistic,
        "seconds": fitted_at - start,
        "cpu_seconds": cpu_seconds,  # over all threads; a busy machine changes it little
        "test_seconds": time.perf_counter() - fitted_at,
        "peak_memory_mb": devices.peak_memory_mb(cpu),
        "seed": config.seed,
        "warning": single_class_warning(described["label_counts"]),
        "dataset": described,
        "config": {name: getattr(config, name) for name in DATA_SETTINGS},
        "versions": {**devices.versions(), "scikit-learn": version("scikit-learn")},
        "hardware": devices.hardware(cpu),
    }
    return test, results


def _linear(args: argparse.Namespace) -> None:
    bag_of_words.require_scikit_learn()
    if args.kind == "all":
        jobs = [(k, args.ngrams) for k in bag_of_words.KINDS] if args.ngrams else list(ALL)
    else:
        jobs = [(args.kind, args.ngrams or bag_of_words.KINDS[args.kind].ngrams)]
    with contextlib.ExitStack() as stack:
        folders: list[RunFolder | None] = [None] * len(jobs)
        if args.out:
            parts = [f"{k}-{n}" if args.kind == "all" else "" for k, n in jobs]
            folders = [stack.enter_context(RunFolder(args.out / p).created()) for p in parts]
        _fit_linear(args, jobs, folders)


def _fit_linear(
    args: argparse.Namespace,
    jobs: Sequence[tuple[str, int]],
    folders: Sequence[RunFolder | None],
) -> None:
    config = TrainConfig(**_settings(args))
    source = data.resolve(config.dataset)
    config = replace(config, dataset=source.name)
    dataset = data.load(config)
    if not args.json:
        notes = [*source.notes, *dataset.notes]
        terminal.say("\n".join([*notes, _fitted_on(dataset), _TABLE_HEAD]), flush=True)
    for (kind, ngrams), folder in zip(jobs, folders, strict=True):
        test, results = measure_linear(kind, ngrams, dataset, config)
        if folder:
            folder.write_json(folder.results, results)
            folder.close()
        if args.json:
            terminal.say_json(results, flush=True)
        else:
            terminal.say(_table_line(results), flush=True)
    if not args.json and len(jobs) == 1:
        terminal.say(f"\n{format_metrics(test, dataset.label_names)}")
        if not results["log_probabilities"]:
            terminal.say("\nIts scores are margins, so loss and calibration error mean little.")


def _fitted_on(dataset: data.TextDataset) -> str:
    train, validation, test = (
        len(split.texts) for split in (dataset.train, dataset.validation, dataset.test)
    )
    described = dataset.describe()
    counts = described["label_counts"]
    said = (
        label_table(counts), single_class_warning(counts), duplicates_text(described),
        overlap_warning(described),
    )  # fmt: skip
    return (
        "\n".join(line for line in said if line)
        + f"\n{dataset.name}: fitted on train and validation together, "
        f"{train + validation:,} texts, since nothing is chosen with the latter; tested on {test:,}"
    )


_TABLE_HEAD = f"\n{'baseline':38}  {'features':>9}  accuracy  macro F1  seconds to fit"


def _table_line(results: Mapping[str, Any]) -> str:
    name = bag_of_words.title(results["baseline"], results["ngrams"])
    return (
        f"{name:38}  {results['features']:9,}  {results['test_accuracy']:8.2%}"
        f"  {results['test']['macro_f1']:8.2%}  {results['seconds']:14.1f}"
    )


# --- the LSTM -------------------------------------------------------------------------------------


def _lstm(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    trackers.check(args.log_to)
    given = _settings(args)
    flags.refuse_beside_resume(parser, args.resume, {**given, "out": args.out})
    task = TASKS["the LSTM baseline"].load()
    # With --json, train.log has it all, and standard output has the JSON alone.
    with runs.session(quiet=args.json) as processes:
        if resume := runs.to_resume(args.resume, args.out, processes):
            folder = RunFolder(resume)
            run = runs.resume(task, folder, read_config(folder.config, task.name), processes)
        else:
            source = data.resolve(TrainConfig(**given).dataset)
            config = lstm.settings(given, source.name)
            run = runs.create(task, config, source, lstm.RECIPE, args.out, processes)
        if run:
            results = runs.train(run, quiet=args.json, log_to=args.log_to)
        else:
            results = read_json(folder.results)
    if args.json:
        terminal.say_json(results)


# --- the command ----------------------------------------------------------------------------------


def add_command(commands: Any) -> None:
    baseline = commands.add_parser(
        "baseline", help="fit and measure a simpler model on the splits of train.py"
    )
    kinds = baseline.add_subparsers(title="baselines", required=True, metavar="KIND")
    titles = {name: kind.title for name, kind in bag_of_words.KINDS.items()}
    for name, title in {**titles, "all": "all of these, on words or on words and pairs"}.items():
        parser = kinds.add_parser(name, help=f"{title} (scikit-learn)")
        _add_flags(parser)
        default = f"{bag_of_words.KINDS[name].ngrams}" if name != "all" else "those of the table"
        parser.add_argument(
            "--ngrams",
            type=int,
            choices=bag_of_words.NGRAMS,
            help=f"1: words; 2: words and pairs of them; 3: triples too (default: {default})",
        )
        parser.set_defaults(run_command=_linear, kind=name)

    parser = kinds.add_parser(
        "lstm", help="a bidirectional LSTM as large as the Transformer (torch)"
    )
    _add_flags(parser)
    for name in ("epochs", "device", "precision"):
        flags.add_setting(parser, TrainConfig, name)
    flags.add_resume(parser)
    flags.add_log_to(parser)
    parser.set_defaults(run_command=functools.partial(_lstm, parser))


def _add_flags(parser: argparse.ArgumentParser) -> None:
    """The settings that choose the splits, and where the results go."""
    for f in fields(TrainConfig):
        if f.name in DATA_SETTINGS:
            flags.add_setting(parser, TrainConfig, f.name, f.metadata["choices"])
    flags.add_json(parser, "JSON, one object a baseline")
    parser.add_argument("--out", type=flags.path, metavar="DIR", help="folder for results.json")
