"""What a run says: while it goes on, when it ends, and in results.json."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fasttx import device as devices
from fasttx.config import ModelConfig
from fasttx.training.checkpoint import Progress, RunConfig, RunFolder
from fasttx.training.metrics import Metrics

log = logging.getLogger("fasttx")

TARGET_ACCURACIES = (0.85, 0.88)  # of validation; results.json tells when each was reached


@contextmanager
def log_file(path: Path, wanted: bool = True) -> Iterator[None]:
    """train.log, if `wanted`: every line with its time, after those of an earlier start."""
    if not wanted:
        yield
        return
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    with _handled_by(handler):
        yield


@contextmanager
def console(level: int = logging.INFO) -> Iterator[None]:
    """Lines of the `fasttx` logger to standard output, bare."""
    log.setLevel(level)
    with _handled_by(logging.StreamHandler(sys.stdout)):
        yield


@contextmanager
def _handled_by(handler: logging.Handler) -> Iterator[None]:
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


def clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


class ProgressDisplay:
    """A bar with samples/s and time left on a terminal; elsewhere a plain line every `seconds`."""

    def __init__(
        self, epochs: int, reviews: int, *, seconds: float = 30.0, quiet: bool = False,
        unit: str = "reviews",
    ) -> None:  # fmt: skip
        self.epochs, self.reviews, self.seconds, self.unit = epochs, reviews, seconds, unit
        self.bar: Any = None
        self.terminal = sys.stderr.isatty() and not quiet
        self.epoch = -1
        self.headed = False
        # Reviews of this epoch: by now, and after the first batch that this process saw, from
        # whose end on it takes the time.
        self.done = self.start = 0
        self.since = self.last = time.perf_counter()

    def _begin(self, progress: Progress, reviews: int) -> None:
        self.epoch = progress.epoch
        self.done = progress.samples - self.epoch * self.reviews - reviews
        self.start = self.done + reviews
        self.since = self.last = time.perf_counter()
        if self.terminal:
            try:
                from tqdm import tqdm
            except ImportError:
                return
            name = f"epoch {self.epoch + 1}/{self.epochs}"
            self.bar = tqdm(
                total=self.reviews, initial=self.done, desc=name, unit=" samples", leave=False
            )

    def on_batch(self, progress: Progress, reviews: int) -> None:
        if progress.epoch != self.epoch:
            self._begin(progress, reviews)
        self.done += reviews
        now = time.perf_counter()
        if self.bar is not None:
            self.bar.update(reviews)
        elif now - self.last >= self.seconds:
            self.last = now
            rate = max(self.done - self.start, 1) / (now - self.since)
            left = (self.reviews - self.done + self.reviews * (self.epochs - self.epoch - 1)) / rate
            log.info(
                "epoch %d/%d  %d of %d %s  %.1f samples/s  %s left",
                self.epoch + 1, self.epochs, self.done, self.reviews, self.unit, rate, clock(left),
            )  # fmt: skip

    def on_epoch(self, row: Mapping[str, Any]) -> None:
        self.close()
        if not self.headed:
            log.info(_EPOCH_HEAD)
        self.headed = True
        log.info(epoch_line(row))

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


_EPOCH_HEAD = "epoch  train loss  train acc  val loss  val acc  seconds  samples/s"


def epoch_line(row: Mapping[str, Any]) -> str:
    return (
        f"{row['epoch']:5d}  {row['train_loss']:10.4f}  {row['train_accuracy']:9.2%}"
        f"  {row['val_loss']:8.4f}  {row['val_accuracy']:7.2%}"
        f"  {row['seconds']:7.1f}  {row['samples_per_second']:9.1f}"
    )


def model_size(m: ModelConfig) -> str:
    return (
        f"d_model {m.d_model}, {m.num_heads} heads, {m.num_layers} layers, d_ff {m.d_ff}, "
        f"{m.vocab_size} words, dropout {m.dropout_text}"
    )


def heading(run: RunConfig, folder: RunFolder, device: torch.device) -> str:
    """What is about to be trained, on what, with which settings."""
    t, m = run.train, run.train.model
    auto = " (auto)" if m.attn_backend == "auto" else ""
    longer = t.truncation + (", measured in windows" if t.long_texts == "windows" else "")
    length = f"{m.max_len} tokens ({longer})"
    batch = t.batch_size * t.grad_accumulation
    more = ""
    if soft := run.dataset.get("pseudo_labels"):
        more = f", and {soft['texts']:,} texts with the labels of {t.pseudo_labels}"
    return f"""\
