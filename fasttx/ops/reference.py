"""Backend `reference`: the hand-written attention that defines what every backend computes.

T rows, B sequences, L max_seqlen, H heads, D head_dim. It runs on any device, in any dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fasttx.ops.contract import Adapter, Spans
from fasttx.ops.dropout import NO_DROPOUT, Dropout, attention_keep, keep_scale, require_seed
from fasttx.ops.padded import gather_rows, padded_rows, scatter_rows
from fasttx.ops.plain import PlainOperations


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


class ReferenceOperations(PlainOperations):
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
        index = padded_rows(spans.starts, spans.lens, spans.max_seqlen, len(q))
        q_, k_, v_ = (gather_rows(x, index) for x in (q, k, v))
        weights = attention_weights(q_, k_, spans.lens, causal=causal, scale=scale)
        if t := dropout.threshold:
            batch, heads, queries, keys = weights.shape
            keep = attention_keep(require_seed(dropout.seed), batch, heads, queries, keys, t)
            weights = torch.where(keep, weights * keep_scale(t), 0.0)
        with torch.autocast(q.device.type, enabled=False):
            out = (weights @ v_.to(weights.dtype)).to(q.dtype)
        return scatter_rows(out, index, len(q))


class Reference(Adapter):
    operations = ReferenceOperations()


adapter: Adapter = Reference()
