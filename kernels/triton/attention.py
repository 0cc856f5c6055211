"""The attention operators: packed (T, 3, H, D) projections, or q, k, v (T, H, D) that come apart.

T rows, B sequences, H heads, D head_dim. Sequence i is the rows seq_starts[i] ... seq_starts[i] +
seq_lens[i]; lse is (H, T) fp32. threshold (0 ... 65536) is the dropout probability in 16 bits.
"""

import math
from typing import Any

import torch
import triton
from fasttx.kernels.triton import tiles
from fasttx.kernels.triton.backward import backward
from fasttx.kernels.triton.device import DEAD_ROWS
from fasttx.kernels.triton.forward import forward_online, forward_whole_rows
from fasttx.kernels.triton.operators import (
    LAUNCH,
    dense,
    derivative,
    dot_precision,
    keep_scale,
    operator,
)
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOG2_E = math.log2(math.e)
WARP_SIZE = 32 if torch.version.hip is None else 64


def _check(q: Tensor, k: Tensor, v: Tensor, seq_starts: Tensor, seq_lens: Tensor) -> None:
    """What a kernel that follows pointers cannot find out for itself."""
    if q.dim() != 3 or q.shape != k.shape or q.shape != v.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k, v have shapes {shapes}; expected three equal (T, H, D)")
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; expected one of float32, bfloat16, "
            "float16 for all three"
        )
    if q.shape[2] > tiles.HEAD_DIMS[-1]:
        raise ValueError(f"head_dim is {q.shape[2]}; expected at most {tiles.HEAD_DIMS[-1]}")
    for name, x in (("seq_starts", seq_starts), ("seq_lens", seq_lens)):
        if x.dtype != torch.int32 or x.shape != seq_lens.shape or x.dim() != 1:
            raise TypeError(
                f"{name} is {x.dtype} {tuple(x.shape)}; expected int32 (B,), the same B for both"
            )
    if len({x.device for x in (q, k, v, seq_starts, seq_lens)}) > 1:
        raise ValueError(
            f"q is on {q.device}, seq_starts on {seq_starts.device}, seq_lens on "
            f"{seq_lens.device}; expected one device"
        )


def _clearing_programs(rows: int) -> int:
    return triton.cdiv(rows, DEAD_ROWS.value)


def _options(
    q: Tensor, tile: tiles.Tile, threshold: int, causal: bool
) -> dict[str, bool | int | str]:
    """The compile-time part of a launch."""
    return {
        "D": q.shape[2], "BLOCK_D": tiles.padded_head_dim(q.shape[2]),
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
        "CAUSAL": causal, "DROPOUT": threshold > 0, "PRECISION": dot_precision(q.dtype),
        "num_warps": tile.num_warps, "num_stages": tile.num_stages, **LAUNCH,
    }  # fmt: skip


