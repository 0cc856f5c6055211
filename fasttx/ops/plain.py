"""The operations around attention in plain tensor algebra: their specification.

A backend without kernels of its own inherits them and adds `_attend`. T rows, d columns.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fasttx.ops.contract import Operations
from fasttx.ops.dropout import Dropout, row_dropout


class PlainOperations(Operations):
    def drop(self, x: Tensor, dropout: Dropout) -> Tensor:
        """Dropout of rows x (T, d)."""
        return row_dropout(x, dropout)

    def _embed(
        self, ids: Tensor, position_ids: Tensor, table: Tensor, positions: Tensor, dropout: Dropout,
        scale: float,
    ) -> Tensor:  # fmt: skip
        return self.drop(F.embedding(ids, table) * scale + positions[position_ids], dropout)

    def _add_norm(
        self, h: Tensor, y: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, dropout: Dropout,
        eps: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        h = h + self.drop(y + bias.to(y.dtype), dropout)
        return h, F.layer_norm(h, h.shape[-1:], gamma, beta, eps)

    def _bias_act(self, u: Tensor, bias: Tensor, dropout: Dropout, activation: str) -> Tensor:
        x = u + bias.to(u.dtype)
        return self.drop(F.gelu(x) if activation == "gelu" else F.relu(x), dropout)
