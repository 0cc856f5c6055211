"""The classifier: the encoder, one vector for each text, and a head."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from fasttx.config import ModelConfig
from fasttx.models.encoder import Encoder
from fasttx.models.layers import drop, linear, product_and_bias
from fasttx.models.mean_pool import first_rows, pool
from fasttx.models.module import room_for
from fasttx.ops import registry
from fasttx.ops.contract import Operations
from fasttx.ops.dropout import Dropout


class ClassifierHead(nn.Module):
    """Linear(d, d) - activation - dropout - Linear(d, num_classes), on pooled texts (B, d).

    On first rows it is BERT's and RoBERTa's head (tanh), ELECTRA's (GELU), DistilBERT's (ReLU).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.head_activation
        self.dense = nn.Linear(config.d_model, config.d_model)
        self.classify = nn.Linear(config.d_model, config.num_classes)

    def forward(self, x: Tensor, ops: Operations, dropout: Dropout) -> Tensor:
        x, bias = product_and_bias(ops, self.dense, x)
        if self.activation == "tanh":  # which only a head has
            x = drop(ops, torch.tanh(x + bias.to(x.dtype)), dropout)
        else:
            x = ops.bias_act(x, bias, dropout, self.activation)
        return linear(ops, self.classify, x)


class TransformerClassifier(Encoder):
    """An encoder-only Transformer text classifier; the defaults have exactly 5,785,858 parameters.

    `attn_backend` is checked here and resolved for the parameters' device and dtype, again whenever
    the module moves: a model built on the CPU and moved to a GPU works, and `auto` follows.
    The arguments are explained in `fasttx.ModelConfig`. Token 0 is <PAD>, 1 is <UNK>, unless a
    pretrained encoder has others. Raises ConfigError for settings that cannot work.
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
        norm_first: bool = True,
        positions: str = "sinusoidal",
        embedding_norm: bool = False,
        embedding_size: int | None = None,
        norm_eps: float = 1e-5,
        pad_id: int = 0,
        pooling: str = "mean",
        head_activation: str = "gelu",
    ) -> None:
        registry.check_name(attn_backend)  # whose message lists the names, whatever was given
        config = ModelConfig(
            vocab_size, num_classes, d_model, num_heads, num_layers, d_ff, max_len, dropout,
            attn_backend, activation, attention_dropout, norm_first, positions, embedding_norm,
            embedding_size, norm_eps, pad_id, pooling, head_activation,
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
        None means `input_ids != pad_id`. Padding may stand anywhere: logits do not depend on it.
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
        if self.config.pooling == "cls":
            pooled = first_rows(encoded.n, encoded.cu_seqlens)
        else:
            pooled = pool(encoded.n, encoded.cu_seqlens, encoded.max_seqlen)
        logits = self.head(pooled, self._ops, encoded.dropout)
        return (logits, encoded.attention) if return_attention else logits
