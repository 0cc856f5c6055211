"""The operations around attention in plain tensor algebra: their specification.

A backend without kernels of its own inherits them; T rows, H heads, D head_dim, d columns.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fasttx.ops.contract import LAYER_NORM_EPS, Spans
from fasttx.ops.dropout import NO_DROPOUT, Dropout, row_dropout


def layer_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float = LAYER_NORM_EPS) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], gamma, beta, eps)


class PlainOperations:
    """Everything but `attention_qkv`, which a subclass adds; see `contract.Operations`."""

    def attention(
        self,
        qkv: Tensor,
        spans: Spans,
        dropout: Dropout = NO_DROPOUT,
        *,
        causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        q, k, v = qkv.unbind(1)
        return self.attention_qkv(q, k, v, spans, dropout, causal=causal, scale=scale)

    def attention_qkv(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        spans: Spans,
        dropout: Dropout = NO_DROPOUT,
        *,
        causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        raise NotImplementedError

    def drop(self, x: Tensor, dropout: Dropout) -> Tensor:
        """Dropout of rows x (T, d)."""
        return row_dropout(x, dropout)

    def embed(
        self,
        ids: Tensor,
        position_ids: Tensor,
        table: Tensor,
        positions: Tensor,
        dropout: Dropout,
        scale: float,
    ) -> Tensor:
        return self.drop(F.embedding(ids, table) * scale + positions[position_ids], dropout)

    def add_norm(
        self,
        h: Tensor,
        y: Tensor,
        bias: Tensor,
        gamma: Tensor,
        beta: Tensor,
        dropout: Dropout,
        eps: float = LAYER_NORM_EPS,
    ) -> tuple[Tensor, Tensor]:
        h = h + self.drop(y + bias.to(y.dtype), dropout)
        return h, layer_norm(h, gamma, beta, eps)

    def bias_act(self, u: Tensor, bias: Tensor, dropout: Dropout, activation: str) -> Tensor:
        x = u + bias.to(u.dtype)
        return self.drop(F.gelu(x) if activation == "gelu" else F.relu(x), dropout)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight, bias)