run        {folder.path}  (recipe {run.recipe}, seed {t.seed})
data       {run.dataset["name"]}{more}
model      {model_size(m)}, {length}
attention  {run.attn_backend}{auto} on {device}, {t.precision}, {torch.get_num_threads()} threads
training   {t.epochs} epochs, batch {batch}, {t.optimizer} at {t.lr:g} ({t.schedule})"""


def closing(results: Mapping[str, Any], folder: RunFolder) -> str:
    return (
        f"{results['dataset']['name']}: test accuracy {results['test_accuracy']:.2%} on "
        f"{results['dataset']['test_samples']:,} reviews (epoch {results['best_epoch']}, chosen by "
        f"validation accuracy {results['val_accuracy']:.2%})\n"
        f"trained at {results['samples_per_second']:.1f} samples/s, {clock(results['seconds'])}; "
        f"peak memory {results['peak_memory_mb']:.0f} MB\n"
        f'{folder.results}; try: fasttx predict {folder.path} "I expected nothing and loved it."'
        + (f"\n\n{results['warning']}" if results["warning"] else "")
    )


def epoch_table(history: Sequence[Mapping[str, Any]], best_epoch: int) -> str:
    rows = [
        epoch_line(row) + ("  <- best" if row["epoch"] == best_epoch else "") for row in history
    ]
    return "\n".join([_EPOCH_HEAD, *rows])


def label_table(counts: Mapping[str, Mapping[str, int]]) -> str:
    """Reviews by split and label, which is to be looked at before any accuracy."""
    return "\n".join(
        f"{split:>10}: {sum(labels.values()):6d} reviews  ("
        + ", ".join(f"{n} {label}" for label, n in labels.items())
        + ")"
        for split, labels in counts.items()
    )


def single_class_warning(counts: Mapping[str, Mapping[str, int]]) -> str | None:
    """Why an accuracy on a split with one label says nothing; None where every split has more."""
    single = {
        split: next(label for label, n in labels.items() if n)
        for split, labels in counts.items()
        if sum(n > 0 for n in labels.values()) == 1
    }
    if not single:
        return None
    where = ", ".join(f"{split}: only {label!r}" for split, label in single.items())
    return (
        f"ONE CLASS ONLY ({where}). The file is sorted by label and its first rows were taken, so "
        "a model that always gives this one answer is right every time: an accuracy of 100 % here "
        "is an artefact and says nothing about the model. Draw the subset shuffled "
        "(--subset-order shuffled) for an honest figure."
    )


def _mps_choices(run: RunConfig) -> dict[str, Any]:
    """Which paths backend mps took in this run and why; empty on another backend."""
    if run.attn_backend != "mps":
        return {}
    from fasttx.ops.mps import adapter as mps

    return mps.choices()


def time_to_accuracy(history: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Seconds of training (evaluation not counted) until the end of the first epoch with such a
    validation accuracy; None where no epoch reached it."""
    reached: dict[str, float | None] = {}
    for target in TARGET_ACCURACIES:
        seconds = 0.0
        reached[f"{target:g}"] = None
        for row in history:
            seconds += row["seconds"]
            if row["val_accuracy"] >= target:
                reached[f"{target:g}"] = seconds
                break
    return reached


def results(
    run: RunConfig, progress: Progress, test: Metrics, model: torch.nn.Module,
    device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    """results.json: what came out, and everything needed to judge it."""
    best = progress.best or {}
    measured = test.to_dict()
    return {
        "test_accuracy": measured["accuracy"],
        "test_loss": measured["loss"],
        "confusion_matrix": measured["confusion_matrix"],
        "test": measured,
        "val_accuracy": best.get("val_accuracy"),
        "best_epoch": best.get("epoch"),
        "samples_per_second": progress.samples / progress.seconds,
        "seconds": progress.seconds,
        "time_to_accuracy": time_to_accuracy(progress.history),
        "peak_memory_mb": devices.peak_memory_mb(device),
        "parameters": sum(p.numel() for p in model.parameters()),
        "attn_backend": run.attn_backend,
        "device": str(device),
        "precision": run.train.precision,
        "seed": run.train.seed,
        "recipe": run.recipe,
        "dataset": run.dataset,
        "warning": single_class_warning(run.dataset["label_counts"]),
        "history": progress.history,
        "config": run.train.to_dict(),
        "versions": devices.versions(),
        "hardware": devices.hardware(device),
        "mps": _mps_choices(run),
    }
