"""The backends behind the signature of `torch.nn.functional.scaled_dot_product_attention`."""

from __future__ import annotations

import torch
from torch import Tensor

from fasttx.ops import registry
from fasttx.ops.arguments import real_tokens
from fasttx.ops.contract import Spans
from fasttx.ops.dropout import NO_DROPOUT, Dropout


def padded_spans(mask: Tensor | None, batch: int, length: int, device: torch.device) -> Spans:
    """The spans of padded rows (B * L): those that mask (B, L) calls real; None: all of them.

    Raises ValueError for a mask with a hole, and as `real_tokens`.
    """
    first = length * torch.arange(batch, dtype=torch.int32, device=device)
    if mask is None:
        return Spans(first, torch.full_like(first, length), length)
    # The search for holes waits for the device anyway.
    real = real_tokens(mask, (batch, length), wait=True).to(device)
    position = torch.arange(length, device=device)
    start = real.to(torch.uint8).argmax(1) if length else real.sum(1)
    lens = real.sum(1)
    expected = (position >= start[:, None]) & (position < (start + lens)[:, None])
    if not torch.equal(real, expected):
        row = int((real != expected).any(1).nonzero()[0])
        raise ValueError(
            f"attention_mask row {row} has a hole; expected the real tokens of a row to stand "
            "together (left or right padding). Gather them first, or mask whole rows"
        )
    return Spans(first + start.int(), lens.int(), length)


def seed_of_generator(device: torch.device) -> Tensor:
    """() int64: the seed of a dropout site, drawn from torch's default generator."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)


def scaled_dot_product_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Self-attention of padded q, k, v (B, H, L, D) -> (B, H, L, D).

    attention_mask (B, L), bool or 0/1, 1 = real token (Hugging Face's sense); the rows of padding
    come out 0. Dropout draws its seed from torch's default generator. `is_causal` counts from a
    row's first real token. Raises ValueError for shapes that differ, for masks with holes, and for
    those with other values than 0 and 1, such as additive ones.
    """
    if q.dim() != 4 or q.shape != k.shape or q.shape != v.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k, v have shapes {shapes}; expected three equal (B, H, L, D)")
    batch, heads, length, head_dim = q.shape
    spans = padded_spans(attention_mask, batch, length, q.device)
    operations = registry.resolve(backend, q.device, q.dtype, head_dim)
    dropout = NO_DROPOUT
    if dropout_p != 0:
        dropout = Dropout.of(dropout_p, seed_of_generator(q.device))
    q, k, v = (x.transpose(1, 2).reshape(batch * length, heads, head_dim) for x in (q, k, v))
    out = operations.attention_qkv(q, k, v, spans, dropout, causal=is_causal, scale=scale)
    return out.view(batch, length, heads, head_dim).transpose(1, 2)
