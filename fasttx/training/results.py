"""results.json: what every run records beside its own measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fasttx import device as devices
from fasttx.training.checkpoint import Progress
from fasttx.training.task import Run

TARGET_ACCURACIES = (0.85, 0.88)  # of validation; results.json tells when each was reached


def common(run: Run, model: nn.Module, progress: Progress) -> dict[str, Any]:
    """What is needed to judge any run."""
    settings = run.config.train
    return {
        "best_epoch": (progress.best or {}).get("epoch"),
        "samples_per_second": progress.samples / progress.seconds,
        "seconds": progress.seconds,
        "peak_memory_mb": devices.peak_memory_mb(run.device),
        "parameters": sum(p.numel() for p in model.parameters()),
        "precision": settings.precision,
        "seed": settings.seed,
        "dataset": run.config.dataset,
        "history": progress.history,
        "config": settings.to_dict(),
        "versions": devices.versions(),
        "hardware": devices.hardware(run.device),
    }


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
