"""Attention by `torch.nn.functional.scaled_dot_product_attention`, with torch's own dropout masks.

T rows, B sequences, L max_seqlen, H heads, D head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttx.attention import dropout
from fasttx.attention.padded import gather_rows, padded_rows, scatter_rows
from fasttx.rowops import plain_rowops


def unavailable_reasons(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    return []


def torch_dropout(x: Tensor, p: float, seed: Tensor | None = None) -> Tensor:
    """Dropout by torch's generator; `seed` is ignored.

    torch's CPU dropout draws one double-sized Bernoulli a value; 16 bits a value, compared straight
    into the mask, are 4 to 5 times as fast. The scale is the quantised keep probability's.
    """
    t = dropout.threshold(p)
    if t == 0:
        return x
    if t == dropout.ONE:
        return torch.where(torch.zeros_like(x, dtype=torch.bool), x, 0.0)
    if x.device.type != "cpu":
        return F.dropout(x, p)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    uniforms = bits.view(torch.int16)[: x.numel()].view(x.shape)  # -32768 ... 32767
    mask = torch.ge(uniforms, t - 2**15, out=torch.empty_like(x, requires_grad=False))
    return x * mask.mul_(dropout.keep_scale(t))


rowops = plain_rowops(torch_dropout)


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

    `seed` is ignored: torch's default generator draws the mask. Elsewhere as the reference.
    """
    return attention(
        torch.stack([q, k, v], 1), seq_starts, seq_lens, max_seqlen=max_seqlen,
        dropout_p=dropout_p, seed=seed, causal=causal, scale=scale,
    )  # fmt: skip


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
    """`attention_qkv` of packed projections qkv (T, 3, H, D)."""
    dropout.threshold(dropout_p)  # refuses what is no probability
    if qkv.device.type == "cpu" and not torch.compiler.is_compiling():
        return _one_by_one(qkv, seq_starts, seq_lens, dropout_p, causal, scale)
    return _padded(qkv, seq_starts, seq_lens, max_seqlen, dropout_p, causal, scale)


def _one_by_one(
    qkv: Tensor, seq_starts: Tensor, seq_lens: Tensor, p: float, causal: bool, scale: float | None
) -> Tensor:
    """No padded FLOPs, and one sequence's weights fit the cache; sizes are free to read here."""
    spans = sorted((s, n) for s, n in zip(seq_starts.tolist(), seq_lens.tolist(), strict=True) if n)
    if not spans:  # all zeros, but still in the graph: DDP waits for every parameter's gradient
        return qkv[:, 0].masked_fill(torch.ones((), dtype=torch.bool), 0.0)
    sizes, end = [], 0  # alternating: a gap, a sequence, ..., the last gap
    for start, length in spans:
        sizes += [start - end, length]
        end = start + length
    pieces = qkv.split([*sizes, len(qkv) - end])  # one split: its backward is one concatenation
    out = []
    for i, piece in enumerate(pieces):
        if i % 2 == 0:
            out.append(piece.new_zeros(piece.shape[0], *piece.shape[2:]))
            continue
        q, k, v = piece.permute(1, 2, 0, 3).unsqueeze(1)
        o = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=causal, scale=scale)
        out.append(o[0].transpose(0, 1))
    return torch.cat(out)


def _padded(
    qkv: Tensor, seq_starts: Tensor, seq_lens: Tensor, max_seqlen: int, p: float, causal: bool,
    scale: float | None,
) -> Tensor:  # fmt: skip
    """No size is read from the device: padded to max_seqlen, with a key mask."""
    index = padded_rows(seq_starts, seq_lens, max_seqlen, len(qkv))
    q, k, v = (gather_rows(x, index) for x in qkv.unbind(1))
    position = torch.arange(max_seqlen, device=qkv.device)
    # An empty sequence may look at its zeros: a row with no key at all is NaN in some kernels.
    mask = ((position < seq_lens[:, None]) | (seq_lens[:, None] == 0))[:, None, None, :]
    if causal:
        mask = mask & (position <= position[:, None])
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, scale=scale)
    return scatter_rows(out, index, len(qkv))
