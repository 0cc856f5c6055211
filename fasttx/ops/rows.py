"""The three row operations around attention, in plain torch: their specification.

Every tensor but the vectors and tables is (T, columns), packed rows. A backend may bring its own
`RowOps` (fused kernels); they compute what `specification` computes, dropout mask included.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from fasttx.ops.dropout import row_dropout

LAYER_NORM_EPS = 1e-5
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}

Dropout = Callable[[Tensor, float, Tensor | None], Tensor]


class RowOps(NamedTuple):
    """embed(ids, position_ids, table, pe, p, seed) -> h
           dropout(table[ids] * sqrt(d) + pe[position_ids]); ids, position_ids (T,), table (V, d)
    add_norm(h, y, bias, gamma, beta, p, seed) -> (h', n)
           h' = h + dropout(y + bias), n = LayerNorm(h') * gamma + beta; h, y (T, d)
           n may come in y's dtype, to which autocast would round it for the next linear layer
    bias_act(u, bias, p, seed, activation) -> dropout(act(u + bias)); u (T, f)

    p is a probability, seed a () int64 tensor on the device, or None where p = 0.
    """

    embed: Callable[..., Tensor]
    add_norm: Callable[..., tuple[Tensor, Tensor]]
    bias_act: Callable[..., Tensor]


def layer_norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], gamma, beta, LAYER_NORM_EPS)


def plain_rowops(dropout: Dropout) -> RowOps:
    """The specification, over a given dropout."""

    def embed(
        ids: Tensor, position_ids: Tensor, table: Tensor, pe: Tensor, p: float, seed: Tensor | None
    ) -> Tensor:
        h = F.embedding(ids, table) * math.sqrt(table.shape[1]) + pe[position_ids]
        return dropout(h, p, seed)

    def add_norm(
        h: Tensor, y: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, p: float,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        h = h + dropout(y + bias.to(y.dtype), p, seed)
        return h, layer_norm(h, gamma, beta)

    def bias_act(
        u: Tensor, bias: Tensor, p: float, seed: Tensor | None, activation: str = "relu"
    ) -> Tensor:
        return dropout(ACTIVATIONS[activation](u + bias.to(u.dtype)), p, seed)

    return RowOps(embed, add_norm, bias_act)


specification = plain_rowops(row_dropout)
