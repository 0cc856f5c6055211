"""Fused attention and row operations on the CPU: the C++ of `kernels/cpu` as torch operators.

T rows, B sequences, H heads, D head_dim. The kernels compute in float32. What linear layers hand in
and take (qkv, out, y, n, u), and its gradient, they read and write as float32 or bfloat16; the
residual stream, vectors, tables and log-sum-exps are float32. So under autocast to bfloat16 nothing
is copied: `add_norm` writes n in y's dtype, as the next linear layer wants it. Any other tensor is
widened on the way in, and what comes of it rounded on the way out.
"""

from __future__ import annotations

import ctypes
import importlib
import re
from typing import Any

import torch
from torch import Tensor

from fasttx.ops import dropout
from fasttx.ops.rows import ACTIVATIONS, LAYER_NORM_EPS, RowOps

MAX_HEAD_DIM = 128


def _kernels() -> Any:
    return importlib.import_module("fasttx.kernels.cpu")


def unavailable_reasons(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    kernels, reasons = _kernels(), []
    if head_dim > MAX_HEAD_DIM:
        reasons.append(f"head_dim {head_dim}: the kernels go up to {MAX_HEAD_DIM}; use more heads")
    if kernels.library_path() is None:
        reasons.append(
            "its C++ library was not built: install a C++ compiler (Debian: apt install g++; "
            "macOS: xcode-select --install), then pip install --force-reinstall --no-deps fasttx, "
            "or in a checkout pip install -e ."
        )
        return reasons
    try:
        kernels.library()
    except OSError as error:
        reasons.append(f"its C++ library does not load ({error}): install fasttx again")
    return reasons


# --- operators ------------------------------------------------------------------------------------
# Defined on torch's dispatcher, so that autograd, torch.compile and tracing see through them. The
# implementations below get real CPU tensors only.

_operators = torch.library.Library("fasttx", "FRAGMENT")
_ops = torch.ops.fasttx

# DROPOUT and SPANS stand for the arguments below; T? is a tensor or None.
_DROPOUT = "Tensor? seed, int threshold"
_SPANS = f"Tensor starts, Tensor lens, {_DROPOUT}, bool causal, float scale"
_SCHEMAS = """
cpu_attention(T qkv, SPANS) -> (T, T)
cpu_attention_backward(T dout, T qkv, T out, T lse, SPANS) -> T
cpu_attention_qkv(T q, T k, T v, SPANS) -> (T, T)
cpu_attention_qkv_backward(T dout, T q, T k, T v, T out, T lse, SPANS) -> (T, T, T)
cpu_add_norm(T h, T y, T bias, T gamma, T beta, DROPOUT) -> (T, T, T, T)
cpu_add_norm_backward(T? dsum, T dnormed, T h, T gamma, T mean, T rstd, DROPOUT) -> (T, T, T, T, T)
cpu_bias_act(T u, T bias, DROPOUT, bool gelu) -> T
cpu_bias_act_backward(T dout, T? u, T? bias, T? out, DROPOUT, bool gelu) -> (T, T)
cpu_embed(T ids, T position_ids, T table, T positions, DROPOUT) -> T
cpu_embed_backward(T dh, T ids, SymInt vocabulary, DROPOUT) -> T
"""
for _schema in _SCHEMAS.strip().splitlines():
    _schema = re.sub(r"\bT\b", "Tensor", _schema)
    _operators.define(_schema.replace("DROPOUT", _DROPOUT).replace("SPANS", _SPANS))


def _implement(name: str) -> Any:
    """Registers the decorated function as the operator's CPU kernel."""
    return lambda function: _operators.impl(name, function, "CPU") or function


def _fake(name: str) -> Any:
    """Registers the decorated function as what the operator returns for tensors without data."""
    return torch.library.register_fake(f"fasttx::{name}", lib=_operators)


def _call(name: str, *arguments: Any) -> None:
    kernels = _kernels()
    code = getattr(kernels.library(), f"fasttx_{name}")(*arguments, torch.get_num_threads())
    if code == kernels.NO_MEMORY:
        raise MemoryError(f"{name}: no memory for the scratch space of a thread")
    if code and name.startswith("attention"):
        raise ValueError(
            f"sequence {code - 1} leaves the rows of qkv or overlaps another one; expected "
            "seq_starts and seq_lens to cut out separate runs of rows"
        )
    if code:
        raise IndexError(
            f"row {code - 1} has an id outside the embedding table or a position outside the "
            "position table; expected both to be row numbers of their tables"
        )


def _seed(seed: Tensor | None) -> int:
    return 0 if seed is None else int(seed)


def _is_bfloat16(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16


def _rows(x: Tensor) -> Tensor:
    """The tensor, or a copy whose last dimension is contiguous."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _attention(
    name: str, tensors: dict[str, Tensor], lse: Tensor, starts: Tensor, lens: Tensor,
    seed: Tensor | None, threshold: int, causal: bool, scale: float,
) -> None:  # fmt: skip
    kernels = _kernels()
    views = kernels.Tensors(**{key: kernels.view(x) for key, x in tensors.items()})
    starts, lens = starts.to(torch.int32).contiguous(), lens.to(torch.int32).contiguous()
    rows, heads, head_dim = tensors["q"].shape
    _call(
        name, _is_bfloat16(tensors["q"]), ctypes.byref(views),
        *_addresses(lse, starts, lens), len(lens), rows, heads, head_dim, scale, causal,
        _seed(seed), threshold,
    )  # fmt: skip


@_implement("cpu_attention_qkv")
def _attention_qkv_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    q, k, v = _rows(q), _rows(k), _rows(v)
    out, lse = _fake_attention_qkv(q, k, v)
    _attention("attention_forward", {"q": q, "k": k, "v": v, "out": out}, lse, *rest)
    return out, lse


@_implement("cpu_attention")
def _attention_forward(qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _attention_qkv_forward(*qkv.unbind(1), *rest)


def _attention_gradients(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    written: tuple[Tensor, ...], *rest: Any,
) -> None:  # fmt: skip
    tensors = {"q": _rows(q), "k": _rows(k), "v": _rows(v), "out": out, "dout": _rows(dout)}
    tensors |= dict(zip(("dq", "dk", "dv"), written, strict=True))
    _attention("attention_backward", tensors, lse, *rest)


@_implement("cpu_attention_qkv_backward")
def _attention_qkv_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    written = tuple(q.new_empty(q.shape) for _ in range(3))
    _attention_gradients(dout, q, k, v, out, lse, written, *rest)
    return written


@_implement("cpu_attention_backward")
def _attention_backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, *rest: Any) -> Tensor:
    dqkv = qkv.new_empty(qkv.shape)
    q, k, v = qkv.unbind(1)
    _attention_gradients(dout, q, k, v, out, lse, dqkv.unbind(1), *rest)
    return dqkv


@_implement("cpu_add_norm")
def _add_norm_forward(
    h: Tensor, y: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, seed: Tensor | None,
    threshold: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    h, y, bias, gamma, beta = (x.contiguous() for x in (h, y, bias, gamma, beta))
    total, normed, mean, rstd = _fake_add_norm(h, y, bias, gamma, beta, seed, threshold)
    _call(
        "add_norm_forward", _is_bfloat16(y),
        *_addresses(h, y, bias, gamma, beta, total, normed, mean, rstd), *h.shape,
        LAYER_NORM_EPS, _seed(seed), threshold,
    )  # fmt: skip
    return total, normed, mean, rstd


@_implement("cpu_add_norm_backward")
def _add_norm_backward(
    dsum: Tensor | None, dnormed: Tensor, total: Tensor, gamma: Tensor, mean: Tensor, rstd: Tensor,
    seed: Tensor | None, threshold: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    dsum = None if dsum is None else dsum.contiguous()
    dnormed, gamma = dnormed.contiguous(), gamma.contiguous()
    written = _fake_add_norm_backward(dsum, dnormed, total, gamma, mean, rstd, seed, threshold)
    _call(
        "add_norm_backward", _is_bfloat16(dnormed),
        *_addresses(total, gamma, mean, rstd, dsum, dnormed, *written), *total.shape,
        _seed(seed), threshold,
    )  # fmt: skip
    return written


@_implement("cpu_bias_act")
def _bias_act_forward(
    u: Tensor, bias: Tensor, seed: Tensor | None, threshold: int, gelu: bool
) -> Tensor:
    u, bias = u.contiguous(), bias.contiguous()
    out = torch.empty_like(u)
    _call(
        "bias_act_forward", _is_bfloat16(u), *_addresses(u, bias, out), *u.shape, gelu,
        _seed(seed), threshold,
    )  # fmt: skip
    return out


@_implement("cpu_bias_act_backward")
def _bias_act_backward(
    dout: Tensor, u: Tensor | None, bias: Tensor | None, out: Tensor | None, seed: Tensor | None,
    threshold: int, gelu: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dout = dout.contiguous()
    u, bias = (x if x is None else x.contiguous() for x in (u, bias))
    du, dbias = _fake_bias_act_backward(dout, u, bias, out, seed, threshold, gelu)
    _call(
        "bias_act_backward", _is_bfloat16(dout), *_addresses(u, bias, out, dout, du, dbias),
        *dout.shape, gelu, _seed(seed), threshold,
    )  # fmt: skip
    return du, dbias


@_implement("cpu_embed")
def _embed_forward(
    ids: Tensor, position_ids: Tensor, table: Tensor, positions: Tensor, seed: Tensor | None,
    threshold: int,
) -> Tensor:  # fmt: skip
    ids, position_ids = ids.long().contiguous(), position_ids.int().contiguous()
    table, positions = table.contiguous(), positions.contiguous()
    h = table.new_empty(len(ids), table.shape[1])
    _call(
        "embed_forward", *_addresses(ids, position_ids, table, positions, h), *h.shape, len(table),
        len(positions), table.shape[1] ** 0.5, _seed(seed), threshold,
    )  # fmt: skip
    return h


@_implement("cpu_embed_backward")
def _embed_backward(
    dh: Tensor, ids: Tensor, vocabulary: int, seed: Tensor | None, threshold: int
) -> Tensor:
    dh, ids = dh.contiguous(), ids.long().contiguous()
    dtable = dh.new_empty(vocabulary, dh.shape[1])
    _call(
        "embed_backward", *_addresses(ids, dh, dtable), *dh.shape, vocabulary,
        dh.shape[1] ** 0.5, _seed(seed), threshold,
    )  # fmt: skip
    return dtable


def _addresses(*tensors: Tensor | None) -> list[int | None]:
    return [None if x is None else x.data_ptr() for x in tensors]


# --- shapes and dtypes, for tensors without data --------------------------------------------------


def _float32(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


@_fake("cpu_attention")
def _fake_attention(qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    rows, _, heads, head_dim = qkv.shape
    return qkv.new_empty(rows, heads, head_dim), _float32(qkv, heads, rows)


@_fake("cpu_attention_qkv")
def _fake_attention_qkv(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), _float32(q, q.shape[1], q.shape[0])


@_fake("cpu_attention_backward")
def _fake_attention_backward(dout: Tensor, qkv: Tensor, *rest: Any) -> Tensor:
    return qkv.new_empty(qkv.shape)


@_fake("cpu_attention_qkv_backward")
def _fake_attention_qkv_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


@_fake("cpu_add_norm")
def _fake_add_norm(h: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    rows, _ = h.shape
    return h.new_empty(h.shape), y.new_empty(h.shape), h.new_empty(rows), h.new_empty(rows)


@_fake("cpu_add_norm_backward")
def _fake_add_norm_backward(dsum: Tensor | None, dnormed: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    shape = dnormed.shape
    vectors = (_float32(dnormed, shape[1]) for _ in range(3))
    return (_float32(dnormed, *shape), dnormed.new_empty(shape), *vectors)


@_fake("cpu_bias_act")
def _fake_bias_act(u: Tensor, *rest: Any) -> Tensor:
    return u.new_empty(u.shape)


@_fake("cpu_bias_act_backward")
def _fake_bias_act_backward(dout: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return dout.new_empty(dout.shape), _float32(dout, dout.shape[1])


@_fake("cpu_embed")
def _fake_embed(ids: Tensor, position_ids: Tensor, table: Tensor, *rest: Any) -> Tensor:
    return table.new_empty(ids.shape[0], table.shape[1])


@_fake("cpu_embed_backward")
def _fake_embed_backward(dh: Tensor, ids: Tensor, vocabulary: int, *rest: Any) -> Tensor:
    return dh.new_empty(vocabulary, dh.shape[1])


# --- gradients ------------------------------------------------------------------------------------


def _differentiate(name: str, setup: Any) -> Any:
    def register(backward: Any) -> Any:
        torch.library.register_autograd(
            f"fasttx::{name}", backward, setup_context=setup, lib=_operators
        )
        return backward

    return register


def _attention_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *projections, starts, lens, seed, threshold, causal, scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*projections, *output, starts, lens, seed)
    ctx.options = threshold, causal, scale


@_differentiate("cpu_attention", _attention_setup)
def _(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    rest = (None,) * 6
    if dout is None:
        return (None, *rest)
    qkv, out, lse, *spans = ctx.saved_tensors
    return (_ops.cpu_attention_backward(dout, qkv, out, lse, *spans, *ctx.options), *rest)


@_differentiate("cpu_attention_qkv", _attention_setup)
def _(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    rest = (None,) * 6
    if dout is None:
        return (None, None, None, *rest)
    q, k, v, out, lse, *spans = ctx.saved_tensors
    return (*_ops.cpu_attention_qkv_backward(dout, q, k, v, out, lse, *spans, *ctx.options), *rest)


def _add_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, _, gamma, _, seed, threshold = inputs
    total, _, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total, gamma, mean, rstd, seed)
    ctx.threshold = threshold


@_differentiate("cpu_add_norm", _add_norm_setup)
def _(ctx: Any, dsum: Tensor | None, dnormed: Tensor | None, *rest: Any) -> tuple[Any, ...]:
    total, gamma, mean, rstd, seed = ctx.saved_tensors
    if dnormed is None:
        if dsum is None:
            return (None,) * 7
        dnormed = torch.zeros_like(dsum)
    dh, dy, dgamma, dbeta, dbias = _ops.cpu_add_norm_backward(
        dsum, dnormed, total, gamma, mean, rstd, seed, ctx.threshold
    )
    return dh, dy, dbias, dgamma, dbeta, None, None


def _bias_act_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    u, bias, seed, threshold, gelu = inputs
    # What relu lets through shows in its output: the input need not be kept.
    ctx.save_for_backward(*((u, bias, None) if gelu else (None, None, output)), seed)
    ctx.options = threshold, gelu


@_differentiate("cpu_bias_act", _bias_act_setup)
def _(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    du, dbias = _ops.cpu_bias_act_backward(dout, *ctx.saved_tensors, *ctx.options)
    return du, dbias, None, None, None


def _embed_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, _, table, _, seed, threshold = inputs
    ctx.save_for_backward(ids, seed)
    ctx.options = table.shape[0], threshold


@_differentiate("cpu_embed", _embed_setup)
def _(ctx: Any, dh: Tensor) -> tuple[Any, ...]:
    ids, seed = ctx.saved_tensors
    vocabulary, threshold = ctx.options
    dtable = _ops.cpu_embed_backward(dh, ids, vocabulary, seed, threshold)
    return None, None, dtable, None, None, None


def _no_second_derivative(ctx: Any, *gradients: Tensor | None) -> None:
    raise NotImplementedError(
        "the cpu backend has no second derivative (create_graph=True); use attn_backend='reference'"
    )


# Without this torch only warns, and leaves the missing terms out of the result.
for _name in ("attention", "attention_qkv", "add_norm", "bias_act", "embed"):
    torch.library.register_autograd(
        f"fasttx::cpu_{_name}_backward", _no_second_derivative, lib=_operators
    )


# --- the adapter ----------------------------------------------------------------------------------


def _draw(p: float, seed: Tensor | None) -> tuple[Tensor | None, int]:
    t = dropout.threshold(p)
    return (dropout.require_seed(seed) if t else None), t


def _stored(x: Tensor) -> Tensor:
    """The tensor as the kernels read it."""
    return x if _is_bfloat16(x) else x.float()


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

    As the reference, its dropout mask included. Raises ValueError for spans that leave the rows or
    overlap.
    """
    drop = _draw(dropout_p, seed)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    same = q.dtype == k.dtype == v.dtype
    q_, k_, v_ = (_stored(x) if same else x.float() for x in (q, k, v))
    out, _ = _ops.cpu_attention_qkv(q_, k_, v_, seq_starts, seq_lens, *drop, causal, scale)
    return out.to(q.dtype)


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
    """`attention_qkv` of packed projections qkv (T, 3, H, D), read in place."""
    drop = _draw(dropout_p, seed)
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    out, _ = _ops.cpu_attention(_stored(qkv), seq_starts, seq_lens, *drop, causal, scale)
    return out.to(qkv.dtype)


def _embed(
    ids: Tensor, position_ids: Tensor, table: Tensor, pe: Tensor, p: float, seed: Tensor | None
) -> Tensor:
    h = _ops.cpu_embed(ids, position_ids, table.float(), pe.float(), *_draw(p, seed))
    return h.to(table.dtype)


def _add_norm(
    h: Tensor, y: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    given = (h.float(), _stored(y), bias.float(), gamma.float(), beta.float())
    total, normed, _, _ = _ops.cpu_add_norm(*given, *_draw(p, seed))
    return total.to(torch.promote_types(h.dtype, y.dtype)), normed.to(y.dtype)


def _bias_act(
    u: Tensor, bias: Tensor, p: float, seed: Tensor | None, activation: str = "relu"
) -> Tensor:
    assert activation in ACTIVATIONS  # the configuration has checked it
    out = _ops.cpu_bias_act(_stored(u), bias.float(), *_draw(p, seed), activation == "gelu")
    return out.to(u.dtype)


rowops = RowOps(_embed, _add_norm, _bias_act)
