"""What the files of a run hold, read with suspicion."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from fasttx.config import TrainConfig
from fasttx.errors import CheckpointError
from fasttx.text.pieces import AnyTokenizer, read_tokenizer
from fasttx.training.folder import RunFolder, digest_of, remedy, verified
from fasttx.weights import own_names

# Of config.json. Runs of the first format have no manifest.
FORMATS = ("fasttx-run-1", "fasttx-run-2")


@dataclass(frozen=True)
class RunConfig:
    """`config.json`: the settings of a run, and what they came to mean on its machine and data."""

    train: TrainConfig
    attn_backend: str  # what `auto` resolved to
    device: str
    label_names: tuple[str, ...]
    dataset: dict[str, Any]
    recipe: str | None
    task: str  # a name in `fasttx.tasks.TASKS`
    init_from_sha256: str | None = None  # of the weights that the encoder started from
    # What the backend chose where several ways give other bits: `contract.Adapter.choices`. None:
    # the run is older than the choice.
    choices: dict[str, str] | None = None

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds."""
        return {
            "format": FORMATS[-1],
            "task": self.task,
            "recipe": self.recipe,
            "attn_backend": self.attn_backend,
            "device": self.device,
            "label_names": list(self.label_names),
            "dataset": self.dataset,
            "init_from_sha256": self.init_from_sha256,
            "choices": self.choices,
            "train": self.train.to_dict(),
        }


@dataclass
class Progress:
    """Where a run stands; saved in every checkpoint."""

    epoch: int = 0
    batch: int = 0  # batches of this epoch that are done
    micro_step: int = 0  # forward passes since the start of the run
    step: int = 0  # optimiser steps since the start of the run
    # Of this epoch: sums of the losses and of what is measured, labels, samples; and the same at
    # the last log line.
    totals: list[float] = field(default_factory=lambda: [0.0] * 4)
    logged: list[float] = field(default_factory=lambda: [0.0] * 4)
    epoch_seconds: float = 0.0  # training only, evaluation not counted
    seconds: float = 0.0
    samples: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    metrics_bytes: int = 0  # length of metrics.jsonl, to cut off what a kill left behind
    metrics_sha256: str | None = None  # of these bytes
    chosen: str = "accuracy"  # the measure by which the best epoch is chosen
    more_is_better: bool = True

    @classmethod
    def of(cls, values: dict[str, Any]) -> Progress:
        """As a checkpoint holds it. Raises TypeError and ValueError for anything else."""
        progress = cls(**values)
        for name, value in vars(cls()).items():
            found = getattr(progress, name)
            kind = (int, float) if isinstance(value, float) else type(value)
            if value is not None and not isinstance(found, kind):
                raise TypeError(f"its {name} is {found!r}; expected {type(value).__name__}")
            if isinstance(found, int | float) and found < 0:
                raise ValueError(f"its {name} is {found}; expected at least 0")
        for sums in (progress.totals, progress.logged):
            if len(sums) == 3:  # of an earlier version, which had one label a sample
                sums.append(sums[2])
        return progress

    @property
    def best(self) -> dict[str, Any] | None:
        """The epoch of the best `chosen` on validation, then of the lowest validation loss."""
        sign, name = 1 if self.more_is_better else -1, f"val_{self.chosen}"
        return max(self.history, key=lambda e: (sign * e[name], -e["val_loss"]), default=None)


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(verified(path))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist: {path.parent} is no fasttx run") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}. {remedy(path)}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}; expected a JSON object")
    return values


def save_state(folder: RunFolder, path: Path, state: dict[str, Any]) -> None:
    """torch.save to a file of the run. Raises OSError where it cannot be written."""
    with folder.writing(path) as f:
        remembering = _Remembering(f)
        try:
            torch.save(state, remembering)  # type: ignore[arg-type]  # it does no more than write
        except RuntimeError:
            if remembering.error is None:
                raise
            raise remembering.error from None


