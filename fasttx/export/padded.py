"""A classifier as a plain padded module of ordinary torch operations, which every exporter follows.

The formulas are those of `fasttx.models`; every exported file is checked against the model itself.
B texts, L padded length, d d_model, e embedding width, H heads, D head_dim, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fasttx.models.classifier import TransformerClassifier
from fasttx.models.encoder import EncoderBlock

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "tanh": torch.tanh,
}


class PaddedClassifier(nn.Module):
    """input_ids (B, L) int64, attention_mask (B, L) int64 with 1 = real token -> logits (B, C).

    It shares the weights of `model`. As there, padding may stand anywhere, logits do not depend on
    it, and a text without a token is pooled to 0.
    """

    def __init__(self, model: TransformerClassifier) -> None:
        super().__init__()
        self.config = c = model.config
        # Once, not at every call: a graph's optimiser need not see that it could.
        scale = 1.0 if c.positions == "learned" else math.sqrt(c.d_model)
        self.register_buffer("words", model.embedding.detach() * scale)
        self.register_buffer("places", model.positions.detach().clone())
        self.embedding_norm = model.embedding_norm
        self.embedding_projection = model.embedding_projection
        self.blocks = model.blocks
        self.norm = model.norm
        self.head = model.head
        self.eval()

    words: Tensor  # (vocab_size, e)
    places: Tensor  # (max_len, e)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        real = attention_mask != 0
        x = self._embed(input_ids, real)
        # Added to the scores. Finite, so that a text without a token has no NaN; and no mask of
        # bool, which exporters guard against NaN in each layer, with a pass over all scores.
        hidden = torch.finfo(x.dtype).min
        bias = torch.where(real, 0.0, hidden)[:, None, None, :].to(x.dtype)
        for block in self.blocks:
            x = self._block(block, x, bias)
        if self.norm is not None:
            x = self.norm(x)
        x = _ACTIVATIONS[self.config.head_activation](self.head.dense(self._pool(x, real)))
        logits: Tensor = self.head.classify(x)
        return logits

    def _embed(self, input_ids: Tensor, real: Tensor) -> Tensor:
        """(B, L, d). Positions count real tokens; those of padding are of no account."""
        position_ids = (real.long().cumsum(1) - 1).clamp(min=0)
        x = F.embedding(input_ids, self.words) + F.embedding(position_ids, self.places)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        if self.embedding_projection is not None:
            x = self.embedding_projection(x)
        return x

    def _block(self, block: EncoderBlock, x: Tensor, bias: Tensor) -> Tensor:
        act = _ACTIVATIONS[block.activation]
        if self.config.norm_first:
            x = x + self._attention(block, block.norm1(x), bias)
            y: Tensor = x + block.down(act(block.up(block.norm2(x))))
            return y
        x = block.norm1(x + self._attention(block, x, bias))
        z: Tensor = block.norm2(x + block.down(act(block.up(x))))
        return z

    def _attention(self, block: EncoderBlock, n: Tensor, bias: Tensor) -> Tensor:
        heads = (block.num_heads, block.head_dim)
        q, k, v = (x.unflatten(2, heads).transpose(1, 2) for x in block.qkv(n).chunk(3, dim=2))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # (B, H, L, D)
        y: Tensor = block.out(mixed.transpose(1, 2).flatten(2))
        return y

    def _pool(self, x: Tensor, real: Tensor) -> Tensor:
        """(B, d): the mean over real tokens, or the first of them; 0 where there is none."""
        if self.config.pooling == "mean":
            total = torch.where(real[..., None], x, 0.0).sum(1)
            return total / real.sum(1).clamp(min=1)[:, None]
        first = real & (real.long().cumsum(1) == 1)
        return torch.where(first[..., None], x, 0.0).sum(1)
