"""A run from end to end: opened, new or to go on with, trained, measured."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fasttx import device as devices
from fasttx.config import ENCODER_SHAPE, TrainConfig
from fasttx.errors import CheckpointError, ConfigError
from fasttx.load import read
from fasttx.ops import registry
from fasttx.text import splits as data
from fasttx.text.packing import RaggedIds
from fasttx.text.token_cache import encode_cached
from fasttx.text.tokenizer import Tokenizer
from fasttx.training import progress as report
from fasttx.training.checkpoint import CLASSIFICATION, PRETRAINING, Progress, RunConfig, RunFolder
from fasttx.training.distributed import Processes
from fasttx.training.metrics import format_metrics
from fasttx.training.predictions import Predictions, PseudoLabels
from fasttx.training.trainer import Examples, Trainer

log = logging.getLogger("fasttx")


@dataclass(frozen=True)
class Run:
    """An open run: its folder, settings, device, tokenizer, and its splits as token ids."""

    folder: RunFolder
    config: RunConfig
    device: torch.device
    tokenizer: Tokenizer
    train: Examples
    validation: Examples
    test: Examples


def describe(dataset: data.TextDataset) -> dict[str, Any]:
    """What config.json and results.json say of the data."""
    splits = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
    return {
        "name": dataset.name,
        "train_samples": len(dataset.train.texts),
        "val_samples": len(dataset.validation.texts),
        "test_samples": len(dataset.test.texts),
        "label_counts": {k: s.label_counts(dataset.label_names) for k, s in splits.items()},
        "fingerprint": dataset.fingerprint,
    }


def open_device(name: str, precision: str, processes: Processes) -> torch.device:
    device = devices.pick(name)
    if device.type == "cuda" and processes.world > 1:
        device = torch.device("cuda", processes.local_rank)
        torch.cuda.set_device(device)
    devices.set_precision(device, precision)
    return device


def new_folder(out: Path | None, recipe: str, processes: Processes) -> RunFolder:
    """`out`, or runs/<recipe>-<time>; not made yet. Refuses a folder that holds anything."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path = processes.from_main(out or Path("runs") / f"{recipe}-{stamp}")
    if path.exists() and (not path.is_dir() or (processes.main and any(path.iterdir()))):
        raise CheckpointError(
            f"{path} exists already; expected a new or empty folder. Go on with that run by "
            f"--resume {path}, or choose another --out"
        )
    return RunFolder(path)


def _tokenizer_to_start_from(config: TrainConfig) -> Tokenizer:
    """That of the run `init_from`, after a check that its encoder has this one's shape."""
    source = RunFolder(Path(str(config.init_from)))
    theirs = RunConfig.load(source.config, CLASSIFICATION, PRETRAINING).train.model
    for name in ENCODER_SHAPE:
        there, here = getattr(theirs, name), getattr(config.model, name)
        if there != here:
            raise ConfigError(
                f"{name} is {here}, and {there} in {source.config}; expected the same encoder. "
                f"Pass --{name.replace('_', '-')} {there}"
            )
    if not source.best_model.exists():
        raise CheckpointError(
            f"{source.best_model} does not exist: that run has not finished an epoch. Go on with "
            "it first, or start from another run"
        )
    return Tokenizer.load(source.tokenizer)


def create(
    config: TrainConfig, recipe: str, folder: RunFolder, dataset: data.TextDataset,
    processes: Processes,
) -> Run:  # fmt: skip
    """A new run: its tokenizer is made from the training split, and `auto` is settled."""
    device = open_device(config.device, config.precision, processes)
    model = replace(config.model, num_classes=len(dataset.label_names))
    config = replace(config, model=model)
    backend = registry.resolve_name(
        model.attn_backend, device, torch.float32, model.d_model // model.num_heads
    )
    if config.init_from is None:
        tokenizer = Tokenizer.train(dataset.train.texts, model.vocab_size)
    else:
        config = replace(config, init_from=os.path.abspath(config.init_from))
        tokenizer = _tokenizer_to_start_from(config)
    described = describe(dataset)
    soft = None
    if config.pseudo_labels is not None:
        config = replace(config, pseudo_labels=os.path.abspath(config.pseudo_labels))
        soft = _load_pseudo_labels(config, dataset)
        described["pseudo_labels"] = soft.describe()
    run = RunConfig(config, backend, device.type, tuple(dataset.label_names), described, recipe)
    processes.barrier()  # everybody has seen that the folder is new
    if processes.main:
        folder.path.mkdir(parents=True, exist_ok=True)
        tokenizer.save(folder.tokenizer)
        run.save(folder.config)
    return _open(folder, run, device, tokenizer, dataset, soft)


@dataclass(frozen=True, eq=False)
class _SoftlyLabelled:
    """The unlabelled texts of a dataset, with what an ensemble says of them."""

    texts: list[str]
    labels: PseudoLabels

    def describe(self) -> dict[str, Any]:
        return {"texts": len(self.texts), "fingerprint": self.labels.fingerprint}


