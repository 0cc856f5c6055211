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
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttx import device as devices
from fasttx.config import TrainConfig
from fasttx.errors import CheckpointError, DivergedError
from fasttx.load import mean_of_windows, predict_logits
from fasttx.ops.dropout import forward_seed
from fasttx.text.packing import PackedBatch, RaggedIds, pack, shuffled_batches
from fasttx.text.tokenizer import UNK_ID
from fasttx.training.checkpoint import (
    Progress,
    RunConfig,
    RunFolder,
    load_state,
    load_weights,
    save_state,
)
from fasttx.training.distributed import Processes
from fasttx.training.metrics import Metrics, classification_metrics

log = logging.getLogger("fasttx")

WORD_DROPOUT_STREAM = 1  # keeps these draws apart from the shuffle's, which have the same seed


class Interrupted(Exception):
    """Ctrl-C or SIGTERM: the run has been saved and can be resumed."""


@dataclass(frozen=True)
class Examples:
    """One split, ready for the model: token ids, of at most max_len tokens, and labels (n,) int64;
    to train on, also (n, C) float32, the probability of each class.

    owner (sequences,) int64: which text each sequence is a window of; None: one sequence a text.
    """

    ids: RaggedIds
    labels: np.ndarray
    owner: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Rate of optimiser step 0 ... steps - 1: linear warm-up, then constant, or cosine to zero."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Weight decay falls on matrices, not on biases and norms. Fused: one pass over the weights,
    where that is safe beside a gradient scaler."""
    device = next(model.parameters()).device
    fused = config.precision != "fp16" or devices.fused_steps_heed_overflow(device)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.dim() > 1]},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    decay = config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, config.lr, weight_decay=decay, fused=fused)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, config.lr, betas=(0.9, config.beta2), weight_decay=decay, fused=fused)


def drop_words(ids: RaggedIds, p: float, stream: tuple[int, ...]) -> RaggedIds:
    """`ids` with a share p of the words replaced by <UNK>; a pure function of `stream`."""
    if p == 0.0:
        return ids
    lost = np.random.default_rng(stream).random(len(ids.values)) < p
    return replace(ids, values=np.where(lost, np.int32(UNK_ID), ids.values))


class Trainer:
    """One run: `fit` trains, `evaluate` measures. The model is already on its device."""

    def __init__(
        self, model: nn.Module, run: RunConfig, folder: RunFolder,
        device: torch.device, processes: Processes,
    ) -> None:  # fmt: skip
        self.model, self.run, self.folder = model, run, folder
        self.config, self.device, self.processes = run.train, device, processes
        self.optimizer = make_optimizer(model, self.config)
        enabled = self.config.precision == "fp16"
        self.scaler = torch.amp.GradScaler(device.type, enabled=enabled)
        module: nn.Module = processes.wrap(model, device)
        self.module: Any = torch.compile(module, dynamic=True) if self.config.compile else module
        self.progress = Progress()
        self._upload = devices.Uploads(device)
        self._totals = torch.zeros(3, dtype=self._sum_dtype(), device=device)
        self._stop = False
        self._saved_at = time.perf_counter()

    def _sum_dtype(self) -> torch.dtype:
        return torch.float32 if self.device.type == "mps" else torch.float64  # MPS has no float64

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

    def restore_best(self) -> dict[str, Any]:
        """Load the weights of the best epoch; its row of the history."""
        best = self.progress.best
        assert best is not None, "restore_best needs a finished epoch"
        self.processes.barrier()  # the main process may still be writing the file
        load_weights(self.model, self.folder.best_model)
        return best

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
        self, train: Examples, validation: Examples,
        on_batch: Callable[[Progress, int], None] = lambda progress, reviews: None,
        on_epoch: Callable[[dict[str, Any]], None] = lambda row: None,
    ) -> Progress:  # fmt: skip
        """Train to the end. Raises Interrupted (saved, resumable) and DivergedError."""
        self._trim_metrics()
        with self._signals():
            while self.progress.epoch < self.config.epochs:
                self._train_epoch(train, on_batch)
                on_epoch(self._end_epoch(validation))
        return self.progress

    def _groups(self, count: int) -> list[list[tuple[int, np.ndarray]]]:
        """The batches of this epoch, numbered, in groups of one optimiser step."""
        c = self.config
        batches = list(
            enumerate(shuffled_batches(count, c.batch_size, seed=c.seed, epoch=self.progress.epoch))
        )
        n = c.grad_accumulation
        return [batches[i : i + n] for i in range(0, len(batches), n)]

    def _train_epoch(self, train: Examples, on_batch: Callable[[Progress, int], None]) -> None:
        progress, config = self.progress, self.config
        groups = self._groups(len(train))
        self.module.train()
        before, start = progress.epoch_seconds, time.perf_counter()
        for group in groups[-(-progress.batch // config.grad_accumulation) :]:
            for values in self.optimizer.param_groups:
                values["lr"] = learning_rate(config, progress.step, len(groups) * config.epochs)
            self._step(group, train)
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

    def _step(self, group: list[tuple[int, np.ndarray]], train: Examples) -> None:
        """One optimiser step on a group of batches, each shared out among the processes."""
        reviews = sum(len(indices) for _, indices in group)
        self.optimizer.zero_grad(set_to_none=True)
        for k, (number, indices) in enumerate(group):
            last = k == len(group) - 1
            several = self.processes.world > 1 and not last
            with self.module.no_sync() if several else nullcontext():
                self._micro_step(number, indices, train, reviews)
        if self.config.grad_clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.progress.step += 1
        self.progress.batch = group[-1][0] + 1
        self.progress.samples += reviews

    def _micro_step(self, number: int, indices: np.ndarray, train: Examples, reviews: int) -> None:
        config, progress, processes = self.config, self.progress, self.processes
        stream = (config.seed, WORD_DROPOUT_STREAM, progress.epoch, number, processes.rank)
        mine = processes.share(indices)
        batch = self._upload(self.batch(train, mine, stream))
        labels = batch.labels
        assert labels is not None
        seed = forward_seed(config.seed, progress.micro_step, processes.rank)
        torch.manual_seed(seed)  # for backends that draw from torch's generator
        loss, correct = self.loss(self.module, batch, seed=self._upload(torch.tensor(seed)))
        share = len(mine) / max(1, len(labels))  # several labels a text: their mean
        loss = loss * share
        # DDP averages the gradients of its processes; the sum over the group's reviews is wanted.
        self.scaler.scale(loss * (processes.world / reviews)).backward()
        progress.micro_step += 1
        with torch.no_grad():
            correct = correct * share
            count = torch.full_like(correct, len(mine))
            self._totals += torch.stack([loss.detach(), correct, count])

    def loss(self, model: Any, batch: PackedBatch, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Of a batch on the device: the sum of its losses, and how many labels are right."""
        assert batch.labels is not None
        with devices.autocast(self.device, self.config.precision):
            logits = model(**batch.model_inputs(), **inputs).float()
        smoothing = self.config.label_smoothing
        loss = F.cross_entropy(logits, batch.labels, label_smoothing=smoothing, reduction="sum")
        likeliest = batch.labels if batch.labels.dim() == 1 else batch.labels.argmax(-1)
        return loss, (logits.argmax(-1) == likeliest).sum()

    def batch(
        self, examples: Examples, indices: np.ndarray, stream: tuple[int, ...]
    ) -> PackedBatch:
        """What the model is trained on; its random numbers are a pure function of `stream`."""
        ids = drop_words(examples.ids.select(indices), self.config.word_dropout, stream)
        multiple = devices.token_multiple(self.device, self.config.precision)
        return pack(ids, examples.labels[indices], token_multiple=multiple)

    def _end_epoch(self, validation: Examples) -> dict[str, Any]:
        progress = self.progress
        self._read_totals()
        loss, correct, count = progress.totals
        val_loss, val_accuracy = self.measure(validation)
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

    def measure(self, examples: Examples) -> tuple[float, float]:
        """Loss and accuracy, by which the best epoch is chosen."""
        metrics = self.evaluate(examples)
        return metrics.loss, metrics.accuracy

    def predict(self, examples: Examples) -> np.ndarray:
        """Logits (n, num_classes) float32 in every process: each predicts a share of the texts."""
        mine = self.processes.share(np.arange(len(examples.ids)))
        logits = torch.zeros(len(examples.ids), self.config.model.num_classes)
        if len(mine):
            logits[torch.from_numpy(mine)] = predict_logits(
                self.model, examples.ids.select(mine), self.device,
                batch_size=self.config.batch_size, precision=self.config.precision,
            )  # fmt: skip
        return mean_of_windows(self.processes.sum(logits), examples.owner).numpy()

    def evaluate(self, examples: Examples) -> Metrics:
        """Exact over all processes: no review counts twice."""
        return classification_metrics(self.predict(examples), examples.labels)

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

        def ask(number: int, frame: Any) -> None:
            self._stop = True
            log.info("stopping after this step and saving; once more to stop at once")
            signal.signal(number, signal.default_int_handler)

        try:
            old = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: signals are somebody else's
            yield
            return
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
