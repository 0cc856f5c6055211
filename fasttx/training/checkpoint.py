"""The files of a run folder: what is in them, written whole or not at all, read with suspicion."""

from __future__ import annotations

import json
import pickle
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fasttx.config import TrainConfig
from fasttx.errors import CheckpointError
from fasttx.files import atomic_write, write_json_atomic

FORMAT = "fasttx-run-1"  # of config.json


class RunFolder:
    """`runs/<name>/`: where each file of a run is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.tokenizer = path / "tokenizer.json"
        self.best_model = path / "best_model.pt"
        self.last = path / "last.ckpt"
        self.metrics = path / "metrics.jsonl"
        self.results = path / "results.json"
        self.test_predictions = path / "test_predictions.npz"
        self.pseudo_labels = path / "pseudo_labels.npz"
        self.log = path / "train.log"


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

    def save(self, path: Path) -> None:
        write_json_atomic(
            path,
            {
                "format": FORMAT,
                "task": self.task,
                "recipe": self.recipe,
                "attn_backend": self.attn_backend,
                "device": self.device,
                "label_names": list(self.label_names),
                "dataset": self.dataset,
                "train": self.train.to_dict(),
            },
        )


@dataclass
class Progress:
    """Where a run stands; saved in every checkpoint."""

    epoch: int = 0
    batch: int = 0  # batches of this epoch that are done
    micro_step: int = 0  # forward passes since the start of the run
    step: int = 0  # optimiser steps since the start of the run
    # Of this epoch: sum of losses, correct answers, samples; and the same at the last log line.
    totals: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    logged: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    epoch_seconds: float = 0.0  # training only, evaluation not counted
    seconds: float = 0.0
    samples: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    metrics_bytes: int = 0  # length of metrics.jsonl, to cut off what a kill left behind

    @property
    def best(self) -> dict[str, Any] | None:
        """The epoch with the highest validation accuracy, then the lowest validation loss."""
        return max(self.history, key=lambda e: (e["val_accuracy"], -e["val_loss"]), default=None)


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist: {path.parent} is no fasttx run") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}; expected a JSON object")
    return values


def save_state(path: Path, state: dict[str, Any]) -> None:
    """torch.save to a temporary name, then rename: a kill leaves the old file or the new one."""
    with atomic_write(path) as f:
        torch.save(state, f)


def load_state(path: Path) -> dict[str, Any]:
    """torch.load(weights_only=True) on the CPU. Raises CheckpointError for anything but a state."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile,
            ValueError, KeyError, AttributeError, IndexError, TypeError) as error:  # fmt: skip
        reason = str(error).strip().split("\n", 1)[0]
        raise CheckpointError(
            f"{path} is no checkpoint, or damaged or cut short ({reason})"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}; expected a state dict")
    return state


def load_weights(model: nn.Module, path: Path) -> None:
    """A plain state dict into `model`; CheckpointError tells what does not fit."""
    _fit_weights(model, load_state(path), path)


def load_encoder(model: nn.Module, path: Path) -> None:
    """All weights but the head's, from the best_model.pt of a run with any head, into `model`."""
    own = {k: v for k, v in model.state_dict().items() if k.startswith("head.")}
    theirs = {k: v for k, v in load_state(path).items() if not k.startswith("head.")}
    _fit_weights(model, theirs | own, path)


def _fit_weights(model: nn.Module, state: dict[str, Any], path: Path) -> None:
    wanted = model.state_dict()
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
    model.load_state_dict(state)
