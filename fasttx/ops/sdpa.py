"""Backend `sdpa`: `torch.nn.functional.scaled_dot_product_attention`, with torch's own masks.

T rows, B sequences, L max_seqlen, H heads, D head_dim. Every dropout site draws from torch's
default generator; the seeds of the sites are ignored.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttx.ops.contract import Adapter, Attend
from fasttx.ops.dropout import ONE, Dropout, keep_scale
from fasttx.ops.padded import gather_rows, padded_rows, scatter_rows
from fasttx.ops.plain import PlainOperations

ROWS = 512  # that a dropout mask is drawn for at a time on the CPU: it stays in the cache


def _draw_mask(rows: int, like: Tensor, t: int) -> Tensor:
    """(rows, columns) of 0 and 1 by torch's CPU generator, each kept where 16 bits are >= t.

    torch's own dropout draws a Bernoulli a value; comparing 16 bits is 4 to 5 times as fast.
    """
    shape = (rows, *like.shape[1:])
    count = math.prod(shape)
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    uniforms = bits.view(torch.int16)[:count].view(shape)  # -32768 ... 32767
    return torch.ge(uniforms, t - 2**15, out=torch.empty(shape, dtype=like.dtype))


class _CpuDropout(torch.autograd.Function):
    """Dropout with few large temporaries, which on the CPU cost more than arithmetic."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, t: int) -> Tensor:
        out = x * keep_scale(t)
        masks = []
        for rows in out.split(ROWS):
            mask = _draw_mask(len(rows), out, t)
            rows.mul_(mask)
            masks.append(mask.bool())
        ctx.save_for_backward(torch.cat(masks) if masks else out.bool())
        ctx.scale = keep_scale(t)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return (grad * mask).mul_(ctx.scale), None


class _CpuReluDropout(torch.autograd.Function):
    """dropout(relu(u + bias)): what it lets through shows in its output, so no mask is kept."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, bias: Tensor, t: int) -> Tensor:
        scale = keep_scale(t)
        out = torch.add(bias * scale, u, alpha=scale).relu_()
        if t:
            for rows in out.split(ROWS):
                rows.mul_(_draw_mask(len(rows), out, t))
        ctx.save_for_backward(out)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (out,) = ctx.saved_tensors
        grad = torch.ops.aten.threshold_backward(grad, out, 0).mul_(ctx.scale)
        return grad, grad.sum(0), None


def _by_hand(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


class SdpaOperations(PlainOperations):
    def drop(self, x: Tensor, dropout: Dropout) -> Tensor:
        """Dropout by torch's generator. On the CPU p is rounded to 1 / 65536."""
        t = dropout.threshold
        if t == 0:
            return x
        if t == ONE:
            return torch.where(torch.zeros_like(x, dtype=torch.bool), x, 0.0)
        return _CpuDropout.apply(x, t) if _by_hand(x) else F.dropout(x, dropout.p)

    def _bias_act(self, u: Tensor, bias: Tensor, dropout: Dropout, activation: str) -> Tensor:
        t = dropout.threshold
        if activation == "relu" and t < ONE and u.requires_grad and _by_hand(u):
            return _CpuReluDropout.apply(u, bias.to(u.dtype), t)
        return super()._bias_act(u, bias, dropout, activation)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, how: Attend) -> Tensor:
        return self._attend_packed(torch.stack([q, k, v], 1), how)

    def _attend_packed(self, qkv: Tensor, how: Attend) -> Tensor:
        return _one_by_one(qkv, how) if _by_hand(qkv) else _padded(qkv, how)


def _above_0(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """The same scores with a scale above 0: torch multiplies the -inf of a mask by it too."""
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale < 0 else (q * 0.0, 1.0)


def _one_by_one(qkv: Tensor, how: Attend) -> Tensor:
    """No padded FLOPs, and one sequence's weights fit the cache; sizes are free to read here."""
    starts, lens = how.spans.starts.tolist(), how.spans.lens.tolist()
    p, causal = how.dropout.p, how.causal
    live = sorted((s, n) for s, n in zip(starts, lens, strict=True) if n)
    if not live:  # all zeros, but still in the graph: DDP waits for every parameter's gradient
        return qkv[:, 0].masked_fill(torch.ones((), dtype=torch.bool), 0.0)
    sizes, end = [], 0  # alternating: a gap, a sequence, ..., the last gap
    for start, length in live:
        sizes += [start - end, length]
        end = start + length
    pieces = qkv.split([*sizes, len(qkv) - end])  # one split: its backward is one concatenation
    out = []
    for i, piece in enumerate(pieces):
        if i % 2 == 0:
            out.append(piece.new_zeros(piece.shape[0], *piece.shape[2:]))
            continue
        q, k, v = piece.permute(1, 2, 0, 3).unsqueeze(1)
        q, scale = _above_0(q, how.scale)
        o = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=causal, scale=scale)
        out.append(o[0].transpose(0, 1))
    return torch.cat(out)


def _padded(qkv: Tensor, how: Attend) -> Tensor:
    """No size is read from the device: padded to max_seqlen, with a key mask."""
    spans, p = how.spans, how.dropout.p
    index = padded_rows(spans, qkv.shape[0])
    q, k, v = (gather_rows(x, index) for x in qkv.unbind(1))
    position = torch.arange(spans.max_seqlen, device=qkv.device)
    lens = spans.lens[:, None]
    # An empty sequence may look at its zeros: a row with no key at all is NaN in some kernels.
    mask = ((position < lens) | (lens == 0))[:, None, None, :]
    if how.causal:
        mask = mask & (position <= position[:, None])
    q, scale = _above_0(q, how.scale)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, scale=scale)
    return scatter_rows(out, index, qkv.shape[0])


class Sdpa(Adapter):
    operations = SdpaOperations()


adapter: Adapter = Sdpa()
