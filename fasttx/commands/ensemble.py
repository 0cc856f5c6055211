"""`fasttx ensemble`: several classifiers as one, measured; and what it says of unlabelled texts.

Shapes: M members, n texts, C classes.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fasttx import device as devices
from fasttx import terminal
from fasttx.commands import flags
from fasttx.config import SINGLE_LABEL
from fasttx.errors import CheckpointError, ConfigError
from fasttx.load import TextClassifier, checked_finite, load
from fasttx.models import bag_of_words
from fasttx.models.pool import Pool
from fasttx.tasks import read_config
from fasttx.text import splits as data
from fasttx.text.duplicates import overlap_warning
from fasttx.text.reading import mean_of_windows
from fasttx.training import run as runs
from fasttx.training.checkpoint import RunConfig
from fasttx.training.folder import RunFolder
from fasttx.training.inference import predict_logits
from fasttx.training.metrics import classification_metrics, format_metrics, log_softmax
from fasttx.training.predictions import Predictions, PseudoLabels
from fasttx.training.progress import clock, console

log = logging.getLogger("fasttx")

TEXTS_AT_A_TIME = 2048
SECONDS_BETWEEN_LINES = 30.0


@dataclass(frozen=True, eq=False)
class Member:
    """texts -> logits (n, C) float64; the test split's, where they are known already."""

    name: str
    logits: Callable[[Sequence[str]], np.ndarray]
    test: np.ndarray | None = None


# --- the members ----------------------------------------------------------------------------------


def _read_texts(
    classifier: TextClassifier, precision: str, batch_size: int, name: str, texts: Sequence[str]
) -> np.ndarray:
    """Logits of a run, in its own precision, with a line now and then about how far it is."""
    devices.set_precision(classifier.device, precision)  # global: another run may have another
    start = last = time.perf_counter()
    parts = []
    for at in range(0, len(texts), TEXTS_AT_A_TIME):
        ids, owner = classifier.read(
            classifier.tokenizer.encode_batch(texts[at : at + TEXTS_AT_A_TIME])
        )
        logits = predict_logits(
            classifier.model, ids, classifier.device, batch_size=batch_size, precision=precision
        )
        answers = checked_finite(mean_of_windows(logits, owner), texts[at : at + TEXTS_AT_A_TIME])
        parts.append(answers.double().numpy())
        now, done = time.perf_counter(), min(at + TEXTS_AT_A_TIME, len(texts))
        if now - last >= SECONDS_BETWEEN_LINES:
            last, rate = now, done / (now - start)
            left = clock((len(texts) - done) / rate)
            log.info(
                "%s: %d of %d texts  %.1f texts/s  %s left", name, done, len(texts), rate, left
            )
    return np.concatenate(parts)


def _of_run(
    path: Path, run: RunConfig, dataset: data.TextDataset, args: argparse.Namespace
) -> Member:
    classifier = load(path, device=args.device, attn_backend=args.attn_backend)
    # Where it was trained it runs as it was trained; elsewhere that may not exist (tf32).
    there = classifier.device.type == torch.device(run.device).type
    precision = run.train.precision if there else "fp32"
    logits = functools.partial(_read_texts, classifier, precision, args.batch_size, str(path))
    kept, test = RunFolder(path).test_predictions, None
    if kept.exists():
        found = Predictions.load(kept, len(dataset.label_names))
        if np.array_equal(found.labels, dataset.test.labels):
            test = found.logits
    return Member(str(path), logits, test)


def _linear(kind: str, ngrams: int, dataset: data.TextDataset, seed: int) -> Member:
    """Fitted on the training split alone: the weights are fitted on the validation split."""
    train, classes = dataset.train, len(dataset.label_names)
    fitted = bag_of_words.fit(
        kind, ngrams, train.texts, train.labels, num_classes=classes, seed=seed
    )
    return Member(bag_of_words.title(kind, ngrams), fitted.logits)


