"""Backend `reference`: the hand-written attention that defines what every backend computes.

T rows, B sequences, L max_seqlen, H heads, D head_dim. It runs on any device, in any dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fasttx.ops.contract import Adapter, Attend
from fasttx.ops.dropout import attention_keep, keep_scale, require_seed
from fasttx.ops.padded import gather_rows, padded_rows, scatter_rows
from fasttx.ops.plain import PlainOperations


def attention_weights(q: Tensor, k: Tensor, seq_lens: Tensor, causal: bool, scale: float) -> Tensor:
    """softmax(q k^T * scale) of padded q, k (B, H, L, D) -> (B, H, L, L), at least in fp32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        scores = q.to(wide) @ k.to(wide).transpose(-1, -2) * scale
    position = torch.arange(q.shape[2], device=q.device)
    allowed = (position < seq_lens[:, None])[:, None, None, :]
    if causal:
        allowed = allowed & (position <= position[:, None])
    # The lowest finite value, not -inf: a row with no key at all must stay free of NaN.
    return scores.masked_fill(~allowed, torch.finfo(wide).min).softmax(-1)


class ReferenceOperations(PlainOperations):
    def _attend(self, q: Tensor, k: Tensor, v: Tensor, how: Attend) -> Tensor:
        index = padded_rows(how.spans, q.shape[0])
        q_, k_, v_ = (gather_rows(x, index) for x in (q, k, v))
        weights = attention_weights(q_, k_, how.spans.lens, how.causal, how.scale)
        if t := how.dropout.threshold:
            batch, heads, queries, keys = weights.shape
            keep = attention_keep(require_seed(how.dropout.seed), batch, heads, queries, keys, t)
            weights = torch.where(keep, weights * keep_scale(t), 0.0)
        with torch.autocast(q.device.type, enabled=False):
            out = (weights @ v_.to(weights.dtype)).to(q.dtype)
        return scatter_rows(out, index, q.shape[0])


class Reference(Adapter):
    operations = ReferenceOperations()


adapter: Adapter = Reference()
