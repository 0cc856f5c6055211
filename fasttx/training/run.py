"""The life of a run, whatever its task: created or resumed, trained, measured, finished."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fasttx import device as devices
from fasttx.config import TrainConfig
from fasttx.errors import CheckpointError, ConfigError, DataError, DeviceError, Interrupted
from fasttx.text import splits as data
from fasttx.training import distributed
from fasttx.training.checkpoint import (
    RunConfig,
    load_tokenizer,
    read_json,
)
from fasttx.training.distributed import Processes
from fasttx.training.folder import Manifest, RunFolder
from fasttx.training.progress import ProgressDisplay, console, log_file
from fasttx.training.task import Run, Task
from fasttx.training.trackers import Trackers
from fasttx.training.trainer import Trainer

log = logging.getLogger("fasttx")


@contextmanager
def session(*, quiet: bool = False) -> Iterator[Processes]:
    """Join torchrun's processes, if any; the main one's log goes to standard output, unless it is
    to be quiet there."""
    processes = distributed.start()
    try:
        with console(logging.INFO if processes.main and not quiet else logging.ERROR):
            yield processes
    finally:
        distributed.stop(processes)


# --- opened ---------------------------------------------------------------------------------------


def to_resume(resume: Path | None, out: Path | None, processes: Processes) -> Path | None:
    """The run to go on with: `resume`; or, once torchrun has started a training again, the one that
    it had begun in `out`. Raises ConfigError where that has no name."""
    if resume or not distributed.restarted():
        return resume
    if out is None:
        raise ConfigError(
            "torchrun has started this training again and cannot tell which run it was; expected "
            "--out DIR where it may restart"
        )
    return processes.from_main(out if RunFolder(out).config.exists() else None)


def create(
    task: Task,
    config: TrainConfig,
    source: data.Source,
    recipe: str,
    out: Path | None,
    processes: Processes,
) -> Run:
    """A new run on the texts of `source`, in the folder `out` or in runs/<recipe>-<time>.

    Its tokenizer is made, and what was `auto` is settled. Raises FasttxError.
    """
    paths = {k: v for k in ("init_from", "pseudo_labels") if (v := getattr(config, k)) is not None}
    paths = {name: os.path.expanduser(path) for name, path in paths.items()}
    # What is no folder is a name on a hub.
    paths = {k: os.path.abspath(v) if os.path.exists(v) else v for k, v in paths.items()}
    config = replace(config, dataset=source.name, **paths)
    folder = new_folder(out, recipe, processes, task.command)
    try:
        return _begin(task, config, source, recipe, folder, processes)
    except BaseException:
        if processes.main:
            folder.discard()
        raise


def _begin(
    task: Task,
    config: TrainConfig,
    source: data.Source,
    recipe: str,
    folder: RunFolder,
    processes: Processes,
) -> Run:
    device = _open_device(config.device, config.precision, processes)
    loaded = task.load(config)
    for note in (*source.notes, *loaded.notes):
        log.info("%s", note)
    if loaded.label_names:
        config = replace(config, model=replace(config.model, num_classes=len(loaded.label_names)))
    backend = task.backend(config, device)
    tokenizer = task.tokenizer(config, loaded.texts)
    saved = RunConfig(
        config, backend, device.type, loaded.label_names, loaded.described, recipe, task.name,
        task.origin_sha256(config), processes.from_main(task.choices(backend)),
    )  # fmt: skip
    task.choose(backend, saved.choices or {})
    splits = loaded.examples(config, tokenizer)
    if processes.main:
        folder.write_json(folder.tokenizer, tokenizer.to_dict())
        folder.write_json(folder.config, saved.to_dict())  # last: from now on it is a run
    processes.barrier()
    return Run(task, saved, folder, device, processes, splits, loaded.validation)


def resume(task: Task, folder: RunFolder, saved: RunConfig, processes: Processes) -> Run | None:
    """A run to go on with, on the same data, device and backend; None if it is finished.

    Raises CheckpointError if it cannot go on, InUseError if another process goes on with it.
    """
    if folder.results.exists():
        read_json(folder.results)
        log.info("%s is finished: its results are in %s", folder.path, folder.results)
        return None
    if processes.main:
        folder.open()
    try:
        return _go_on(task, folder, saved, processes)
    except BaseException:
        folder.close()
        raise


def _go_on(task: Task, folder: RunFolder, saved: RunConfig, processes: Processes) -> Run:
    config = saved.train
    with _as_it_was(folder):
        device = _open_device(saved.device, config.precision, processes)
        task.backend(config, device)
        task.choose(saved.attn_backend, saved.choices or {})
        loaded = task.load(config)
    _check_same_data(folder, saved, loaded.described["fingerprint"], loaded.label_names)
    if loaded.described.get("pseudo_labels") != saved.dataset.get("pseudo_labels"):
        raise CheckpointError(
            f"{folder.config} was made with other pseudo-labels than {config.pseudo_labels} "
            "now holds. Bring them back, or start a new run"
        )
    splits = loaded.examples(config, load_tokenizer(folder, config.model.vocab_size))
    if processes.main and not Manifest(folder.path).exists():  # a run of the first format
        folder.seal()
    return Run(task, saved, folder, device, processes, splits, loaded.validation)


def new_folder(out: Path | None, recipe: str, processes: Processes, resume: str) -> RunFolder:
    """`out`, or runs/<recipe>-<time>, made for this process alone. Refuses what holds anything.

    resume: the command that goes on with such a run.
    """
    if not processes.main:
        return RunFolder(processes.from_main(None))
    if out is None:
        folder = RunFolder.unique(Path("runs"), f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}")
    else:
        folder = RunFolder(out)
    folder.create(resume)
    processes.from_main(folder.path)
    return folder


def load_dataset(folder: RunFolder, saved: RunConfig) -> data.TextDataset:
    """The very texts and labels of a run. Raises DataError, and CheckpointError for others."""
    with _as_it_was(folder):
        dataset = data.load(saved.train)
    _check_same_data(folder, saved, dataset.fingerprint, dataset.label_names)
    return dataset


@contextmanager
def _as_it_was(folder: RunFolder) -> Iterator[None]:
    """What a run has its settings for can only be as it was. So an error keeps its reason, and not
    its advice, which names flags of new runs."""
    try:
        yield
    except (DataError, DeviceError) as error:
        reason = re.split(r"[.;?] ", str(error))[0]
        raise type(error)(
            f"{folder.path} needs its data and its device as they were: {reason}. Bring them back, "
            "or start a new run"
        ) from error


def _check_same_data(
    folder: RunFolder, saved: RunConfig, fingerprint: str, label_names: Sequence[str]
) -> None:
    expected = saved.dataset["fingerprint"]
    if fingerprint != expected:
        raise CheckpointError(
            f"{folder.config} was made with other texts or labels than {saved.train.dataset!r} now "
            f"holds (fingerprint {fingerprint[:12]}, expected {expected[:12]}). Bring the data "
            "back, or start a new run"
        )
    if list(label_names) != list(saved.label_names):  # the fingerprint has their numbers only
        raise CheckpointError(
            f"{folder.config} was made with the classes {', '.join(saved.label_names)}; "
            f"{saved.train.dataset!r} now calls them {', '.join(label_names)}. Bring the names "
            "back, or start a new run"
        )


def _open_device(name: str, precision: str, processes: Processes) -> torch.device:
    device = devices.pick(name)
    if device.type == "cuda" and processes.world > 1:
        device = torch.device("cuda", processes.local_rank)
        torch.cuda.set_device(device)
    devices.set_precision(device, precision)
    return device


# --- trained, measured, finished ------------------------------------------------------------------


def train(run: Run, *, quiet: bool = False, log_to: Sequence[str] = ()) -> dict[str, Any]:
    """Train from where the run stands to its end, measure, and write results.json. Its content.

    log_to: names of `trackers` that are given the numbers of metrics.jsonl too. Raises Interrupted
    (the run is saved and can be resumed) and DivergedError.
    """
    folder, main = run.folder, run.processes.main
    try:
        with log_file(folder.log, main):
            return _train(run, Trackers(log_to if main else ()), quiet=quiet or not main)
    finally:
        folder.close()


def _train(run: Run, trackers: Trackers, *, quiet: bool) -> dict[str, Any]:
    try:
        results = _to_the_end(run, trackers, quiet=quiet)
    except BaseException:
        trackers.close(failed=True)
        raise
    trackers.close()
    return results


def _to_the_end(run: Run, trackers: Trackers, *, quiet: bool) -> dict[str, Any]:
    folder = run.folder
    model = _start(run)
    trainer = Trainer(run, model)
    try:
        _fit(trainer, trackers, quiet=quiet)
    except Interrupted:
        how = f"{run.task.command} --resume {folder.path}"
        log.info("stopped and saved; go on with: %s", how)
        raise
    # The epoch was chosen on the validation split; the test split is touched here, once.
    trainer.restore_best()
    results = run.task.results(run, model, trainer.progress)
    if run.processes.main:
        folder.finish(trainer.progress.metrics_sha256)
        folder.write_json(folder.results, results)
        trackers.results(results, trainer.progress.step)
        log.info("%s", run.task.closing(run, results))
    return results


def _start(run: Run) -> nn.Module:
    """The model as training finds it at its first step."""
    config = run.config.train
    torch.manual_seed(config.seed)
    model = run.task.model(replace(config.model, attn_backend=run.config.attn_backend))
    model = model.to(run.device)
    for paragraph in run.task.heading(run, model):
        log.info("%s", paragraph)
    if run.folder.last.exists():
        return model
    if config.init_from:
        log.info("encoder    starts from %s", config.init_from)
        run.task.start(config, model, run.config.init_from_sha256)
    run.task.begin(run, model)
    return model


def _fit(trainer: Trainer, trackers: Trackers, *, quiet: bool) -> None:
    run = trainer.run
    if trainer.restore():
        at = trainer.progress
        log.info("going on from epoch %d, step %d", at.epoch + 1, at.step)
    trackers.begin(run, trainer.progress.step)
    epochs, samples = run.config.train.epochs, len(run.splits.train)
    display = ProgressDisplay(
        epochs, samples, quiet=quiet, unit=run.task.unit, measure=trainer.measure
    )
    try:
        trainer.fit(display.on_batch, display.on_epoch, trackers.log)
    finally:
        display.close()
