"""The padded form of packed rows, for attention in plain tensor algebra; no size leaves the device.

T rows, B sequences, L max_seqlen, H heads, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fasttx.ops.contract import Spans


def padded_rows(spans: Spans, rows: int) -> Tensor:
    """(B, L) int64: the row of each position, and `rows` where the sequence has ended."""
    position = torch.arange(spans.max_seqlen, device=spans.starts.device)
    index = spans.starts.long()[:, None] + position
    return torch.where(position < spans.lens[:, None], index, rows)


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """x (T, H, D), index (B, L) -> (B, H, L, D), zeros past each end; no other row is read."""
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])[index].transpose(1, 2)


def scatter_rows(x: Tensor, index: Tensor, rows: int) -> Tensor:
    """The inverse: x (B, H, L, D) -> (rows, H, D), zeros where no sequence is."""
    out = x.new_zeros(rows + 1, x.shape[1], x.shape[3])
    return out.index_put((index,), x.transpose(1, 2))[:rows]
