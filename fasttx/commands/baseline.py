"""`fasttx baseline`: how far simpler models get on the very splits that train.py would use."""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fasttx import device as devices
from fasttx.config import RECIPES, TrainConfig
from fasttx.errors import CheckpointError, ConfigError
from fasttx.files import write_json_atomic
from fasttx.models import bag_of_words
from fasttx.models.lstm import LSTMClassifier
from fasttx.text import splits as data
from fasttx.training import progress as report
from fasttx.training import run as runs
from fasttx.training.checkpoint import LSTM_BASELINE, RunConfig, RunFolder
from fasttx.training.distributed import Processes
from fasttx.training.metrics import Metrics, classification_metrics, format_metrics
from fasttx.training.trainer import Interrupted

log = logging.getLogger("fasttx")

# What `fasttx baseline all` fits, one after the other.
ALL = (
    ("nb", 1), ("logreg", 1), ("logreg", 2), ("linear-svm", 2), ("nbsvm", 2), ("linear-svm", 3),
    ("nbsvm", 3),
)  # fmt: skip
DATA_SETTINGS = (
    "dataset", "text_column", "label_column", "train_samples", "test_samples", "seed",
    "split_seed",
)  # fmt: skip
LSTM = "lstm"  # what the config.json of its runs holds instead of a recipe of train.py


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of TrainConfig that were given."""
    names = {f.name for f in fields(TrainConfig)}
    return {name: value for name, value in vars(args).items() if name in names}


def _load(config: TrainConfig) -> tuple[TrainConfig, data.TextDataset, list[str]]:
    """`config` with `auto` settled, its splits, and the lines there are to show about them."""
    source = data.resolve(config.dataset)
    config = replace(config, dataset=source.name)
    dataset = data.load(config)
    return config, dataset, [*source.notes, *dataset.notes]


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
    measured, described, cpu = test.to_dict(), runs.describe(dataset), torch.device("cpu")
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
    folders = [_folder(args.out, f"{k}-{n}" if args.kind == "all" else "") for k, n in jobs]
    config, dataset, notes = _load(TrainConfig(**_settings(args)))
    if not args.json:
        print("\n".join([*notes, _fitted_on(dataset), _TABLE_HEAD]), flush=True)
    for (kind, ngrams), folder in zip(jobs, folders, strict=True):
        test, results = measure_linear(kind, ngrams, dataset, config)
        if folder:
            folder.path.mkdir(parents=True, exist_ok=True)
            write_json_atomic(folder.results, results)
        print(json.dumps(results) if args.json else _table_line(results), flush=True)
    if not args.json and len(jobs) == 1:
        print(f"\n{format_metrics(test, dataset.label_names)}")
        if not results["log_probabilities"]:
            print("\nIts scores are margins, so loss and calibration error mean little.")


def _folder(out: Path | None, name: str) -> RunFolder | None:
    """Where results.json goes, if anywhere; refuses to overwrite one."""
    if out is None:
        return None
    folder = RunFolder(out / name)
    if folder.results.exists() or (out.exists() and not out.is_dir()):
        raise CheckpointError(
            f"{folder.results if out.is_dir() else out} exists already; expected a folder without "
            "results.json. Choose another --out"
        )
    return folder


def _fitted_on(dataset: data.TextDataset) -> str:
    train, validation, test = (
        len(split.texts) for split in (dataset.train, dataset.validation, dataset.test)
    )
    counts = runs.describe(dataset)["label_counts"]
    return (
        f"{report.label_table(counts)}\n{dataset.name}: fitted on train and validation together, "
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


def lstm_config(settings: Mapping[str, Any], dataset: str) -> TrainConfig:
    """The recipe of the Transformer it is compared with (`full`; `demo` on that corpus), with the
    same tokenizer, truncation and optimiser, at a rate and a dropout that are usual for an LSTM.
    `model` is the Transformer's: the LSTM is made as large as that. Raises ConfigError."""
    recipe = RECIPES["demo" if dataset == "demo" else "full"]
    model = replace(recipe.model, dropout=0.3, attention_dropout=None, attn_backend="reference")
    return replace(recipe, model=model, lr=1e-3, **{**settings, "dataset": dataset})


def _open_lstm(args: argparse.Namespace) -> runs.Run | None:
    """A new run, or the one to resume; None if that one is finished."""
    settings = _settings(args)
    if args.resume is None:
        config, dataset, notes = _load(TrainConfig(**settings))
        for note in notes:
            log.info("%s", note)
        folder = runs.new_folder(args.out, LSTM, Processes())
        return runs.create(
            lstm_config(settings, config.dataset), LSTM, folder, dataset, Processes()
        )

    folder = RunFolder(args.resume)
    if given := [*settings, *(["out"] if args.out else [])]:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ConfigError(f"--resume takes its settings from {folder.config}; leave out {flags}")
    saved = RunConfig.load(folder.config, LSTM_BASELINE)
    return None if folder.results.exists() else runs.resume(folder, saved, Processes())


