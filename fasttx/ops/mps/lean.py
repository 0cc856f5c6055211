"""Attention in plain tensor algebra with a hand-written backward pass: what `mps` falls back to.

Autograd's own pass through softmax and dropout walks over the L x L matrices more often, and keeps
more of them. Here two are kept, weights w and dropped weights m (one without dropout), and

    dv = m^T dout,   dm = dout v^T,   dscore = m * dm - w * delta,   delta = sum of out * dout

since m = w * mask / keep, so the mask itself is not needed again.
T rows, B sequences, L max_seqlen, H heads, D head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasttx.ops.contract import Adapter, Attend
from fasttx.ops.dropout import attention_keep, keep_scale, require_seed
from fasttx.ops.padded import gather_rows, padded_rows, scatter_rows
from fasttx.ops.plain import PlainOperations


def _weights(q: Tensor, k: Tensor, seq_lens: Tensor, causal: bool, scale: float) -> Tensor:
    """softmax(q k^T scale) of q, k (B, H, L, D) -> (B, H, L, L), at least in fp32.

    The mask enters with the product, as what it is added to, so it costs no pass of its own.
    """
    b, h, n, _ = q.shape
    position = torch.arange(n, device=q.device)
    allowed = (position < seq_lens[:, None])[:, None, :]
    if causal:
        allowed = allowed & (position <= position[:, None])
    # A finite value, since a row may have no key at all, and small enough to be added to.
    bias = (~allowed).to(q.dtype) * (torch.finfo(q.dtype).min / 2)
    rows = bias.shape[1]  # 1, or n where it differs from query to query
    bias = bias[:, None].expand(b, h, rows, n).reshape(b * h, rows, n)
    scores = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), alpha=scale)
    return scores.softmax(-1).view(b, h, n, n)


class _Attention(torch.autograd.Function):
    """q, k, v (B, H, L, D), zeros past each end -> (B, H, L, D)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, how: Attend) -> Tensor:
        t, seed, _ = how.dropout
        wide = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            weights = _weights(q.to(wide), k.to(wide), how.spans.lens, how.causal, how.scale)
            dropped = weights
            if t:
                b, h, n, _ = weights.shape
                keep = attention_keep(require_seed(seed), b, h, n, n, t)
                dropped = torch.where(keep, weights * keep_scale(t), 0.0)
            out = (dropped @ v.to(wide)).to(q.dtype)
        ctx.save_for_backward(q, k, v, weights, dropped if t else None, out)
        ctx.scale = how.scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        q, k, v, weights, dropped, out = ctx.saved_tensors
        dropped = weights if dropped is None else dropped
        wide = weights.dtype
        with torch.autocast(q.device.type, enabled=False):
            dout = dout.to(wide)
            delta = (out.to(wide) * dout).sum(-1, keepdim=True)
            dv = dropped.transpose(-1, -2) @ dout
            dscores = (dout @ v.to(wide).transpose(-1, -2)).mul_(dropped)
            dscores.addcmul_(weights, delta, value=-1)
            dq = (dscores @ k.to(wide)).mul_(ctx.scale)
            dk = (dscores.transpose(-1, -2) @ q.to(wide)).mul_(ctx.scale)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


class LeanOperations(PlainOperations):
    """Attention is differentiable once; every device and dtype."""

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, how: Attend) -> Tensor:
        index = padded_rows(how.spans, len(q))
        q_, k_, v_ = (gather_rows(x, index) for x in (q, k, v))
        out = _Attention.apply(q_, k_, v_, how)
        return scatter_rows(out, index, len(q))


class Lean(Adapter):
    operations = LeanOperations()


adapter: Adapter = Lean()
