"""Launches the row operations, as operators with derivatives.

T rows, V rows of the table. `threshold` is the dropout probability in 1 / 65536.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from fasttx.kernels.metal import shaders
from fasttx.kernels.metal.operators import dense, derivative, keep_scale, operator
from torch import Tensor

ROWS_OF_A_SUM = 16  # as in rows.metal
BLOCKS, BLOCK_ROWS = 32, 4  # of a threadgroup: threads of eight columns each, by rows


def _element(dtype: torch.dtype) -> str:
    if dtype not in shaders.ELEMENTS:
        raise TypeError(f"a tensor is {dtype}; expected float32, float16 or bfloat16")
    return shaders.ELEMENTS[dtype]


def _one_device(first: Tensor, *others: Tensor | None) -> None:
    for x in others:
        if x is not None and x.device != first.device:
            raise ValueError(f"tensors on {first.device} and {x.device}; expected one device")


def _vectors(columns: int, **vectors: Tensor) -> None:
    for name, x in vectors.items():
        if x.shape != (columns,):
            raise ValueError(f"{name} has shape {tuple(x.shape)}; expected ({columns},)")


def _by_columns(columns: int, rows: int) -> dict[str, tuple[int, ...]]:
    """A thread for eight columns of each row."""
    blocks, rows = -(-columns // (8 * BLOCKS)) * BLOCKS, -(-rows // BLOCK_ROWS) * BLOCK_ROWS
    return {"threads": (blocks, rows), "group_size": (BLOCKS, BLOCK_ROWS)}


def _by_rows(rows: int) -> dict[str, tuple[int, ...]]:
    """A simdgroup for each row."""
    return {"threads": (shaders.whole_groups(rows * 32),), "group_size": (shaders.GROUP,)}


def _seed(seed: Tensor | None, like: Tensor) -> Tensor:
    """Without dropout nobody reads it, but something must be bound."""
    return like if seed is None else seed


def _parts(rows: int) -> int:
    return -(-rows // ROWS_OF_A_SUM)


# ----------------------------------------------------------------------------------------- embed

EMBED = ("philox", "rows", "embed")


def _embed_types(table: Tensor, out: Tensor, threshold: int) -> dict[str, Any]:
    return {
        "table_type": _element(table.dtype), "element_type": _element(out.dtype),
        "DROPOUT": int(threshold > 0),
    }  # fmt: skip


def _embed_shape(
    ids: Tensor, position_ids: Tensor, table: Tensor, pe: Tensor, threshold: int,
    seed: Tensor | None,
) -> Tensor:  # fmt: skip
    return table.new_empty(
        len(ids), table.shape[1], dtype=torch.promote_types(table.dtype, pe.dtype)
    )


@operator(
    "embed(Tensor ids, Tensor position_ids, Tensor table, Tensor pe, int threshold, Tensor? seed)"
    " -> Tensor", _embed_shape,
)  # fmt: skip
def embed(
    ids: Tensor, position_ids: Tensor, table: Tensor, pe: Tensor, threshold: int,
    seed: Tensor | None,
) -> Tensor:  # fmt: skip
    """ids, position_ids (T,), table (V, d), pe (positions, d) -> (T, d). No gradient for pe."""
    _one_device(table, ids, position_ids, pe, seed)
    if table.dim() != 2 or pe.dim() != 2 or table.shape[1] != pe.shape[1]:
        raise ValueError(
            f"table and pe have shapes {tuple(table.shape)} and {tuple(pe.shape)}; expected "
            "(V, d) and (positions, d)"
        )
    if ids.dim() != 1 or ids.shape != position_ids.shape:
        raise ValueError(
            f"ids and position_ids have shapes {tuple(ids.shape)} and "
            f"{tuple(position_ids.shape)}; expected two equal (T,)"
        )
    out = _embed_shape(ids, position_ids, table, pe, threshold, seed)
    if out.numel():
        table, pe = dense(table), dense(pe)
        ids, position_ids = ids.long().contiguous(), position_ids.int().contiguous()
        rows, columns = out.shape
        types = _embed_types(table, out, threshold) | {"pe_type": _element(pe.dtype)}
        shaders.kernel(table.device.type, "embed", *EMBED, **types)(
            ids, position_ids, table, pe, out, _seed(seed, ids),
            [rows, columns, threshold, table.stride(0), pe.stride(0)],
            [math.sqrt(columns), keep_scale(threshold)], **_by_columns(columns, rows),
        )  # fmt: skip
    return out


@operator(
    "embed_backward(Tensor dout, Tensor ids, Tensor table, int threshold, Tensor? seed) -> Tensor",
    lambda dout, ids, table, threshold, seed: table.new_empty(table.shape),
)
def _embed_backward(
    dout: Tensor, ids: Tensor, table: Tensor, threshold: int, seed: Tensor | None
) -> Tensor:
    dtable = torch.zeros(table.shape, dtype=table.dtype, device=table.device)
    if dout.numel():
        dout = dout.contiguous()
        ids, order = ids.int().sort(stable=True)
        rows, columns = dout.shape
        types = _embed_types(table, dout, threshold) | {"pe_type": _element(dout.dtype)}
        shaders.kernel(table.device.type, "embed_backward", *EMBED, **types)(
            ids, order, dout, dtable, _seed(seed, ids), [rows, columns, threshold],
            [math.sqrt(columns), keep_scale(threshold)], **_by_columns(columns, rows),
        )  # fmt: skip
    return dtable


def _embed_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, _, table, _, ctx.threshold, seed = inputs
    ctx.save_for_backward(ids, table, seed)


def _embed_derivative(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    ids, table, seed = ctx.saved_tensors
    return None, None, _embed_backward(dout, ids, table, ctx.threshold, seed), None, None, None


derivative("embed", _embed_save, _embed_derivative)

# -------------------------------------------------------------------------------------- add_norm

ADD_NORM = ("philox", "rows", "add_norm")


def _add_norm_kernel(
    name: str, h: Tensor, y: Tensor, bias: Tensor, gamma: Tensor, threshold: int
) -> Any:
    return shaders.kernel(
        h.device.type, name, *ADD_NORM,
        element_type=_element(h.dtype), branch_type=_element(y.dtype),
        bias_type=_element(bias.dtype), norm_type=_element(gamma.dtype), COLUMNS=h.shape[1],
        DROPOUT=int(threshold > 0),
    )  # fmt: skip


def _add_norm_shapes(h: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    moments = h.new_empty(len(h), 2, dtype=torch.float32)
    return h.new_empty(h.shape), h.new_empty(h.shape), moments


@operator(
    "add_norm(Tensor h, Tensor y, Tensor bias, Tensor gamma, Tensor beta, int threshold, "
    "Tensor? seed, float eps) -> (Tensor, Tensor, Tensor)", _add_norm_shapes,
)  # fmt: skip
def add_norm(
    h: Tensor, y: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, threshold: int,
    seed: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """h, y (T, d), which may differ in dtype -> h', its LayerNorm, both of h's dtype, and the
    moments (T, 2) float32: mean and inverse deviation."""
    _one_device(h, y, bias, gamma, beta, seed)
    if h.dim() != 2 or h.shape != y.shape:
        raise ValueError(
            f"h and y have shapes {tuple(h.shape)} and {tuple(y.shape)}; expected two equal (T, d)"
        )
    _vectors(h.shape[1], bias=bias, gamma=gamma, beta=beta)
    out, normed, moments = _add_norm_shapes(h)
    if out.numel():
        h, y = dense(h), dense(y)
        beta = beta.to(gamma.dtype)
        _add_norm_kernel("add_norm", h, y, bias, gamma, threshold)(
            h, y, bias.contiguous(), gamma.contiguous(), beta.contiguous(), out, normed, moments,
            _seed(seed, moments), [len(h), threshold, h.stride(0), y.stride(0)],
            [keep_scale(threshold), eps], **_by_rows(len(h)),
        )  # fmt: skip
    return out, normed, moments


@operator(
    "add_norm_backward(Tensor dout, Tensor dnormed, Tensor out, Tensor moments, Tensor y, "
    "Tensor bias, Tensor gamma, Tensor beta, int threshold, Tensor? seed) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda dout, dnormed, out, moments, y, *vectors_and_dropout: tuple(
        x.new_empty(x.shape) for x in (out, y, *vectors_and_dropout[:3])
    ),
)
def _add_norm_backward(
    dout: Tensor, dnormed: Tensor, out: Tensor, moments: Tensor, y: Tensor, bias: Tensor,
    gamma: Tensor, beta: Tensor, threshold: int, seed: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    rows, columns = out.shape
    dh, dy = out.new_empty(out.shape), y.new_empty(y.shape)
    sums = moments.new_empty(_parts(rows), 3, columns)
    if out.numel():
        _add_norm_kernel("add_norm_backward", out, y, bias, gamma, threshold)(
            dout.contiguous(), dnormed.contiguous(), out, moments, gamma.contiguous(), dh, dy,
            sums, _seed(seed, moments), [rows, threshold], [keep_scale(threshold)],
            **_by_rows(_parts(rows)),
        )  # fmt: skip
    dbias, dgamma, dbeta = sums.sum(0)
    return dh, dy, dbias.to(bias.dtype), dgamma.to(gamma.dtype), dbeta.to(beta.dtype)


def _add_norm_save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, y, bias, gamma, beta, ctx.threshold, seed, _ = inputs
    out, _, moments = output
    ctx.save_for_backward(out, moments, y, bias, gamma, beta, seed)
    ctx.mark_non_differentiable(moments)


def _add_norm_derivative(ctx: Any, dout: Tensor, dnormed: Tensor, _: Any) -> tuple[Any, ...]:
    *tensors, seed = ctx.saved_tensors
    gradients = _add_norm_backward(dout, dnormed, *tensors, ctx.threshold, seed)
    return (*gradients, None, None, None)


derivative("add_norm", _add_norm_save, _add_norm_derivative)

# -------------------------------------------------------------------------------------- bias_act

BIAS_ACT = ("philox", "rows", "bias_act")


def _bias_act_kernel(name: str, u: Tensor, bias: Tensor, threshold: int, gelu: bool) -> Any:
    return shaders.kernel(
        u.device.type, name, *BIAS_ACT, element_type=_element(u.dtype),
        bias_type=_element(bias.dtype), DROPOUT=int(threshold > 0), GELU=int(gelu),
    )  # fmt: skip


@operator(
    "bias_act(Tensor u, Tensor bias, int threshold, Tensor? seed, bool gelu) -> Tensor",
    lambda u, *rest: u.new_empty(u.shape),
)
def bias_act(u: Tensor, bias: Tensor, threshold: int, seed: Tensor | None, gelu: bool) -> Tensor:
    """u (T, f), bias (f,) -> (T, f) of u's dtype."""
    _one_device(u, bias, seed)
    if u.dim() != 2:
        raise ValueError(f"u has shape {tuple(u.shape)}; expected (T, f)")
    _vectors(u.shape[1], bias=bias)
    out = u.new_empty(u.shape)
    if out.numel():
        u = dense(u)
        rows, columns = u.shape
        _bias_act_kernel("bias_act", u, bias, threshold, gelu)(
            u, bias.contiguous(), out, _seed(seed, u), [rows, columns, threshold, u.stride(0)],
            [keep_scale(threshold)], **_by_columns(columns, rows),
        )  # fmt: skip
    return out


