"""Launches the attention kernels, as operators with derivatives.

T rows, B sequences, H heads, D head_dim. `threshold` is the dropout probability in 1 / 65536.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from fasttx.kernels.metal import shaders
from fasttx.kernels.metal.operators import dense, derivative, keep_scale, operator
from torch import Tensor

FILES = ("philox", "tiles", "attention_forward", "attention_backward")
ROWS = 32  # of a threadgroup: 8 for each of its simdgroups


def _kernel(name: str, q: Tensor, threshold: int, causal: bool) -> Any:
    return shaders.kernel(
        q.device.type, name, *FILES, element_type=shaders.ELEMENTS[q.dtype], HEAD_DIM=q.shape[-1],
        DROPOUT=int(threshold > 0), CAUSAL=int(causal),
    )  # fmt: skip


def _check(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, lens: Tensor, seed: Tensor | None
) -> None:
    """The kernels see pointers, no shapes: what does not fit would be read past its end."""
    if q.dim() != 3 or q.shape != k.shape or q.shape != v.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k, v have shapes {shapes}; expected three equal (T, H, D)")
    if q.dtype not in shaders.ELEMENTS or q.dtype != k.dtype or q.dtype != v.dtype:
        raise TypeError(
            f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; expected one dtype of float32, "
            "float16, bfloat16"
        )
    if starts.dim() != 1 or starts.shape != lens.shape:
        raise ValueError(
            f"seq_starts and seq_lens have shapes {tuple(starts.shape)} and {tuple(lens.shape)}; "
            "expected two equal (B,)"
        )
    for name, x in (("k", k), ("v", v), ("seq_starts", starts), ("seq_lens", lens), ("seed", seed)):
        if x is not None and x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}; expected one device")


def _grid(q: Tensor, lens: Tensor, max_seqlen: int) -> dict[str, tuple[int, int, int]] | None:
    """How many threads to launch; None where there is nothing to do."""
    grid = (-(-max_seqlen // ROWS) * shaders.GROUP, q.shape[1], len(lens))
    return {"threads": grid, "group_size": (shaders.GROUP, 1, 1)} if min(grid) and len(q) else None


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:2]]


def _ints(x: Tensor) -> Tensor:
    return x.to(torch.int32).contiguous()


def _forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, lens: Tensor, max_seqlen: int,
    threshold: int, seed: Tensor | None, causal: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check(q, k, v, starts, lens, seed)
    q, k, v = dense(q), dense(k), dense(v)
    starts, lens = _ints(starts), _ints(lens)
    # Zeros: no simdgroup owns the rows outside every sequence.
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.zeros(q.shape[1], len(q), dtype=torch.float32, device=q.device)
    if grid := _grid(q, lens, max_seqlen):
        size = [len(q), max_seqlen, threshold, *_strides(q, k, v, out)]
        factor = [scale * math.log2(math.e), keep_scale(threshold)]
        _kernel("attention_forward", q, threshold, causal)(
            q, k, v, out, lse, starts, lens, starts if seed is None else seed, size, factor, **grid
        )
    return out, lse


def _backward(
    gradients: tuple[Tensor, Tensor, Tensor], dout: Tensor, q: Tensor, k: Tensor, v: Tensor,
    out: Tensor, lse: Tensor, starts: Tensor, lens: Tensor, max_seqlen: int, threshold: int,
    seed: Tensor | None, causal: bool, scale: float,
) -> None:  # fmt: skip
    """Writes dq, dk, dv into `gradients`, which hold zeros."""
    q, k, v, dout = dense(q), dense(k), dense(v), dense(dout)
    starts, lens = _ints(starts), _ints(lens)
    dq, dk, dv = gradients
    if grid := _grid(q, lens, max_seqlen):
        delta = torch.empty_like(lse)
        size = [len(q), max_seqlen, threshold, *_strides(q, k, v, out, dout, dq, dk, dv)]
        factor = [scale * math.log2(math.e), keep_scale(threshold), scale]
        spans = (starts, lens, starts if seed is None else seed)
        _kernel("attention_dq", q, threshold, causal)(
            q, k, v, out, dout, dq, lse, delta, *spans, size, factor, **grid
        )
        _kernel("attention_dkdv", q, threshold, causal)(
            q, k, v, dout, dk, dv, lse, delta, *spans, size, factor, **grid
        )


# ------------------------------------------------------------------------------ packed projections

OPTIONS = (
    "Tensor starts, Tensor lens, int max_seqlen, int threshold, Tensor? seed, bool causal, "
    "float scale"
)


def _packed_shapes(qkv: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    t, _, h, d = qkv.shape
    return qkv.new_empty(t, h, d), qkv.new_empty(h, t, dtype=torch.float32)


@operator(f"attention(Tensor qkv, {OPTIONS}) -> (Tensor, Tensor)", _packed_shapes)
def attention(qkv: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """qkv (T, 3, H, D) -> out (T, H, D) and lse (H, T) float32, to base 2, 0 in dead rows."""
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}; expected (T, 3, H, D)")
    return _forward(*qkv.unbind(1), *options)


@operator(
    f"attention_backward(Tensor dout, Tensor qkv, Tensor out, Tensor lse, {OPTIONS}) -> Tensor",
    lambda dout, qkv, *rest: qkv.new_empty(qkv.shape),
)
def _attention_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, *options: Any
) -> Tensor:
    dqkv = torch.zeros(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    _backward(dqkv.unbind(1), dout, *qkv.unbind(1), out, lse, *options)
    return dqkv


def _save(count: int) -> Any:
    """Keeps the first `count` inputs, the outputs, and the options."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        starts, lens, max_seqlen, threshold, seed, causal, scale = inputs[count:]
        ctx.save_for_backward(*inputs[:count], *output, starts, lens, seed)
        ctx.options = max_seqlen, threshold, causal, scale
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    return setup_context


def _saved(ctx: Any) -> tuple[Any, ...]:
    *tensors, starts, lens, seed = ctx.saved_tensors
    max_seqlen, threshold, causal, scale = ctx.options
    return (*tensors, starts, lens, max_seqlen, threshold, seed, causal, scale)


def _packed_derivative(ctx: Any, dout: Tensor | None, _: Any) -> tuple[Any, ...]:
    dqkv = None if dout is None else _attention_backward(dout, *_saved(ctx))
    return (dqkv, *[None] * 7)


derivative("attention", _save(1), _packed_derivative)

# --------------------------------------------------------------------------- q, k, v that lie apart


def _apart_shapes(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    t, h, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(h, t, dtype=torch.float32)


@operator(
    f"attention_qkv(Tensor q, Tensor k, Tensor v, {OPTIONS}) -> (Tensor, Tensor)", _apart_shapes
)
def attention_qkv(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """As `attention`, of three (T, H, D)."""
    return _forward(q, k, v, *options)


@operator(
    "attention_qkv_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{OPTIONS}) -> (Tensor, Tensor, Tensor)",
    lambda dout, q, k, v, *rest: tuple(x.new_empty(x.shape) for x in (q, k, v)),
)
def _attention_qkv_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.zeros(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    _backward((dq, dk, dv), dout, q, k, v, out, lse, *options)
    return dq, dk, dv


def _apart_derivative(ctx: Any, dout: Tensor | None, _: Any) -> tuple[Any, ...]:
    gradients = [None] * 3 if dout is None else _attention_qkv_backward(dout, *_saved(ctx))
    return (*gradients, *[None] * 7)


derivative("attention_qkv", _save(3), _apart_derivative)
