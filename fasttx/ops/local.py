"""Attention within a window: a token sees those that are less than `window` places away.

Plain tensor algebra on any device, in time linear in the length, with the masks that all backends
share. T rows, B sequences, L max_seqlen, H heads, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fasttx.ops.contract import Spans
from fasttx.ops.dropout import LANES, NO_DROPOUT, Dropout, attention_keep, keep_scale, require_seed
from fasttx.ops.padded import gather_rows, padded_rows, scatter_rows


def local_attention(
    q: Tensor, k: Tensor, v: Tensor, spans: Spans, window: int, dropout: Dropout = NO_DROPOUT,
    *, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """softmax(q k^T scale) v over keys with |query - key| < window; three (T, H, D) -> (T, H, D).

    Scores are at least float32. scale: D ** -0.5 by default.
    Raises ValueError for a window below 1.
    """
    if window < 1:
        raise ValueError(f"window is {window}; expected 1 (a token sees itself) or more")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    index = padded_rows(spans, q.shape[0])
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        q_, k_, v_ = (gather_rows(x, index).to(wide) for x in (q, k, v))
        length = q_.shape[2]
        blocks = [
            _block(q_, k_, v_, spans.lens, first, window, dropout, scale)
            for first in range(0, length, max(window, LANES))
        ]
        out = torch.cat(blocks, 2) if blocks else q_
    return scatter_rows(out.to(q.dtype), index, q.shape[0])


def _block(
    q: Tensor, k: Tensor, v: Tensor, lens: Tensor, first: int, window: int, dropout: Dropout,
    scale: float,
) -> Tensor:  # fmt: skip
    """The queries from `first` on, as many as the window is wide, against the keys they can see."""
    batch, heads, length, _ = q.shape
    last = min(length, first + max(window, LANES))
    low = max(0, first - window + 1) // LANES * LANES  # where a block of the generator begins
    high = min(length, last + window - 1)
    query = torch.arange(first, last, device=q.device)[:, None]
    key = torch.arange(low, high, device=q.device)
    allowed = ((query - key).abs() < window) & (key < lens[:, None, None, None])
    scores = q[:, :, first:last] @ k[:, :, low:high].transpose(-1, -2) * scale
    # The lowest finite value, not -inf: a row past the end of its sequence must stay free of NaN.
    weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1)
    if t := dropout.threshold:
        seed = require_seed(dropout.seed)
        keep = attention_keep(
            seed, batch, heads, last - first, high - low, t, first_query=first, first_key=low
        )
        weights = torch.where(keep, weights * keep_scale(t), 0.0)
    return weights @ v[:, :, low:high]
