"""The Metal kernels behind the signatures of a backend; `mps` decides whether to trust them.

T rows, B sequences, H heads, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fasttx.kernels.metal import attention as kernels
from fasttx.kernels.metal import rowops as row_kernels
from fasttx.ops import dropout
from fasttx.ops.rows import LAYER_NORM_EPS, RowOps


def _dropout(p: float, seed: Tensor | None) -> tuple[int, Tensor | None]:
    """The threshold and the seed that the operators take; raises as the specification does."""
    t = dropout.threshold(p)
    return t, dropout.require_seed(seed) if t else None


def attention(
    qkv: Tensor,
    seq_starts: Tensor,
    seq_lens: Tensor,
    *,
    max_seqlen: int,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """`attention_qkv` of packed projections qkv (T, 3, H, D), read in place."""
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    t, seed = _dropout(dropout_p, seed)
    return kernels.attention(qkv, seq_starts, seq_lens, max_seqlen, t, seed, causal, scale)[0]


def attention_qkv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_starts: Tensor,
    seq_lens: Tensor,
    *,
    max_seqlen: int,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention inside each sequence. q, k, v (T, H, D), seq_starts and seq_lens (B,) int32
    -> (T, H, D), all of one dtype of float32, bfloat16, float16.

    Any strides, best with D contiguous. Rows outside every sequence come out 0, and so do their
    gradients, whatever they hold. seed: () int64 tensor, needed where dropout_p > 0.
    Raises ValueError and TypeError for shapes, dtypes and probabilities that cannot be.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    t, seed = _dropout(dropout_p, seed)
    return kernels.attention_qkv(q, k, v, seq_starts, seq_lens, max_seqlen, t, seed, causal, scale)[
        0
    ]


def _embed(
    ids: Tensor, position_ids: Tensor, table: Tensor, pe: Tensor, p: float, seed: Tensor | None
) -> Tensor:
    return row_kernels.embed(ids, position_ids, table, pe, *_dropout(p, seed))


def _add_norm(
    h: Tensor, y: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    h = h.to(torch.promote_types(h.dtype, y.dtype))
    return row_kernels.add_norm(h, y, bias, gamma, beta, *_dropout(p, seed), LAYER_NORM_EPS)[:2]


def _bias_act(
    u: Tensor, bias: Tensor, p: float, seed: Tensor | None, activation: str = "relu"
) -> Tensor:
    return row_kernels.bias_act(u, bias, *_dropout(p, seed), activation == "gelu")


rowops = RowOps(_embed, _add_norm, _bias_act)
