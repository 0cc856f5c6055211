"""Small random models of transformers' families."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttx.ops.registry import BACKENDS

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
TOKENS = {
    f"{token}_token_id": i for i, token in enumerate(("pad", "bos", "eos", "cls", "sep"))
}  # fmt: skip
DISTILBERT = {
    "vocab_size": 50, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48,
    "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "bert": transformers.BertConfig(**SIZES),
    "roberta": transformers.RobertaConfig(**SIZES),
    "electra": transformers.ElectraConfig(**SIZES, embedding_size=16),
    "distilbert": transformers.DistilBertConfig(**DISTILBERT),
    # A local and a global layer.
    "modernbert": transformers.ModernBertConfig(
        **SIZES, **TOKENS, local_attention=8, global_attn_every_n_layers=2
    ),
}


def pair(
    family: str, dtype: torch.dtype = torch.float32, how: str = "fasttx", auto: Any = None,
    **changes: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """The same model twice: with torch's SDPA, and with our attention."""
    models = []
    for name in ("sdpa", how):
        config = copy.deepcopy(CONFIGS[family])
        for key, value in changes.items():
            setattr(config, key, value)
        torch.manual_seed(0)
        auto = auto or transformers.AutoModel
        models.append(auto.from_config(config, attn_implementation=name).to(dtype).eval())
    models[1].load_state_dict(models[0].state_dict())
    return models[0], models[1]


LENGTHS = (23, 5, 30)


def padded(side: str) -> tuple[Tensor, Tensor]:
    """ids and mask (B, L), padded left or right."""
    longest = max(LENGTHS)
    ids = torch.randint(5, 50, (len(LENGTHS), longest), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(longest) < torch.tensor(LENGTHS)[:, None]
    return ids, (mask.flip(1) if side == "left" else mask).long()


def values(model: Any, weights: Tensor, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The last hidden states, and the gradient of every parameter."""
    hidden = model(**inputs).last_hidden_state
    model.zero_grad()
    (hidden * weights).sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return hidden.detach(), found


def close(found: Tensor, expected: Tensor, allowed: float) -> None:
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found, expected, rtol=0.0, atol=allowed * scale)


def backends_with_shared_masks() -> list[str]:
    return [
        name
        for name, backend in BACKENDS.items()
        if backend.dropout == "shared" and not backend.unavailable_reasons("cpu", torch.float32, 8)
    ]