@operator(
    "bias_act_backward(Tensor dout, Tensor u, Tensor bias, int threshold, Tensor? seed, bool gelu)"
    " -> (Tensor, Tensor)",
    lambda dout, u, bias, *rest: (u.new_empty(u.shape), bias.new_empty(bias.shape)),
)
def _bias_act_backward(
    dout: Tensor, u: Tensor, bias: Tensor, threshold: int, seed: Tensor | None, gelu: bool
) -> tuple[Tensor, Tensor]:
    rows, columns = u.shape
    du = u.new_empty(u.shape)
    sums = u.new_empty(_parts(rows), columns, dtype=torch.float32)
    if u.numel():
        u = dense(u)
        _bias_act_kernel("bias_act_backward", u, bias, threshold, gelu)(
            dout.contiguous(), u, bias.contiguous(), du, sums, _seed(seed, u),
            [rows, columns, threshold, u.stride(0)], [keep_scale(threshold)],
            **_by_columns(columns, _parts(rows)),
        )  # fmt: skip
    return du, sums.sum(0).to(bias.dtype)


def _bias_act_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    u, bias, ctx.threshold, seed, ctx.gelu = inputs
    ctx.save_for_backward(u, bias, seed)


def _bias_act_derivative(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    u, bias, seed = ctx.saved_tensors
    du, dbias = _bias_act_backward(dout, u, bias, ctx.threshold, seed, ctx.gelu)
    return du, dbias, None, None, None


derivative("bias_act", _bias_act_save, _bias_act_derivative)
