"""The mean over the rows of each text: memory linear in rows, and the same bits whoever else is in
the batch, on every device.

A text's rows are added up one after another; the way back copies a text's gradient to its rows.
So no atomics are in it (unlike index_add), no product with 0 that makes NaN of another text's NaN,
and no matrix with an element for each text and row.

T rows, B texts, d columns.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from fasttx.ops.contract import Spans
from fasttx.text.packing import sequence_ids

# Elsewhere than on the CPU and CUDA: texts and positions that are gathered at a time. Fixed, so
# that a text is added up in the same order in every batch.
TEXTS, POSITIONS = 1024, 32


def mean_pool(n: Tensor, cu_seqlens: Tensor, max_seqlen: int | None = None) -> Tensor:
    """Mean over the rows of each sequence: (T, d) -> (B, d), 0 for an empty one.

    cu_seqlens (B + 1,) int32, max_seqlen any upper bound on the lengths. Derivatives of every order
    and in forward mode. Raises TypeError and ValueError as `Spans.from_cu_seqlens`.
    """
    longest = n.shape[0] if max_seqlen is None else max_seqlen
    Spans.from_cu_seqlens(cu_seqlens, longest, n.shape[0])
    return pool(n, cu_seqlens, longest)


def pool(n: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """`mean_pool` of arguments that have been checked."""
    with torch.autocast(n.device.type, enabled=False):
        wide = n.to(torch.promote_types(n.dtype, torch.float32))
        lens = cu_seqlens.diff().clamp(min=1)[:, None].to(wide.dtype)
        return (_summed(wide, cu_seqlens, max_seqlen) / lens).to(n.dtype)


def first_rows(n: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The first row of each sequence: (T, d) -> (B, d), 0 for an empty one."""
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
    if not n.shape[0]:
        return n.new_zeros(len(starts), n.shape[1])
    rows = n.index_select(0, starts.clamp(max=n.shape[0] - 1))
    return torch.where((starts < ends)[:, None], rows, 0.0)


