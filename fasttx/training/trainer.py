"""Training: the loop, the choice of the best epoch, and a resume that changes nothing.

Everything random is a pure function of the seed and the place in the run, so a checkpoint holds
weights, optimiser and counters only, and a resumed CPU run ends bit-identical to an unbroken one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fasttx import device as devices
from fasttx.errors import CheckpointError, DivergedError, Interrupted, NotFiniteError
from fasttx.ops.dropout import forward_seed
from fasttx.text.packing import PackedBatch, shuffled_batches
from fasttx.training import divergence
from fasttx.training.checkpoint import (
    Progress,
    fit_weights,
    load_state,
    load_weights,
    not_finite,
    save_state,
)
from fasttx.training.optimizer import check_optimizer_state, learning_rate, make_optimizer
from fasttx.training.task import Run

log = logging.getLogger("fasttx")

_NEVER = 2**62  # a micro-step that no run reaches
BATCH_STREAM = 1  # keeps the draws of a batch apart from the shuffle's, which have the same seed


class Trainer:
    """The training of one run. The model is already on its device."""

    def __init__(self, run: Run, model: nn.Module) -> None:
        self.run, self.model, self.config = run, model, run.config.train
        self.folder, self.device, self.processes = run.folder, run.device, run.processes
        self.optimizer = make_optimizer(model, self.config)
        enabled = self.config.precision == "fp16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=enabled)
        module: nn.Module = self.processes.wrap(model, self.device)
        self.module: Any = torch.compile(module, dynamic=True) if self.config.compile else module
        self.measure = run.task.measures(self.config)
        self.progress = Progress(chosen=self.measure.chosen, more_is_better=self.measure.is_share)
        self._upload = devices.Uploads(self.device)
        # MPS has no float64.
        sums = torch.float32 if self.device.type == "mps" else torch.float64
        self._totals = torch.zeros(4, dtype=sums, device=self.device)
        # The first micro-step of this process whose loss was not finite, kept on the device.
        self._bad_step = torch.full((), _NEVER, dtype=torch.int64, device=self.device)
        self._metrics_digest = hashlib.sha256()
        self._stop = False
        self._saved_at = time.perf_counter()

    # --- checkpoints ------------------------------------------------------------------------------

    def restore(self) -> bool:
        """Go on from `last.ckpt`; False, changing nothing, where there is none yet."""
        if not self.folder.last.exists():
            return False
        state = load_state(self.folder.last)
        try:
            model, optimizer, progress = state["model"], state["optimizer"], state["progress"]
            check_optimizer_state(self.optimizer, optimizer)
            fit_weights(self.model, model, self.folder.last)
            self.optimizer.load_state_dict(optimizer)
            self.scaler.load_state_dict(state["scaler"])
            self.progress = Progress.of(progress)
        except CheckpointError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise CheckpointError(f"{self.folder.last} does not fit this run: {error}") from error
        if bad := self._not_finite():
            raise CheckpointError(
                f"{self.folder.last} holds numbers that are not finite, in {bad}: the training had "
                f"diverged. Start a new run with {self.run.task.tamer}"
            )
        if self.processes.main:
            self._totals += torch.tensor(self.progress.totals, dtype=self._totals.dtype)
        return True

    def restore_best(self) -> None:
        """Load the weights of the best epoch."""
        self.processes.barrier()  # the main process may still be writing the file
        load_weights(self.model, self.folder.best_model)

    def _save(self) -> None:
        """Collective: the totals of all processes are read, the main one writes.

        Raises DivergedError, writing nothing, where a loss or a weight is not finite."""
        self._read_totals()
        if bad := self._not_finite():
            raise self._diverged(f"the numbers of {bad} are not finite")
        if self.processes.main:
            state = {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "progress": vars(self.progress).copy(),
            }
            save_state(self.folder, self.folder.last, state)
        self._saved_at = time.perf_counter()

    def _read_totals(self) -> None:
        """The one wait for the device: at log lines, checkpoints and the end of an epoch."""
        self.progress.totals = self.processes.sum(self._totals).tolist()
        self._upload.waited()
        loss = self.progress.totals[0]
        if not math.isfinite(loss):
            step = self.processes.least(int(self._bad_step))
            raise self._diverged(f"the loss is {loss}", step)

    def _not_finite(self) -> str | None:
        """The name of a weight, or of a number the optimiser keeps for one, that is not finite."""
        numbers: dict[str, Any] = dict(self.model.state_dict())
        names: dict[Tensor, str] = {p: name for name, p in self.model.named_parameters()}
        for p, kept in self.optimizer.state.items():
            numbers |= {f"the optimiser's {k} of {names[p]}": v for k, v in kept.items()}
        return not_finite(numbers)

    def _diverged(self, what: str, micro_step: int | None = None) -> DivergedError:
        """The error to raise. micro_step: where it began; the last one, if nothing tells."""
        last = max(0, self.progress.micro_step - 1)
        return divergence.recorded(
            self.run, what, last if micro_step is None else min(micro_step, last)
        )

    # --- the loop ---------------------------------------------------------------------------------

    def fit(
        self,
        on_batch: Callable[[Progress, int], None] = lambda progress, samples: None,
        on_epoch: Callable[[dict[str, Any]], None] = lambda row: None,
        on_row: Callable[[dict[str, Any], int], None] = lambda row, step: None,
    ) -> Progress:
        """Train to the end; on_row is given what is written to metrics.jsonl, and the step.

        Raises Interrupted (saved, resumable) and DivergedError.
        """
        self._trim_metrics()
        with self._signals():
            while self.progress.epoch < self.config.epochs:
                self._train_epoch(on_batch, on_row)
                row = self._end_epoch()
                on_row(row, self.progress.step)
                on_epoch(row)
        return self.progress

    def _groups(self) -> list[list[tuple[int, np.ndarray]]]:
        """The batches of this epoch, numbered, in groups of one optimiser step."""
        c, count, epoch = self.config, len(self.run.splits.train), self.progress.epoch
        batches = list(enumerate(shuffled_batches(count, c.batch_size, seed=c.seed, epoch=epoch)))
        n = c.grad_accumulation
        return [batches[i : i + n] for i in range(0, len(batches), n)]

    def _train_epoch(
        self,
        on_batch: Callable[[Progress, int], None],
        on_row: Callable[[dict[str, Any], int], None],
    ) -> None:
        progress, config = self.progress, self.config
        groups = self._groups()
        self.module.train()
        before, start = progress.epoch_seconds, time.perf_counter()
        for group in groups[-(-progress.batch // config.grad_accumulation) :]:
            for values in self.optimizer.param_groups:
                values["lr"] = learning_rate(config, progress.step, len(groups) * config.epochs)
            self._step(group)
            progress.epoch_seconds = before + time.perf_counter() - start
            on_batch(progress, sum(len(indices) for _, indices in group))
            if progress.step % config.log_every == 0:
                on_row(self._log_interval(), progress.step)
            due = time.perf_counter() - self._saved_at > config.checkpoint_seconds
            if self.processes.any(due or self._stop):
                self._save()
            if self.processes.any(self._stop):
                raise Interrupted
        devices.synchronize(self.device)
        progress.epoch_seconds = before + time.perf_counter() - start

    def _step(self, group: list[tuple[int, np.ndarray]]) -> None:
        """One optimiser step on a group of batches, each shared out among the processes."""
        samples = sum(len(indices) for _, indices in group)
        self.optimizer.zero_grad(set_to_none=True)
        batches = [self._batch(number, indices) for number, indices in group]
        labels = self._labels_of(batches, samples)
        for k, (batch, (_, indices)) in enumerate(zip(batches, group, strict=True)):
            last = k == len(group) - 1
            several = self.processes.world > 1 and not last
            with self.module.no_sync() if several else nullcontext():
                self._micro_step(batch, labels, len(self.processes.share(indices)))
        if self.config.grad_clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.progress.step += 1
        self.progress.batch = group[-1][0] + 1
        self.progress.samples += samples

    def _batch(self, number: int, indices: np.ndarray) -> PackedBatch:
        """This process's share of a batch, on the host."""
        run, rank = self.run, self.processes.rank
        stream = (self.config.seed, BATCH_STREAM, self.progress.epoch, number, rank)
        return run.task.batch(run, run.splits.train, self.processes.share(indices), stream)

    def _labels_of(self, batches: list[PackedBatch], samples: int) -> int:
        """How many labels a step has over all its batches and processes: its loss is their mean.

        That is one a text, but for hidden words, which only the process that hides them counts."""
        if all(batch.rows is None for batch in batches):
            return samples
        mine = sum(len(batch.labels) for batch in batches if batch.labels is not None)
        return max(1, int(self.processes.sum(torch.tensor(mine))))

    def _micro_step(self, batch: PackedBatch, labels: int, samples: int) -> None:
        """Forward and backward on one batch of a step that has `labels` labels in all."""
        run, progress, rank = self.run, self.progress, self.processes.rank
        assert batch.labels is not None
        count = len(batch.labels)
        seed = forward_seed(self.config.seed, progress.micro_step, rank)
        torch.manual_seed(seed)  # for backends that draw from torch's generator
        batch, on_device = self._upload(batch), self._upload(torch.tensor(seed))
        loss, measured = run.task.loss(run, self.module, batch, on_device)
        # DDP averages the gradients of its processes; the mean over the step's labels is wanted.
        self.scaler.scale(loss * (self.processes.world / labels)).backward()
        with torch.no_grad():
            loss = loss.detach()
            self._totals += torch.stack(
                [
                    loss,
                    measured.to(loss.dtype),
                    torch.full_like(loss, count),
                    torch.full_like(loss, samples),
                ]
            )
            bad = torch.where(loss.isfinite(), _NEVER, progress.micro_step)
            self._bad_step = torch.minimum(self._bad_step, bad)
        progress.micro_step += 1

    def _end_epoch(self) -> dict[str, Any]:
        run, progress = self.run, self.progress
        self._read_totals()
        if bad := self._not_finite():
            raise self._diverged(f"the numbers of {bad} are not finite")
        measure = self.measure
        loss, measured, count, samples = progress.totals
        try:
            val_loss, chosen = run.task.measure(run, self.model, run.splits.validation)
        except NotFiniteError as error:
            what = f"on the validation split, {error}"
            raise self._diverged(what) from error
        if not math.isfinite(val_loss):
            what = f"the loss on the validation split is {val_loss}"
            raise self._diverged(what)
        row = {
            "kind": "epoch",
            "epoch": progress.epoch + 1,
            "train_loss": loss / count,
            f"train_{measure.trained}": measured / count,
            "val_loss": val_loss,
            f"val_{measure.chosen}": chosen,
            "seconds": progress.epoch_seconds,
            "samples_per_second": samples / progress.epoch_seconds,
        }
        progress.history.append(row)
        self._write_metrics(row)
        if progress.best is row and self.processes.main:
            save_state(self.folder, self.folder.best_model, self.model.state_dict())
        progress.epoch, progress.batch = progress.epoch + 1, 0
        progress.seconds += progress.epoch_seconds
        progress.epoch_seconds = 0.0
        self._totals.zero_()
        progress.logged = [0.0, 0.0, 0.0, 0.0]
        self._save()
        return row

    # --- metrics.jsonl ----------------------------------------------------------------------------

    def _log_interval(self) -> dict[str, Any]:
        self._read_totals()
        progress = self.progress
        loss, measured, count, _ = np.subtract(progress.totals, progress.logged).tolist()
        progress.logged = list(progress.totals)
        row = {
            "kind": "train",
            "epoch": progress.epoch + 1,
            "step": progress.step,
            "loss": loss / count,
            self.measure.trained: measured / count,
            "lr": self.optimizer.param_groups[0]["lr"],
            "samples_per_second": progress.totals[3] / progress.epoch_seconds,
        }
        self._write_metrics(row)
        return row

    def _write_metrics(self, *rows: dict[str, Any]) -> None:
        if self.processes.main:
            lines = b"".join(json.dumps(row, allow_nan=False).encode() + b"\n" for row in rows)
            with open(self.folder.metrics, "ab") as f:
                f.write(lines)
                self.progress.metrics_bytes = f.tell()
            self._metrics_digest.update(lines)
            self.progress.metrics_sha256 = self._metrics_digest.hexdigest()

    def _trim_metrics(self) -> None:
        """Cut off the lines that were written after the checkpoint this run goes on from.

        Of a file that is damaged the lines of the epochs are written anew: training needs none."""
        if not self.processes.main:
            return
        progress = self.progress
        written = b""
        with contextlib.suppress(FileNotFoundError):
            written = self.folder.metrics.read_bytes()[: progress.metrics_bytes]
        self._metrics_digest = hashlib.sha256(written)
        sound = progress.metrics_sha256 in (None, self._metrics_digest.hexdigest())
        if len(written) == progress.metrics_bytes and sound:
            with open(self.folder.metrics, "ab") as f:
                f.truncate(progress.metrics_bytes)
            return
        log.warning(
            "%s was damaged: it has the lines of the epochs again, those of their steps are lost",
            self.folder.metrics,
        )
        self.folder.metrics.unlink(missing_ok=True)
        self._metrics_digest = hashlib.sha256()
        self._write_metrics(*progress.history)

    # --- signals ----------------------------------------------------------------------------------

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM asks for a stop at the next step; a second ends at once."""

        old: dict[int, Any] = {}

        def ask(number: int, frame: Any) -> None:
            self._stop = True
            log.info("stopping after this step and saving; once more to stop at once")
            signal.signal(number, old.get(number, signal.default_int_handler))

        try:
            for s in (signal.SIGINT, signal.SIGTERM):
                old[s] = signal.signal(s, ask)
        except ValueError:  # not the main thread: signals are somebody else's
            yield
            return
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
