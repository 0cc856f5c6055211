"""What tasks on the Transformer encoder share: its backend, and a start from another run's."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence

import torch
from torch import nn

from fasttx.config import ModelConfig, TrainConfig
from fasttx.ops import registry
from fasttx.tasks.origin import find_origin
from fasttx.text.pieces import AnyTokenizer
from fasttx.training.task import Run, Task


class EncoderTask(Task, ABC):
    def tokenizer(self, config: TrainConfig, texts: Sequence[str]) -> AnyTokenizer:
        """That of `init_from`, after a check that the encoders have one shape."""
        if config.init_from is None:
            return super().tokenizer(config, texts)
        origin = find_origin(config.init_from)
        origin.check(config.model)
        return origin.tokenizer()

    def origin_sha256(self, config: TrainConfig) -> str | None:
        return None if config.init_from is None else find_origin(config.init_from).sha256()

    def start(self, config: TrainConfig, model: nn.Module, sha256: str | None) -> None:
        if config.init_from is not None:
            find_origin(config.init_from).start(model, sha256)

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