def _forward(
    q: Tensor, k: Tensor, v: Tensor, seq_starts: Tensor, seq_lens: Tensor, max_seqlen: int,
    threshold: int, seed: Tensor | None, causal: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (T, H, D) and lse (H, T), each row of both written once."""
    _check(q, k, v, seq_starts, seq_lens)
    q, k, v = dense(q), dense(k), dense(v)
    rows, heads, head_dim = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((heads, rows), dtype=torch.float32)
    if not out.numel():
        return out, lse
    sequences = len(seq_lens)
    tile = tiles.tile("forward", 8 * q.element_size(), head_dim, max_seqlen, WARP_SIZE)
    kernel = forward_whole_rows if tile.whole else forward_online
    blocks = triton.cdiv(max_seqlen, tile.block_m) * heads * sequences
    with torch.cuda.device_of(q):
        kernel[(blocks + _clearing_programs(rows),)](
            q, k, v, out, lse, seq_starts.contiguous(), seq_lens.contiguous(), seed,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], out.stride(0),
            sequences, heads, rows, max_seqlen, scale * LOG2_E, threshold, keep_scale(threshold),
            **_options(q, tile, threshold, causal),
        )  # fmt: skip
    return out, lse


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, seq_starts: Tensor, seq_lens: Tensor, max_seqlen: int,
    threshold: int, seed: Tensor | None, causal: bool, scale: float,
) -> None:  # fmt: skip
    """Writes every row of dq, dk, dv (T, H, D), in which heads lie D apart."""
    if not out.numel():
        return
    q, k, v, grad = dense(q), dense(k), dense(v), dense(grad)
    rows, heads, head_dim = q.shape
    sequences = len(seq_lens)
    tile = tiles.tile("backward", 8 * q.element_size(), head_dim, max_seqlen, WARP_SIZE)
    blocks = triton.cdiv(max_seqlen, tile.block_n)
    if not tile.whole:
        blocks += triton.cdiv(max_seqlen, tile.block_m)
    with torch.cuda.device_of(q):
        backward[(blocks * heads * sequences + _clearing_programs(rows),)](
            q, k, v, out, lse, grad, dq, dk, dv,
            seq_starts.contiguous(), seq_lens.contiguous(), seed,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], out.stride(0), *grad.stride()[:2],
            dq.stride(0), dk.stride(0), dv.stride(0),
            sequences, heads, rows, max_seqlen, scale * LOG2_E, scale, threshold,
            keep_scale(threshold),
            WHOLE=tile.whole, **_options(q, tile, threshold, causal),
        )  # fmt: skip


# ------------------------------------------------------------------------------------ operators

_OPTIONS = (
    "Tensor seq_starts, Tensor seq_lens, SymInt max_seqlen, int threshold, Tensor? seed, "
    "bool causal, float scale"
)


def _outputs_like(q: Tensor) -> tuple[Tensor, Tensor]:
    rows, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((heads, rows), dtype=torch.float32)


@operator(
    f"attention(Tensor qkv, {_OPTIONS}) -> (Tensor, Tensor)",
    fake=lambda qkv, *options: _outputs_like(qkv[:, 0]),
)
def attention(qkv: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return _forward(*qkv.unbind(1), *options)


@operator(
    f"attention_qkv(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
    fake=lambda q, *options: _outputs_like(q),
)
def attention_qkv(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return _forward(q, k, v, *options)


@operator(
    f"attention_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, {_OPTIONS}) -> Tensor",
    fake=lambda grad, qkv, *options: qkv.new_empty(qkv.shape),
)
def attention_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, *options: Any
) -> Tensor:
    dqkv = qkv.new_empty(qkv.shape)
    _backward(grad, *qkv.unbind(1), out, lse, *dqkv.unbind(1), *options)
    return dqkv


@operator(
    "attention_qkv_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    fake=lambda grad, q, *options: tuple(q.new_empty(q.shape) for _ in range(3)),
)
def attention_qkv_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
    _backward(grad, q, k, v, out, lse, dq, dk, dv, *options)
    return dq, dk, dv


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """For both derivatives: the projections, the outputs and the options."""
    *projections, seq_starts, seq_lens, max_seqlen, threshold, seed, causal, scale = inputs
    ctx.save_for_backward(*projections, *output, seq_starts, seq_lens, seed)
    ctx.settings = max_seqlen, threshold, causal, scale
    ctx.set_materialize_grads(False)  # lse has none


def _gradients(ctx: Any, grad: Tensor | None, backward: Any) -> tuple[Any, ...]:
    """Of the projections; nothing for the seven options."""
    *projections, out, lse, seq_starts, seq_lens, seed = ctx.saved_tensors
    max_seqlen, threshold, causal, scale = ctx.settings
    gradients = (None,) * len(projections)
    if grad is not None:
        gradients = backward(
            grad, *projections, out, lse,
            seq_starts, seq_lens, max_seqlen, threshold, seed, causal, scale,
        )  # fmt: skip
    return (*(gradients if isinstance(gradients, tuple) else (gradients,)), *(None,) * 7)


derivative("attention", _save, lambda ctx, grad, _: _gradients(ctx, grad, attention_backward))
derivative(
    "attention_qkv", _save, lambda ctx, grad, _: _gradients(ctx, grad, attention_qkv_backward)
)
