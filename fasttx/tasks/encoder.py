"""What tasks on the Transformer encoder share: its backend, and a start from another run's."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from pathlib import Path

import torch

from fasttx.config import ENCODER_SHAPE, ModelConfig, TrainConfig
from fasttx.errors import CheckpointError, ConfigError
from fasttx.ops import registry
from fasttx.tasks import read_config
from fasttx.text.tokenizer import Tokenizer
from fasttx.training.checkpoint import load_tokenizer
from fasttx.training.folder import RunFolder
from fasttx.training.task import Run, Task


class EncoderTask(Task, ABC):
    def tokenizer(self, config: TrainConfig, texts: Sequence[str]) -> Tokenizer:
        """That of the run `init_from`, after a check that the encoders have one shape."""
        if config.init_from is None:
            return super().tokenizer(config, texts)
        source = RunFolder(Path(config.init_from))
        theirs = read_config(source.config, "classification", "pretraining").train.model
        for name in ENCODER_SHAPE:
            there, here = getattr(theirs, name), getattr(config.model, name)
            if there != here:
                raise ConfigError(
                    f"{name} is {here}, and {there} in {source.config}; expected the same encoder. "
                    f"Pass --{name.replace('_', '-')} {there}"
                )
        if not source.best_model.exists():
            raise CheckpointError(
                f"{source.best_model} does not exist: that run has not finished an epoch. Go on "
                "with it first, or start from another run"
            )
        return load_tokenizer(source, theirs.vocab_size)

    def backend(self, config: TrainConfig, device: torch.device) -> str:
        m = config.model
        head_dim = m.d_model // m.num_heads
        return registry.resolve_name(m.attn_backend, device, torch.float32, head_dim)

    def choices(self, backend: str) -> dict[str, str]:
        return registry.choices(backend)

    def choose(self, backend: str, choices: dict[str, str]) -> None:
        registry.choose(backend, choices)


def size_text(m: ModelConfig) -> str:
    return (
        f"d_model {m.d_model}, {m.num_heads} heads, {m.num_layers} layers, d_ff {m.d_ff}, "
        f"{m.vocab_size} words, dropout {m.dropout_text}"
    )


def machine_text(run: Run) -> str:
    threads = torch.get_num_threads()
    return f"{run.device}, {run.config.train.precision}, {threads} threads"


def optimizer_text(config: TrainConfig) -> str:
    return f"{config.optimizer} at {config.lr:g} ({config.schedule})"
