"""The classifier: the encoder, the mean of each text's rows, and a head."""

from __future__ import annotations

import dataclasses

from torch import Tensor, nn

from fasttx.config import ModelConfig
from fasttx.models.encoder import Encoder
from fasttx.models.layers import linear, product_and_bias
from fasttx.models.mean_pool import pool
from fasttx.models.module import room_for
from fasttx.ops import registry
from fasttx.ops.contract import Operations
from fasttx.ops.dropout import Dropout


class ClassifierHead(nn.Module):
    """Linear(d, d) - GELU - dropout - Linear(d, num_classes), on pooled texts (B, d)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.d_model, config.d_model)
        self.classify = nn.Linear(config.d_model, config.num_classes)

    def forward(self, x: Tensor, ops: Operations, dropout: Dropout) -> Tensor:
        x, bias = product_and_bias(ops, self.dense, x)
        return linear(ops, self.classify, ops.bias_act(x, bias, dropout, "gelu"))


class TransformerClassifier(Encoder):
    """An encoder-only Transformer text classifier; the defaults have exactly 5,785,858 parameters.

    `attn_backend` is checked here and resolved for the parameters' device and dtype, again whenever
    the module moves: a model built on the CPU and moved to a GPU works, and `auto` follows.
    Token 0 is <PAD>, 1 is <UNK>. Raises ConfigError for settings that cannot work.
    """

    def __init__(
        self,
        vocab_size: int = 10_000,
        num_classes: int = 2,
        d_model: int = 256,
        num_heads: int = 8,
        num_layers: int = 4,
        d_ff: int = 1024,
        max_len: int = 256,
        dropout: float = 0.1,
        attn_backend: str = "auto",
        *,
        activation: str = "relu",
        attention_dropout: float | None = None,
    ) -> None:
        registry.check_name(attn_backend)  # whose message lists the names, whatever was given
        config = ModelConfig(
            vocab_size, num_classes, d_model, num_heads, num_layers, d_ff, max_len, dropout,
            attn_backend, activation, attention_dropout,
        )  # fmt: skip
        with room_for(config):
            super().__init__(config)
            self.head = ClassifierHead(config)
            self.reset_parameters()

    @classmethod
    def from_config(cls, config: ModelConfig) -> TransformerClassifier:
        return cls(**dataclasses.asdict(config))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
        max_seqlen: int | None = None,
        seed: Tensor | None = None,
        return_attention: bool = False,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        """Logits (B, num_classes).

        Packed, with `cu_seqlens` (B + 1,) int32: input_ids (T,), T >= cu_seqlens[-1];
        position_ids (T,) and max_seqlen (any upper bound) save work when given.
        Padded, without: input_ids (B, L), attention_mask (B, L) bool or 0/1 with 1 = real token;
        None means `input_ids != 0`. Padding may stand anywhere: logits do not depend on it.
        Values (of the mask, ids outside the table, cu_seqlens) are checked on the CPU only: on
        another device that would wait for it.
        seed: () int64 tensor on the device, the forward seed of every dropout mask; None draws one
        from torch's generator in training. return_attention adds, for each layer, the attention
        weights (B, H, max_seqlen, max_seqlen) before dropout, computed by the reference.
        """
        encoded = self.encode(
            input_ids, attention_mask, cu_seqlens=cu_seqlens, position_ids=position_ids,
            max_seqlen=max_seqlen, seed=seed, return_attention=return_attention,
        )  # fmt: skip
        pooled = pool(encoded.n, encoded.cu_seqlens, encoded.max_seqlen)
        logits = self.head(pooled, self._ops, encoded.dropout)
        return (logits, encoded.attention) if return_attention else logits
