"""The LSTM baseline: classification by an LSTM. What `fasttx baseline lstm` trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fasttx import device as devices
from fasttx.config import RECIPES, ModelConfig, TrainConfig
from fasttx.errors import DeviceError
from fasttx.models.lstm import LSTMClassifier
from fasttx.tasks.classification import Classification, labels_shown, measured, result_text
from fasttx.tasks.encoder import machine_text, optimizer_text
from fasttx.training.checkpoint import Progress
from fasttx.training.task import Run

RECIPE = "lstm"  # what its config.json holds instead of a recipe of train.py


def settings(given: Mapping[str, Any], dataset: str) -> TrainConfig:
    """The recipe of the Transformer it is compared with (`full`; `demo` on that corpus), with the
    same tokenizer, truncation and optimiser, at a rate and a dropout that are usual for an LSTM.
    `model` is the Transformer's: the LSTM is made as large as that. Raises ConfigError."""
    recipe = RECIPES["demo" if dataset == "demo" else "full"]
    model = replace(recipe.model, dropout=0.3, attention_dropout=None, attn_backend="reference")
    return replace(recipe, model=model, lr=1e-3, **{**given, "dataset": dataset})


class LSTM(Classification):
    name = "the LSTM baseline"
    command = "fasttx baseline lstm"
    tamer = "--precision fp32"

    def backend(self, config: TrainConfig, device: torch.device) -> str:
        """It has no attention; a tiny LSTM is tried in the run's precision."""
        tiny, x = nn.LSTM(4, 4).to(device), torch.zeros(1, 1, 4, device=device)
        try:
            with devices.autocast(device, config.precision):
                tiny(x)[0].sum().backward()
        except RuntimeError as error:
            raise DeviceError(
                f"precision {config.precision} is not available to an LSTM on this {device.type}: "
                f"torch says {str(error).splitlines()[0]!r}. Use --precision fp32"
            ) from error
        return config.model.attn_backend

    def model(self, config: ModelConfig) -> nn.Module:
        return LSTMClassifier(config)

    def begin(self, run: Run, model: Any) -> None:
        return  # its command has no --problem-type: there is nothing to prepare

    def heading(self, run: Run, model: nn.Module) -> list[str]:
        t, m = run.config.train, run.config.train.model
        parameters = f"{sum(p.numel() for p in model.parameters()):,} parameters"
        shape = f"embedding {m.d_model}, hidden {model.hidden_size} in each direction"
        length = f"{m.max_len} tokens ({t.truncation})"
        lines = (
            f"run        {run.folder.path}  (baseline lstm, seed {t.seed})",
            f"data       {run.config.dataset['name']}",
            f"model      bidirectional LSTM, {parameters}, {shape}",
            f"           {m.vocab_size} words, {length}, dropout {m.dropout:g}",
            f"device     {machine_text(run)}",
            f"training   {t.epochs} epochs, batch {t.batch_size}, {optimizer_text(t)}",
        )
        return ["\n".join(lines), *labels_shown(run)]

    def results(self, run: Run, model: nn.Module, progress: Progress) -> dict[str, Any]:
        found = measured(run, model, progress)
        return {"baseline": "lstm", "hidden_size": model.hidden_size, **found}

    def closing(self, run: Run, results: dict[str, Any]) -> str:
        return (
            f"\n{result_text(run, results, 'texts')}\n"
            f"trained at {results['samples_per_second']:.1f} samples/s; {run.folder.results}"
        )


TASK = LSTM()
