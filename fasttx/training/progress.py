"""What is shown of a training while it goes on, and where its log lines go."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fasttx import terminal
from fasttx.training.checkpoint import Progress
from fasttx.training.measures import ACCURACY, Measure

log = logging.getLogger("fasttx")


@contextmanager
def log_file(path: Path, wanted: bool = True) -> Iterator[None]:
    """train.log, if `wanted`: every line with its time, after those of an earlier start."""
    if not wanted:
        yield
        return
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(_Visible("%(asctime)s %(message)s"))
    with _handled_by(handler, str(path)):
        yield


@contextmanager
def console(level: int = logging.INFO) -> Iterator[None]:
    """Lines of the `fasttx` logger to standard output, bare, from `level` on; to a log file all."""
    log.setLevel(logging.INFO)
    handler = logging.StreamHandler(sys.stdout)
    handler.setLevel(level)
    handler.setFormatter(_Visible("%(message)s"))
    with _handled_by(handler, terminal.STANDARD_OUTPUT):
        yield


class _Visible(logging.Formatter):
    """Labels and file names cannot steer the terminal that shows a line, or the file later on."""

    def format(self, record: logging.LogRecord) -> str:
        return terminal.visible(super().format(record))


@contextmanager
def _handled_by(handler: logging.Handler, where: str) -> Iterator[None]:
    """Log lines go to `handler`. A training does not end because a line of it cannot be written
    (a full disk, a closed terminal): the OSError is raised at the end, and names `where`."""
    failures: list[OSError] = []
    usual = handler.handleError

    def handle_error(record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            handler.setLevel(logging.CRITICAL + 1)  # nothing more goes there
            error.filename = where
            failures.append(error)
        elif not (isinstance(error, RuntimeError) and "reentrant" in str(error)):
            usual(record)  # a line from a signal handler, in the midst of another line, is dropped

    handler.handleError = handle_error  # type: ignore[method-assign]
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        with suppress(OSError):  # what it still holds cannot be written either
            handler.close()
    if failures:
        raise failures[0]


def clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


class ProgressDisplay:
    """A bar with samples/s and time left on a terminal; elsewhere a plain line every `seconds`."""

    def __init__(
        self,
        epochs: int,
        samples: int,
        *,
        seconds: float = 30.0,
        quiet: bool = False,
        unit: str = "reviews",
        measure: Measure = ACCURACY,
    ) -> None:
        self.measure = measure
        self.epochs, self.samples, self.seconds, self.unit = epochs, samples, seconds, unit
        self.bar: Any = None
        self.terminal = sys.stderr.isatty() and not quiet
        self.epoch = -1
        self.headed = False
        # Samples of this epoch: done by now, and done when the clock was started, which is after
        # the first batch that this process saw.
        self.done = self.start = 0
        self.since = self.last = time.perf_counter()

    def _begin(self, progress: Progress, samples: int) -> None:
        self.epoch = progress.epoch
        self.done = progress.samples - self.epoch * self.samples - samples
        self.start = self.done + samples
        self.since = self.last = time.perf_counter()
        if self.terminal:
            try:
                from tqdm import tqdm
            except ImportError:
                return
            name = f"epoch {self.epoch + 1}/{self.epochs}"
            self.bar = tqdm(
                total=self.samples, initial=self.done, desc=name, unit=" samples", leave=False
            )

    def on_batch(self, progress: Progress, samples: int) -> None:
        if progress.epoch != self.epoch:
            self._begin(progress, samples)
        self.done += samples
        now = time.perf_counter()
        if self.bar is not None:
            try:
                self.bar.update(samples)
            except OSError:  # the terminal is gone; the training goes on
                self.bar, self.terminal = None, False
        elif now - self.last >= self.seconds:
            self.last = now
            rate = max(self.done - self.start, 1) / (now - self.since)
            left = (self.samples - self.done + self.samples * (self.epochs - self.epoch - 1)) / rate
            done = f"{self.done} of {self.samples} {self.unit}  {rate:.1f} samples/s"
            epoch = f"epoch {self.epoch + 1}/{self.epochs}"
            log.info("%s  %s  %s left", epoch, done, clock(left))

    def on_epoch(self, row: Mapping[str, Any]) -> None:
        self.close()
        if not self.headed:
            log.info(epoch_head(self.measure))
        self.headed = True
        log.info(epoch_line(row, self.measure))

    def close(self) -> None:
        if self.bar is not None:
            with suppress(OSError):
                self.bar.close()
            self.bar = None


def epoch_head(measure: Measure = ACCURACY) -> str:
    trained, chosen = _titles(measure)
    return f"epoch  train loss  {trained}  val loss  {chosen}  seconds  samples/s"


def epoch_line(row: Mapping[str, Any], measure: Measure = ACCURACY) -> str:
    trained, chosen = _titles(measure)
    return (
        f"{row['epoch']:5d}  {row['train_loss']:10.4f}"
        f"  {measure.shown(row[f'train_{measure.trained}']):>{len(trained)}}"
        f"  {row['val_loss']:8.4f}  {measure.shown(row[f'val_{measure.chosen}']):>{len(chosen)}}"
        f"  {row['seconds']:7.1f}  {row['samples_per_second']:9.1f}"
    )


def _titles(measure: Measure) -> tuple[str, str]:
    short = {"accuracy": "acc"}
    trained = short.get(measure.trained_title, measure.trained_title)
    return f"train {trained}", f"val {short.get(measure.chosen_title, measure.chosen_title)}"


def epoch_table(
    history: Sequence[Mapping[str, Any]], best_epoch: int, measure: Measure = ACCURACY
) -> str:
    rows = [
        epoch_line(row, measure) + ("  <- best" if row["epoch"] == best_epoch else "")
        for row in history
    ]
    return "\n".join([epoch_head(measure), *rows])
