"""The hand-written attention that defines what every backend computes; any device, any dtype.

T rows, B sequences, L max_seqlen, H heads, D head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasttx.ops import dropout
from fasttx.ops.padded import gather_rows, padded_rows, scatter_rows
from fasttx.ops.rows import specification as rowops  # noqa: F401  (part of the adapter)


def unavailable_reasons(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    return []


def attention_weights(
    q: Tensor, k: Tensor, seq_lens: Tensor, *, causal: bool, scale: float | None
) -> Tensor:
    """softmax(q k^T * scale) of padded q, k (B, H, L, D) -> (B, H, L, L), at least in fp32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):
        scores = q.to(wide) @ k.to(wide).transpose(-1, -2) * scale
    position = torch.arange(q.shape[2], device=q.device)
    allowed = (position < seq_lens[:, None])[:, None, None, :]
    if causal:
        allowed = allowed & (position <= position[:, None])
    # The lowest finite value, not -inf: a row with no key at all must stay free of NaN.
    return scores.masked_fill(~allowed, torch.finfo(wide).min).softmax(-1)


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
    """Attention inside each sequence. q, k, v (T, H, D), seq_starts and seq_lens (B,) -> (T, H, D).

    Rows outside every sequence come out 0, and so do their gradients, whatever they hold.
    seed: () int64 tensor, needed where dropout_p > 0, which ValueError keeps within [0, 1].
    """
    t = dropout.threshold(dropout_p)
    index = padded_rows(seq_starts, seq_lens, max_seqlen, len(q))
    q_, k_, v_ = (gather_rows(x, index) for x in (q, k, v))
    weights = attention_weights(q_, k_, seq_lens, causal=causal, scale=scale)
    if t:
        b, h, lq, lk = weights.shape
        keep = dropout.attention_keep(dropout.require_seed(seed), b, h, lq, lk, t)
        weights = torch.where(keep, weights * dropout.keep_scale(t), 0.0)
    with torch.autocast(q.device.type, enabled=False):
        out = (weights @ v_.to(weights.dtype)).to(q.dtype)
    return scatter_rows(out, index, len(q))


def attention(qkv: Tensor, seq_starts: Tensor, seq_lens: Tensor, **options: Any) -> Tensor:
    """`attention_qkv` of packed projections qkv (T, 3, H, D)."""
    q, k, v = qkv.unbind(1)
    return attention_qkv(q, k, v, seq_starts, seq_lens, **options)
