"""The optimiser and the learning rate that a run's settings ask for."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from fasttx import device as devices
from fasttx.config import TrainConfig


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Rate of optimiser step 0 ... steps - 1: linear warm-up, then constant, or cosine to zero."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Weight decay falls on matrices, not on biases and norms. A fused optimiser passes over the
    weights once; it is used where it skips the steps that a gradient scaler wants skipped."""
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