def _open(args: argparse.Namespace) -> tuple[RunConfig, data.TextDataset, list[Member]]:
    """The first run's settings, the splits, which all runs must share, and the members."""
    found = [read_config(RunFolder(path).config, "classification") for path in args.run]
    first = found[0]
    for path, run in zip(args.run, found, strict=True):
        if (kind := run.train.problem_type) != SINGLE_LABEL:
            raise CheckpointError(
                f"{path} is a run of {kind}; expected runs of {SINGLE_LABEL}: a pool weighs the "
                "probabilities of classes"
            )
        if run.dataset.get("fingerprint") != first.dataset.get("fingerprint"):
            raise CheckpointError(
                f"{path} was trained on other splits than {args.run[0]} ({run.dataset['name']}, "
                f"seed {run.train.seed_of_splits}; {first.dataset['name']}, seed "
                f"{first.train.seed_of_splits}), so that texts to fit the weights on may have been "
                "learnt by one of them. Expected the same dataset, --split-seed and numbers of "
                "samples"
            )
    dataset = runs.load_dataset(RunFolder(args.run[0]), first)
    members = [_of_run(path, run, dataset, args) for path, run in zip(args.run, found, strict=True)]
    for kind in args.linear:
        ngrams = args.ngrams or bag_of_words.KINDS[kind].ngrams
        log.info("fitting %s ...", bag_of_words.title(kind, ngrams))
        members.append(_linear(kind, ngrams, dataset, first.train.seed))
    return first, dataset, members


# --- the command ----------------------------------------------------------------------------------


def _measure(
    members: Sequence[Member], dataset: data.TextDataset
) -> tuple[Pool, Predictions, dict[str, Any]]:
    """The pool, what it says of the test split, and what results.json says of both."""
    valid, test = dataset.validation, dataset.test
    sizes = f"{len(valid.texts):,} validation and {len(test.texts):,} test texts"
    log.info("measuring on %s ...", sizes)
    of_valid = np.stack([m.logits(valid.texts) for m in members])
    of_test = np.stack([m.logits(test.texts) if m.test is None else m.test for m in members])
    pool = Pool.fit(of_valid, valid.labels)

    def accuracy(logits: np.ndarray, split: data.Split) -> float:
        return classification_metrics(logits, split.labels).accuracy

    rows: list[dict[str, Any]] = []
    for i, (member, weight) in enumerate(zip(members, pool.weights, strict=True)):
        row = {
            "name": member.name,
            "weight": float(weight),
            "val_accuracy": accuracy(of_valid[i], valid),
            "test_accuracy": accuracy(of_test[i], test),
        }
        if len(members) > 1:  # does it add anything to the others?
            others = np.arange(len(members)) != i
            rest = Pool.fit(of_valid[others], valid.labels)
            row["test_accuracy_without"] = accuracy(rest(of_test[others]), test)
        rows.append(row)
    answers = Predictions(pool(of_test).astype(np.float32), test.labels)
    found = {
        "test_accuracy": answers.metrics.accuracy,
        "test_loss": answers.metrics.loss,
        "test": answers.metrics.to_dict(),
        # Of the texts that the weights were fitted on.
        "val_accuracy": accuracy(pool(of_valid), valid),
        "members": rows,
        "bias": pool.bias.tolist(),
    }
    return pool, answers, found


def _table(results: Mapping[str, Any]) -> str:
    rows = [*results["members"], {**results, "name": "together"}]
    width = max(len(row["name"]) for row in rows)
    head = f"{'member':{width}}  weight  validation    test"
    lines = [head + "  test without it" if len(rows) > 2 else head]
    for row in rows:
        weight = f"{row['weight']:6.2f}" if "weight" in row else " " * 6
        without = f"{row['test_accuracy_without']:17.2%}" if "test_accuracy_without" in row else ""
        lines.append(
            f"{row['name']:{width}}  {weight}  {row['val_accuracy']:10.2%}"
            f"  {row['test_accuracy']:6.2%}{without}"
        )
    return "\n".join([*lines, "The weights were fitted on the validation split."])


