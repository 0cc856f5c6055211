"""What every model with weights is: an `nn.Module` that reads state dicts of wrapped models too,
and says in one line that it is too large.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fasttx.config import ModelConfig
from fasttx.errors import ConfigError
from fasttx.weights import own_names


class Model(nn.Module):
    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As torch's; names may hold what DDP (`module.`) or torch.compile (`_orig_mod.`) add."""
        if isinstance(state_dict, Mapping):
            own = self.state_dict().keys()
            if not state_dict.keys() <= own:
                state_dict = own_names(state_dict, own)
        return super().load_state_dict(state_dict, strict, assign)


# What torch says, on the CPU, CUDA and MPS, where memory is short or a size cannot even be written.
_SHORT = ("allocate memory", "out of memory", "not enough memory", "buffer size", "Storage size")


def parameter_count(config: ModelConfig) -> int:
    """Of a classifier of this size, exactly."""
    d, e = config.d_model, config.embedding_width
    embedding = config.vocab_size * e + 2 * e * config.embedding_norm
    embedding += config.max_len * e if config.positions == "learned" else 0
    embedding += 0 if config.embedding_size is None else (e + 1) * d
    block = 4 * d * d + 2 * d * config.d_ff + 9 * d + config.d_ff
    head = d * d + d + (d + 1) * config.num_classes
    return embedding + config.num_layers * block + 2 * d * config.norm_first + head


@contextlib.contextmanager
def room_for(config: ModelConfig) -> Iterator[None]:
    """Around the building of a model. Raises ConfigError where its weights exceed the memory."""
    elements = parameter_count(config) + config.max_len * config.d_model
    size = elements * torch.get_default_dtype().itemsize
    if torch.get_default_device().type == "cpu" and size > _memory():
        raise ConfigError(_too_large(config, size))
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in _SHORT):
            raise
        raise ConfigError(_too_large(config, size)) from error


def _too_large(config: ModelConfig, size: int) -> str:
    names = ("vocab_size", "num_classes", "d_model", "num_layers", "d_ff", "max_len")
    sizes = ", ".join(f"{name} {getattr(config, name):,}" for name in names)
    return (
        f"a model with {sizes} takes {size // 10**9:,} GB, more than this machine has memory for; "
        "expected a smaller one"
    )


def _memory() -> float:
    """Bytes of this machine, or infinity where it does not say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):  # Windows; a name that is not known
        return float("inf")
