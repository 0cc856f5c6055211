"""Training: the loop, the choice of the best epoch, and a resume that changes nothing.

Everything random is a pure function of the seed and the place in the run, so a checkpoint holds
weights, optimiser and counters only, and a resumed CPU run ends bit-identical to an unbroken one.
"""

from __future__ import annotations

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
from torch import nn

from fasttx import device as devices
from fasttx.errors import CheckpointError, DivergedError, Interrupted
from fasttx.ops.dropout import forward_seed
from fasttx.text.packing import shuffled_batches
from fasttx.training.checkpoint import Progress, load_state, load_weights, save_state
from fasttx.training.optimizer import learning_rate, make_optimizer
from fasttx.training.task import Run

log = logging.getLogger("fasttx")

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
        self.progress = Progress()
        self._upload = devices.Uploads(self.device)
        # MPS has no float64.
        sums = torch.float32 if self.device.type == "mps" else torch.float64
        self._totals = torch.zeros(3, dtype=sums, device=self.device)
        self._stop = False
        self._saved_at = time.perf_counter()

    # --- checkpoints ------------------------------------------------------------------------------

    def restore(self) -> bool:
        """Go on from `last.ckpt`; False, changing nothing, where there is none yet."""
        if not self.folder.last.exists():
            return False
        state = load_state(self.folder.last)
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.progress = Progress(**state["progress"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{self.folder.last} does not fit this run: {error}") from error
        if self.processes.main:
            self._totals += torch.tensor(self.progress.totals, dtype=self._totals.dtype)
        return True

    def restore_best(self) -> None:
        """Load the weights of the best epoch."""
        self.processes.barrier()  # the main process may still be writing the file
        load_weights(self.model, self.folder.best_model)

    def _save(self) -> None:
        """Collective: the totals of all processes are read, the main one writes."""
        self._read_totals()
        if self.processes.main:
            state = {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "progress": vars(self.progress).copy(),
            }
            save_state(self.folder.last, state)
        self._saved_at = time.perf_counter()

    def _read_totals(self) -> None:
        """The one wait for the device: at log lines, checkpoints and the end of an epoch."""
        self.progress.totals = self.processes.sum(self._totals).tolist()
        self._upload.waited()
        if not math.isfinite(self.progress.totals[0]):
            raise DivergedError(
                f"the loss is {self.progress.totals[0]} in epoch {self.progress.epoch + 1}, before "
                f"step {self.progress.step}. Try a lower --lr, --grad-clip 1, or --precision fp32; "
                f"{self.folder.last} still holds the last sound state"
            )

    # --- the loop ---------------------------------------------------------------------------------

    def fit(
        self,
        on_batch: Callable[[Progress, int], None] = lambda progress, samples: None,
        on_epoch: Callable[[dict[str, Any]], None] = lambda row: None,
    ) -> Progress:
        """Train to the end. Raises Interrupted (saved, resumable) and DivergedError."""
        self._trim_metrics()
        with self._signals():
            while self.progress.epoch < self.config.epochs:
                self._train_epoch(on_batch)
                on_epoch(self._end_epoch())
        return self.progress

    def _groups(self) -> list[list[tuple[int, np.ndarray]]]:
        """The batches of this epoch, numbered, in groups of one optimiser step."""
        c, count, epoch = self.config, len(self.run.splits.train), self.progress.epoch
        batches = list(enumerate(shuffled_batches(count, c.batch_size, seed=c.seed, epoch=epoch)))
        n = c.grad_accumulation
        return [batches[i : i + n] for i in range(0, len(batches), n)]

    def _train_epoch(self, on_batch: Callable[[Progress, int], None]) -> None:
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
                self._log_interval()
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
        for k, (number, indices) in enumerate(group):
            last = k == len(group) - 1
            several = self.processes.world > 1 and not last
            with self.module.no_sync() if several else nullcontext():
                self._micro_step(number, indices, samples)
        if self.config.grad_clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.progress.step += 1
        self.progress.batch = group[-1][0] + 1
        self.progress.samples += samples

    def _micro_step(self, number: int, indices: np.ndarray, samples: int) -> None:
        """Forward and backward on one batch of a step on `samples` examples."""
        run, config, progress, rank = self.run, self.config, self.progress, self.processes.rank
        mine = self.processes.share(indices)
        stream = (config.seed, BATCH_STREAM, progress.epoch, number, rank)
        batch = self._upload(run.task.batch(run, run.splits.train, mine, stream))
        labels = batch.labels
        assert labels is not None
        seed = forward_seed(config.seed, progress.micro_step, rank)
        torch.manual_seed(seed)  # for backends that draw from torch's generator
        on_device = self._upload(torch.tensor(seed))
        loss, correct = run.task.loss(run, self.module, batch, on_device)
        share = len(mine) / max(1, len(labels))  # several labels a text: their mean
        loss = loss * share
        # DDP averages the gradients of its processes; the mean over the step's examples is wanted.
        self.scaler.scale(loss * (self.processes.world / samples)).backward()
        progress.micro_step += 1
        with torch.no_grad():
            correct = correct * share
            count = torch.full_like(correct, len(mine))
            self._totals += torch.stack([loss.detach(), correct, count])

    def _end_epoch(self) -> dict[str, Any]:
        run, progress = self.run, self.progress
        self._read_totals()
        loss, correct, count = progress.totals
        val_loss, val_accuracy = run.task.measure(run, self.model, run.splits.validation)
        row = {
            "kind": "epoch",
            "epoch": progress.epoch + 1,
            "train_loss": loss / count,
            "train_accuracy": correct / count,
            "val_loss": val_loss,
            "val_accuracy": val_accuracy,
            "seconds": progress.epoch_seconds,
            "samples_per_second": count / progress.epoch_seconds,
        }
        progress.history.append(row)
        self._write_metrics(row)
        if progress.best is row and self.processes.main:
            save_state(self.folder.best_model, self.model.state_dict())
        progress.epoch, progress.batch = progress.epoch + 1, 0
        progress.seconds += progress.epoch_seconds
        progress.epoch_seconds = 0.0
        self._totals.zero_()
        progress.logged = [0.0, 0.0, 0.0]
        self._save()
        return row

    # --- metrics.jsonl ----------------------------------------------------------------------------

    def _log_interval(self) -> None:
        self._read_totals()
        progress = self.progress
        loss, correct, count = np.subtract(progress.totals, progress.logged).tolist()
        progress.logged = list(progress.totals)
        row = {
            "kind": "train",
            "epoch": progress.epoch + 1,
            "step": progress.step,
            "loss": loss / count,
            "accuracy": correct / count,
            "lr": self.optimizer.param_groups[0]["lr"],
            "samples_per_second": progress.totals[2] / progress.epoch_seconds,
        }
        self._write_metrics(row)

    def _write_metrics(self, row: dict[str, Any]) -> None:
        if self.processes.main:
            with open(self.folder.metrics, "ab") as f:
                f.write(json.dumps(row).encode() + b"\n")
                self.progress.metrics_bytes = f.tell()

    def _trim_metrics(self) -> None:
        """Cut off the lines that were written after the checkpoint this run goes on from."""
        if self.processes.main:
            with open(self.folder.metrics, "ab") as f:
                f.truncate(self.progress.metrics_bytes)

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