def _lstm(args: argparse.Namespace) -> int:
    log.setLevel(logging.INFO)
    # With --json, train.log has it all, and standard output has the JSON alone.
    with nullcontext() if args.json else report.console():
        run = _open_lstm(args)
        if run is None:
            print(f"{args.resume} is finished: its results are in {RunFolder(args.resume).results}")
            return 0
        with report.log_file(run.folder.log):
            try:
                results = train_lstm(run, quiet=args.json)
            except Interrupted:
                how = f"fasttx baseline lstm --resume {run.folder.path}"
                log.info("stopped and saved; go on with: %s", how)
                return 130
    if args.json:
        print(json.dumps(results))
    return 0


def train_lstm(run: runs.Run, *, quiet: bool = False) -> dict[str, Any]:
    """Train as train.py does, from where the run stands to its end. What its results.json holds.

    Raises Interrupted (saved, resumable) and DivergedError.
    """
    torch.manual_seed(run.config.train.seed)
    model = LSTMClassifier(run.config.train.model).to(run.device)
    log.info("%s", _lstm_heading(run, model))
    log.info("%s", report.label_table(run.config.dataset["label_counts"]))
    measured = runs.train_and_test(run, model, Processes(), quiet=quiet)
    of_transformers = ("attn_backend", "mps", "recipe")
    results = {
        "baseline": LSTM,
        "hidden_size": model.hidden_size,
        **{k: v for k, v in measured.items() if k not in of_transformers},
    }
    write_json_atomic(run.folder.results, results)
    log.info(
        "\n%s: test accuracy %.2f%% on %s texts (epoch %d, chosen by validation accuracy %.2f%%)\n"
        "trained at %.1f samples/s; %s",
        run.config.dataset["name"], 100 * results["test_accuracy"], f"{len(run.test):,}",
        results["best_epoch"], 100 * results["val_accuracy"], results["samples_per_second"],
        run.folder.results,
    )  # fmt: skip
    return results


def _lstm_heading(run: runs.Run, model: LSTMClassifier) -> str:
    t = run.config.train
    size = f"{sum(p.numel() for p in model.parameters()):,} parameters"
    shape = f"embedding {t.model.d_model}, hidden {model.hidden_size} in each direction"
    length = f"{t.model.max_len} tokens ({t.truncation})"
    return f"""\
run        {run.folder.path}  (baseline {LSTM}, seed {t.seed})
data       {run.config.dataset["name"]}
model      bidirectional LSTM, {size}, {shape}
           {t.model.vocab_size} words, {length}, dropout {t.model.dropout:g}
device     {run.device}, {t.precision}, {torch.get_num_threads()} threads
training   {t.epochs} epochs, batch {t.batch_size}, {t.optimizer} at {t.lr:g} ({t.schedule})"""


# --- the command ----------------------------------------------------------------------------------


def _add_flags(parser: argparse.ArgumentParser) -> None:
    """The settings of TrainConfig that choose the splits, and where the results go."""
    for f in fields(TrainConfig):
        if f.name in DATA_SETTINGS:
            number = f.name.endswith(("_samples", "seed"))
            parser.add_argument(
                "--" + f.name.replace("_", "-"), type=int if number else str,
                metavar="N" if number else "NAME", default=argparse.SUPPRESS,
                help=f.metadata["help"],
            )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="JSON, one object a baseline")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for results.json")


def add_command(commands: Any) -> None:
    """Add `baseline` to the subparsers of `fasttx`."""
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
            "--ngrams", type=int, choices=bag_of_words.NGRAMS,
            help=f"1: words; 2: words and pairs of them; 3: triples too (default: {default})",
        )  # fmt: skip
        parser.set_defaults(run_command=_linear, kind=name)

    lstm = kinds.add_parser(LSTM, help="a bidirectional LSTM as large as the Transformer (torch)")
    _add_flags(lstm)
    for name, kind, metavar in (
        ("epochs", int, "N"), ("device", str, "NAME"), ("precision", str, "NAME")
    ):  # fmt: skip
        text = TrainConfig.__dataclass_fields__[name].metadata["help"]
        lstm.add_argument(
            f"--{name}", type=kind, metavar=metavar, default=argparse.SUPPRESS, help=text
        )
    lstm.add_argument(
        "--resume", type=Path, metavar="RUN", help="go on with this run; takes no other settings"
    )
    lstm.set_defaults(run_command=_lstm)