def _summed(x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """`_sum` with the derivatives that the moment asks for."""
    if torch.compiler.is_compiling():
        return _ReverseSum.apply(x, cu_seqlens, max_seqlen)
    if torch._C._get_tracing_state() is not None:  # torch.jit saves no function of Python
        return _sum(x, cu_seqlens, max_seqlen)
    if _in_torch_func():
        return _Sum.apply(x, cu_seqlens, max_seqlen)
    if torch.is_grad_enabled() and x.requires_grad:
        return _ReverseSum.apply(x, cu_seqlens, max_seqlen)
    return _sum(x, cu_seqlens, max_seqlen)


def _spreaded(x: Tensor, cu_seqlens: Tensor, rows: int, max_seqlen: int) -> Tensor:
    """`_spread` likewise."""
    if torch.compiler.is_compiling():
        return _spread(x, cu_seqlens, rows)
    if _in_torch_func():
        return _Spread.apply(x, cu_seqlens, rows, max_seqlen)
    if torch.is_grad_enabled() and x.requires_grad:
        return _ReverseSpread.apply(x, cu_seqlens, rows, max_seqlen)
    return _spread(x, cu_seqlens, rows)


def _in_torch_func() -> bool:
    """Under a transform of torch.func, or in forward mode."""
    stack = torch._C._functorch.peek_interpreter_stack()
    return forward_ad._current_level >= 0 or stack is not None


def _sum(x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """The sum over the rows of each text: (T, d) -> (B, d)."""
    if x.device.type in ("cpu", "cuda", "meta"):
        rows = torch.arange(x.shape[0], dtype=cu_seqlens.dtype, device=x.device)
        # One bag more than texts, for the dead tail.
        return F.embedding_bag(rows, x, cu_seqlens, mode="sum")[:-1]
    return _gathered_sum(x, cu_seqlens, max_seqlen)


def _gathered_sum(x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """The same in plain tensor algebra; no size is read from the device."""
    starts, ends = cu_seqlens[:-1, None], cu_seqlens[1:, None]
    padded = torch.cat([x, x.new_zeros(1, x.shape[1])])
    sums = [x.new_zeros(0, x.shape[1])]
    for first in range(0, len(starts), TEXTS):
        texts = slice(first, first + TEXTS)
        total = x.new_zeros(len(starts[texts]), x.shape[1])
        for position in range(0, max_seqlen, POSITIONS):
            row = starts[texts] + torch.arange(position, position + POSITIONS, device=x.device)
            total = total + padded[torch.where(row < ends[texts], row, x.shape[0])].sum(1)
        sums.append(total)
    return torch.cat(sums)


def _spread(x: Tensor, cu_seqlens: Tensor, rows: int) -> Tensor:
    """Each text's row to all of its rows: (B, d) -> (T, d), 0 in the dead tail. The transpose."""
    padded = torch.cat([x, x.new_zeros(1, x.shape[1])])
    return padded.index_select(0, sequence_ids(cu_seqlens, rows))


class _Sum(torch.autograd.Function):
    """`_sum`, whose derivatives are `_spread` and itself."""

    @staticmethod
    def forward(x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        return _sum(x, cu_seqlens, max_seqlen)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, cu_seqlens, ctx.max_seqlen = inputs
        ctx.rows = x.shape[0]
        ctx.save_for_backward(cu_seqlens)
        ctx.save_for_forward(cu_seqlens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _Spread.apply(grad, *ctx.saved_tensors, ctx.rows, ctx.max_seqlen), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _Sum.apply(tangent, *ctx.saved_tensors, ctx.max_seqlen)

    @staticmethod
    def vmap(
        info: Any, dims: tuple[int | None, ...], x: Tensor, cu_seqlens: Tensor, *rest: Any
    ) -> tuple[Tensor, int]:
        return _columnwise(_Sum, dims, x, cu_seqlens, *rest)


class _Spread(torch.autograd.Function):
    """`_spread`, whose derivatives are `_sum` and itself."""

    @staticmethod
    def forward(x: Tensor, cu_seqlens: Tensor, rows: int, max_seqlen: int) -> Tensor:
        return _spread(x, cu_seqlens, rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, cu_seqlens, ctx.rows, ctx.max_seqlen = inputs
        ctx.save_for_backward(cu_seqlens)
        ctx.save_for_forward(cu_seqlens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _Sum.apply(grad, *ctx.saved_tensors, ctx.max_seqlen), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _Spread.apply(tangent, *ctx.saved_tensors, ctx.rows, ctx.max_seqlen)

    @staticmethod
    def vmap(
        info: Any, dims: tuple[int | None, ...], x: Tensor, cu_seqlens: Tensor, *rest: Any
    ) -> tuple[Tensor, int]:
        return _columnwise(_Spread, dims, x, cu_seqlens, *rest)


def _columnwise(
    function: Any, dims: tuple[int | None, ...], x: Tensor, cu_seqlens: Tensor, *rest: Any
) -> tuple[Tensor, int]:
    """Many x beside one another are one with more columns. Texts of one packing only."""
    if dims[0] is None or dims[1] is not None:
        raise NotImplementedError("torch.vmap over cu_seqlens; expected one packing for all")
    x = x.movedim(dims[0], 1)
    out = function.apply(x.flatten(1), cu_seqlens, *rest)
    return out.unflatten(1, x.shape[1:]), 1


class _ReverseSum(torch.autograd.Function):
    """`_Sum` in reverse mode only: what torch.compile can follow, and without the binding of
    arguments that torch.func's form has at every call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        ctx.save_for_backward(cu_seqlens)
        ctx.rows, ctx.max_seqlen = x.shape[0], max_seqlen
        return _sum(x, cu_seqlens, max_seqlen)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (cu_seqlens,) = ctx.saved_tensors
        return _spreaded(grad, cu_seqlens, ctx.rows, ctx.max_seqlen), None, None


class _ReverseSpread(torch.autograd.Function):
    """`_Spread` likewise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cu_seqlens: Tensor, rows: int, max_seqlen: int) -> Tensor:
        ctx.save_for_backward(cu_seqlens)
        ctx.max_seqlen = max_seqlen
        return _spread(x, cu_seqlens, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (cu_seqlens,) = ctx.saved_tensors
        return _summed(grad, cu_seqlens, ctx.max_seqlen), None, None, None
