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


def check_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Raise ValueError for a saved state that is not of this optimiser's parameters: torch loads
    any, and its fused steps then read past the end of what they find."""
    groups, own = state["param_groups"], optimizer.state_dict()["param_groups"]
    if [g["params"] for g in groups] != [g["params"] for g in own]:
        raise ValueError("its optimiser has other groups of weights")
    if any(g.keys() != o.keys() for g, o in zip(groups, own, strict=True)):
        raise ValueError("its optimiser has other settings")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, kept in state["state"].items():
        if not isinstance(number, int) or not 0 <= number < len(parameters):
            raise ValueError(f"its optimiser has a weight {number!r}; expected {len(parameters)}")
        shape = parameters[number].shape
        for name, value in kept.items():
            if name == "step":
                fits = not torch.is_tensor(value) or value.numel() == 1
            else:
                fits = torch.is_tensor(value) and value.shape == shape
                fits = fits and value.is_floating_point()
            if not fits:
                found = tuple(value.shape) if torch.is_tensor(value) else repr(value)
                raise ValueError(
                    f"its optimiser's {name} of weight {number} is {found}; expected {tuple(shape)}"
                )