class _Remembering:
    """What torch.save writes to: it hides a failed write behind an error of its own."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def load_state(path: Path) -> dict[str, Any]:
    """torch.load(weights_only=True) on the CPU. Raises CheckpointError for anything but a state."""
    try:
        content = verified(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # bad bytes make torch raise many kinds
        reason = str(error).strip().split("\n", 1)[0]
        raise CheckpointError(
            f"{path} is no checkpoint, or damaged or cut short ({reason}). {remedy(path)}"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}; expected a state dict")
    return state


def load_tokenizer(folder: RunFolder, vocab_size: int) -> AnyTokenizer:
    """The tokenizer of a run whose embedding has `vocab_size` rows.

    Raises TokenizerError, and CheckpointError for a file that is not the run's.
    """
    with contextlib.suppress(FileNotFoundError):  # of which `load` speaks
        verified(folder.tokenizer)
    tokenizer = read_tokenizer(folder.tokenizer)
    if len(tokenizer) > vocab_size:
        raise CheckpointError(
            f"{folder.tokenizer} has {len(tokenizer):,} words, and the run's embedding has "
            f"{vocab_size:,} rows: it is from another run. Bring back the run's own"
        )
    return tokenizer


def load_weights(model: nn.Module, path: Path) -> None:
    """A plain state dict into `model`; CheckpointError tells what does not fit."""
    fit_weights(model, load_state(path), path)


def load_encoder(model: nn.Module, path: Path, sha256: str | None = None) -> None:
    """All weights but the head's, from the best_model.pt of a run with any head, into `model`.

    sha256: of the file that is expected, if known.
    """
    if sha256 is not None and (not path.exists() or digest_of(path) != sha256):
        raise CheckpointError(
            f"{path} is not the file that this run started from: it is gone, or was replaced or "
            "trained further. Bring it back, or start a new run"
        )
    wanted = model.state_dict()
    own = {k: v for k, v in wanted.items() if k.startswith("head.")}
    saved = own_names(load_state(path), wanted)
    theirs = {k: v for k, v in saved.items() if not k.startswith("head.")}
    if "positions" in wanted and torch.is_tensor(
        theirs.get("positions")
    ):  # learned: the first ones
        theirs["positions"] = theirs["positions"][: len(wanted["positions"])]
    fit_weights(model, theirs | own, path)


def fit_weights(model: nn.Module, state: dict[str, Any], path: Path) -> None:
    """The weights `state`, which `path` held, into `model`. Raises CheckpointError, changing
    nothing, for others than the model's and for numbers that are not finite."""
    wanted = model.state_dict()
    state = own_names(state, wanted)
    problems = [f"lacks {k}" for k in wanted if k not in state]
    problems += [f"has an unknown {k}" for k in state if k not in wanted]
    problems += [
        f"{k} is {tuple(v.shape) if isinstance(v, torch.Tensor) else type(v).__name__}, "
        f"expected {tuple(wanted[k].shape)}"
        for k, v in state.items()
        if k in wanted and (not isinstance(v, torch.Tensor) or v.shape != wanted[k].shape)
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"{path} does not fit the model: {'; '.join(problems[:3])}{more}")
    if bad := not_finite(state):
        raise CheckpointError(
            f"{path} holds numbers that are not finite, in {bad}: the training had diverged. Train "
            "again: python train.py with a lower --lr or --grad-clip 1"
        )
    model.load_state_dict(state)


def not_finite(tensors: Mapping[str, Any]) -> str | None:
    """The name of a tensor that holds NaN or infinity; None where all numbers are finite."""
    floats = {k: v for k, v in tensors.items() if torch.is_tensor(v) and v.is_floating_point()}
    # One number a tensor, and one wait for the device: a sum is not finite where an element is not.
    sums = [v.detach().sum(dtype=torch.float32) for v in floats.values()]
    if not sums or bool(torch.stack(sums).isfinite().all()):
        return None
    return next((k for k, v in floats.items() if not bool(v.isfinite().all())), None)
