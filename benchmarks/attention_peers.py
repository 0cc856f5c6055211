"""What computes attention elsewhere: SDPA, textbook products, FlexAttention, torch's flash kernels.

A peer is one function and one line of ATTENTION_PEERS. H heads, D head_dim, L padded length.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """One input of an attention contest in both forms; q, k, v are views of `packed` or `padded`.

    packed (T, 3, H, D), cu_seqlens (B + 1,) int32, padded (3, B, H, L, D), real (B, L) bool.
    """

    packed: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    padded: Tensor
    real: Tensor

    @functools.cached_property
    def block_mask(self) -> Any:
        """FlexAttention's: which keys a row may see, those of its own text."""
        from torch.nn.attention.flex_attention import create_block_mask

        rows, device = len(self.packed), self.packed.device
        row = torch.arange(rows, device=device)
        text = torch.searchsorted(self.cu_seqlens[1:].contiguous(), row, right=True)

        def same_text(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return text[i] == text[j]

        return create_block_mask(same_text, None, None, rows, rows, device=str(device))


class Wanted(NamedTuple):
    """What a contest asks of a peer. p: the dropout probability."""

    device: torch.device
    dtype: torch.dtype
    p: float
    backward: bool


def _anywhere(wanted: Wanted) -> list[str]:
    return []


@dataclass(frozen=True)
class AttentionPeer:
    """attend(batch, p) -> the output: of packed tensors (T, H, D), of padded ones (B, H, L, D).

    unavailable: the reasons why it cannot do what is wanted. note: how its function differs.
    """

    attend: Callable[[Batch, float], Tensor]
    unavailable: Callable[[Wanted], list[str]] = _anywhere
    padded: bool = True
    note: str = ""


def _naive(batch: Batch, p: float) -> Tensor:
    """What textbooks write: two products, a softmax, a dropout, all weights in memory."""
    q, k, v = batch.padded
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~batch.real[:, None, None, :], torch.finfo(q.dtype).min)
    return F.dropout(scores.softmax(-1), p) @ v


def _sdpa(batch: Batch, p: float) -> Tensor:
    q, k, v = batch.padded
    mask = batch.real[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)


def _sdpa_without_dropout(batch: Batch, p: float) -> Tensor:
    return _sdpa(batch, 0.0)


def _no_dropout_to_leave_out(wanted: Wanted) -> list[str]:
    return [] if wanted.p else ["at p = 0 this is padded-sdpa"]


def _sdpa_on(backend: str) -> AttentionPeer:
    """SDPA held to one of CUDA's kernels, mask and dropout included where it takes them."""

    def attend(batch: Batch, p: float) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(getattr(SDPBackend, backend)):
            return _sdpa(batch, p)

    return AttentionPeer(attend, functools.partial(_refused_by_cuda, backend))


def _refused_by_cuda(backend: str, wanted: Wanted) -> list[str]:
    device, dtype, p, backward = wanted
    if device.type != "cuda":
        return [f"device {device.type}: SDPA's kernels are chosen by name on cuda only"]
    # What SDPA's kernels refuse they say in warnings: a tiny call shows it.
    q = torch.randn(2, 2, 16, 32, device=device, dtype=dtype, requires_grad=backward)
    real = torch.ones(2, 16, dtype=torch.bool, device=device)
    tiny = Batch(q, q, 16, torch.stack([q, q, q]), real)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            _sdpa_on(backend).attend(tiny, p)
        except RuntimeError as error:
            return [str(w.message).split(". ")[0] for w in said] or [str(error)]
    return []


def _varlen(batch: Batch, p: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    cu, longest = batch.cu_seqlens, batch.max_seqlen
    return varlen_attn(*batch.packed.unbind(1), cu, cu, longest, longest)


def _no_flash(wanted: Wanted) -> list[str]:
    reasons = []
    if wanted.device.type != "cuda":
        reasons.append(f"device {wanted.device.type}: torch's flash kernels need cuda")
    if wanted.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"dtype {wanted.dtype}: torch's flash kernels take float16 and bfloat16")
    return reasons


def _no_varlen(wanted: Wanted) -> list[str]:
    reasons = _no_flash(wanted)
    if not importlib.util.find_spec("torch.nn.attention.varlen"):
        reasons.append(f"torch {torch.__version__} has no varlen_attn: it needs 2.10 or newer")
    return [*reasons, *(["it has no dropout"] if wanted.p else [])]


class _Flash(torch.autograd.Function):
    """torch's own FlashAttention-2, raw: the only one of its kernels with lengths and dropout."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu: Tensor, n: int, p: float) -> Tensor:
        out, lse, seed, offset, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, cu, cu, n, n, p, False, False
        )
        ctx.save_for_backward(q, k, v, out, lse, cu, seed, offset)
        ctx.options = n, p
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, cu, seed, offset = ctx.saved_tensors
        n, p = ctx.options
        gradients = torch.ops.aten._flash_attention_backward(
            grad, q, k, v, out, lse, cu, cu, n, n, p, False, seed, offset
        )
        return (*gradients, None, None, None)


def _flash(batch: Batch, p: float) -> Tensor:
    return _Flash.apply(*batch.packed.unbind(1), batch.cu_seqlens, batch.max_seqlen, p)


@functools.cache
def _compiled_flex(device_type: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # What inductor writes for the CPU does not compile with dynamic shapes (torch 2.13).
    return torch.compile(flex_attention, dynamic=False if device_type == "cpu" else None)


def _flex(batch: Batch, p: float) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in batch.packed.unbind(1))
    return _compiled_flex(q.device.type)(q, k, v, block_mask=batch.block_mask)[0].transpose(0, 1)


def _no_flex(wanted: Wanted) -> list[str]:
    device, _, p, backward = wanted
    reasons = ["it has no dropout"] if p else []
    if device.type not in ("cpu", "cuda"):
        reasons.append(f"device {device.type}: FlexAttention's fused kernels are for cpu and cuda")
    if device.type == "cpu" and backward:
        reasons.append("on the CPU it has no backward pass")
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "c++"))):
        reasons.append("torch.compile needs a C++ compiler: install g++, or name one in $CXX")
    return reasons


ATTENTION_PEERS: dict[str, AttentionPeer] = {
    "padded-sdpa": AttentionPeer(_sdpa),
    "padded-sdpa-no-dropout": AttentionPeer(
        _sdpa_without_dropout, _no_dropout_to_leave_out, note="no dropout: another function"
    ),
    "naive": AttentionPeer(_naive),
    "flex-attention": AttentionPeer(_flex, _no_flex, padded=False),
    "varlen_attn": AttentionPeer(_varlen, _no_varlen, padded=False),
    "aten-flash-varlen": AttentionPeer(_flash, _no_flash, padded=False),
    "sdpa-math": _sdpa_on("MATH"),
    "sdpa-efficient": _sdpa_on("EFFICIENT_ATTENTION"),
    "sdpa-flash": _sdpa_on("FLASH_ATTENTION"),
    "sdpa-cudnn": _sdpa_on("CUDNN_ATTENTION"),
}