def _label(
    members: Sequence[Member], pool: Pool, run: RunConfig, texts: Sequence[str], folder: RunFolder
) -> dict[str, Any]:
    """Writes pseudo_labels.npz; what results.json says of it."""
    log.info("labelling %s texts ...", f"{len(texts):,}")
    of_texts = np.stack([m.logits(texts) for m in members])
    probabilities = np.exp(log_softmax(pool(of_texts))).astype(np.float32)
    labels = PseudoLabels(
        probabilities, run.label_names, data.texts_fingerprint(texts), run.dataset["fingerprint"]
    )
    labels.save(folder)
    counts = np.bincount(probabilities.argmax(1), minlength=len(run.label_names)).tolist()
    return {
        "texts": len(texts),
        "label_counts": dict(zip(run.label_names, counts, strict=True)),
        "mean_confidence": float(probabilities.max(1).mean()),
        "fingerprint": labels.fingerprint,
    }


def _ensemble(args: argparse.Namespace) -> None:
    if args.pseudo_labels and args.out is None:
        raise ConfigError("--pseudo-labels needs a folder to write them to: add --out DIR")
    if args.ngrams and not args.linear:
        raise ConfigError("--ngrams is about linear models, and there is none: add --linear KIND")
    if args.linear:
        bag_of_words.require_scikit_learn()
    keep = RunFolder(args.out).created() if args.out else contextlib.nullcontext()
    with keep as folder:
        results = _pooled(args, folder)
    if args.json:
        terminal.say_json(results)


def _pooled(args: argparse.Namespace, folder: RunFolder | None) -> dict[str, Any]:
    """Measure the pool, and keep what it said in `folder`. What results.json holds."""
    # With --json, standard output has the JSON alone.
    with console(logging.ERROR if args.json else logging.INFO):
        start = time.perf_counter()
        run, dataset, members = _open(args)
        texts: list[str] = []
        if args.pseudo_labels:
            texts, notes = data.load_unlabelled(run.train.dataset, run.train.text_column)
            for note in notes:
                log.info("%s", note)
        pool, answers, results = _measure(members, dataset)
        if warning := overlap_warning(run.dataset):
            log.info("%s", warning)
        measured = format_metrics(answers.metrics, dataset.label_names)
        log.info("\n%s\n\non the test split:\n%s\n", _table(results), measured)
        if folder is not None:
            answers.save(folder)
            if texts:
                results["pseudo_labels"] = _label(members, pool, run, texts, folder)
        device = devices.pick(args.device)
        results |= {
            "seconds": time.perf_counter() - start,
            "dataset": run.dataset,
            "versions": devices.versions(),
            "hardware": devices.hardware(device),
        }
        if folder is not None:
            folder.write_json(folder.results, results)
            more = f"; next: python train.py --pseudo-labels {folder.path}" if texts else ""
            log.info("%s%s", folder.results, more)
    return results


def add_command(commands: Any) -> None:
    """Add `ensemble` to the subparsers of `fasttx`."""
    parser = commands.add_parser(
        "ensemble",
        help="several classifiers as one; and what they say of unlabelled texts",
        description="Weigh the answers of trained runs, and of linear models fitted here on their "
        "training split, by a fit on their validation split, and measure them together on the "
        "test split. With --pseudo-labels, the dataset's unlabelled texts are labelled, for "
        "train.py --pseudo-labels (self-training).",
    )
    parser.add_argument(
        "run", nargs="+", type=flags.path, metavar="RUN", help="run folders that train.py wrote"
    )
    parser.add_argument(
        "--linear",
        action="append",
        choices=bag_of_words.KINDS,
        default=[],
        metavar="KIND",
        help=f"a linear model to take in, as `fasttx baseline` has it (scikit-learn): one of "
        f"{', '.join(bag_of_words.KINDS)}; can be given several times",
    )
    parser.add_argument(
        "--ngrams",
        type=int,
        choices=bag_of_words.NGRAMS,
        help="words in a row that the linear models count (default: each one's own)",
    )
    parser.add_argument(
        "--pseudo-labels", action="store_true", help="label the dataset's unlabelled texts too"
    )
    parser.add_argument("--out", type=flags.path, metavar="DIR", help="new folder for results.json")
    flags.add_inference(parser, "the runs'")
    parser.set_defaults(run_command=_ensemble)