def _load_pseudo_labels(config: TrainConfig, dataset: data.TextDataset) -> _SoftlyLabelled:
    """Raises DataError, and CheckpointError for labels of other texts or other classes."""
    path = RunFolder(Path(str(config.pseudo_labels))).pseudo_labels
    labels = PseudoLabels.load(path)
    texts, _ = data.load_unlabelled(config.dataset, config.text_column)
    if labels.texts != data.texts_fingerprint(texts):
        raise CheckpointError(
            f"{path} labels other texts than the {len(texts):,} unlabelled ones that "
            f"{config.dataset!r} holds now. Make it again: fasttx ensemble --pseudo-labels"
        )
    if list(labels.label_names) != dataset.label_names:
        raise CheckpointError(
            f"{path} has the classes {', '.join(labels.label_names)}; expected those of "
            f"{config.dataset!r}: {', '.join(dataset.label_names)}"
        )
    if labels.splits != dataset.fingerprint:
        raise CheckpointError(
            f"{path} comes from other splits than this run's: its makers may have learnt the "
            "labels of texts that this run is validated on. Expected the --dataset, --split-seed "
            "and numbers of samples of the runs that made it"
        )
    return _SoftlyLabelled(texts, labels)


def fit(
    trainer: Trainer, train: Examples, validation: Examples, *, quiet: bool = False,
    unit: str = "reviews",
) -> Progress:  # fmt: skip
    """Train from where the run stands to its end, and show how it goes. Raises as Trainer.fit."""
    if trainer.restore():
        at = trainer.progress
        log.info("going on from epoch %d, step %d", at.epoch + 1, at.step)
    display = report.ProgressDisplay(trainer.config.epochs, len(train), quiet=quiet, unit=unit)
    try:
        return trainer.fit(train, validation, display.on_batch, display.on_epoch)
    finally:
        display.close()


def train_and_test(
    run: Run, model: torch.nn.Module, processes: Processes, *, quiet: bool = False
) -> dict[str, Any]:
    """Train a classifier from where its run stands to its end, and measure it on the test split.

    Saves what it answers there. What results.json is to hold; raises as `fit`.
    """
    trainer = Trainer(model, run.config, run.folder, run.device, processes)
    progress = fit(trainer, run.train, run.validation, quiet=quiet or not processes.main)
    # The epoch was chosen on the validation split; the test split is touched here, once.
    best = trainer.restore_best()
    log.info("\n%s\n", report.epoch_table(progress.history, best["epoch"]))
    log.info("measuring on the %s test reviews ...", f"{len(run.test):,}")
    predictions = Predictions(trainer.predict(run.test), run.test.labels)
    log.info("%s", format_metrics(predictions.metrics, list(run.config.label_names)))
    if processes.main:
        predictions.save(run.folder.test_predictions)
    return report.results(run.config, progress, predictions.metrics, model, run.device)


def resume(folder: RunFolder, run: RunConfig, processes: Processes) -> Run:
    """A run to go on with, on the same data, device and backend; CheckpointError if it cannot."""
    device = open_device(run.device, run.train.precision, processes)
    dataset = load_dataset(folder, run)
    soft = None
    if run.train.pseudo_labels is not None:
        soft = _load_pseudo_labels(run.train, dataset)
        if soft.describe() != run.dataset.get("pseudo_labels"):
            raise CheckpointError(
                f"{folder.config} was made with other pseudo-labels than {run.train.pseudo_labels} "
                "now holds. Bring them back, or start a new run"
            )
    return _open(folder, run, device, Tokenizer.load(folder.tokenizer), dataset, soft)


def load_dataset(folder: RunFolder, run: RunConfig) -> data.TextDataset:
    """The very texts and labels of a run. Raises DataError, and CheckpointError for others."""
    dataset = data.load(run.train)
    if dataset.fingerprint != run.dataset["fingerprint"]:
        raise CheckpointError(
            f"{folder.config} was made with other data: {run.train.dataset!r} now holds other "
            f"texts or labels than it did (fingerprint {dataset.fingerprint[:12]}, expected "
            f"{run.dataset['fingerprint'][:12]}). Bring the data back, or start a new run"
        )
    return dataset


def _open(
    folder: RunFolder, run: RunConfig, device: torch.device, tokenizer: Tokenizer,
    dataset: data.TextDataset, soft: _SoftlyLabelled | None,
) -> Run:  # fmt: skip
    t, max_len = run.train, run.train.model.max_len

    def measured(ids: RaggedIds, split: data.Split) -> Examples:
        ids, owner = read(ids, max_len, t.truncation, t.long_texts)
        return Examples(ids, split.labels, owner)

    splits = (dataset.train, dataset.validation, dataset.test)
    train, validation, test = (encode_cached(tokenizer, split.texts) for split in splits)
    labels = dataset.train.labels
    if soft is not None:
        train = RaggedIds.concatenate([train, encode_cached(tokenizer, soft.texts)])
        certain = np.eye(len(dataset.label_names), dtype=np.float32)[labels]
        labels = np.concatenate([certain, soft.labels.probabilities])
    return Run(
        folder, run, device, tokenizer,
        Examples(train.truncate(max_len, t.truncation), labels),
        measured(validation, dataset.validation), measured(test, dataset.test),
    )  # fmt: skip
