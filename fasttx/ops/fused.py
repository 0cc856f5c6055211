"""From launchers of kernels to the operations of a backend: everything that is the same for all.

Launchers read and write real tensors. Here stand the dtypes that kernels do not store, the
operators `torch.ops.fasttx_<name>.*` with shapes for tensors without data (torch.compile, export),
their derivatives, and the refusal of those that kernels do not have. `contract` checks arguments.
`torch.library.Library` is used directly: `custom_op` costs about twice as much a call.

T rows, B sequences, H heads, D head_dim, d columns, V words. Dropout travels as `threshold` (its
probability times 65536) and `seed`, a () int64 tensor or None.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fasttx.ops.contract import Attend, Operations
from fasttx.ops.dropout import Dropout


class AttentionLaunchers(Protocol):
    """q, k, v, out, dout, dq, dk, dv (T, H, D): any strides, the last dimension contiguous.

    lse (H, T) float32, the natural logarithm of each row's sum of exponentials; starts, lens (B,)
    int32. Both launchers write every row of what they write, zeros where no sequence is.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor,
        lens: Tensor, max_seqlen: int, threshold: int, seed: Tensor | None, causal: bool,
        scale: float,
    ) -> None: ...  # fmt: skip

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dq: Tensor,
        dk: Tensor, dv: Tensor, starts: Tensor, lens: Tensor, max_seqlen: int, threshold: int,
        seed: Tensor | None, causal: bool, scale: float,
    ) -> None: ...  # fmt: skip


class EmbedLaunchers(Protocol):
    """ids (T,) int64, position_ids (T,) int32, table (V, d), positions (longest, d), out (T, d)."""

    def forward(
        self, ids: Tensor, position_ids: Tensor, table: Tensor, positions: Tensor, out: Tensor,
        threshold: int, seed: Tensor | None, scale: float,
    ) -> None: ...  # fmt: skip

    def backward(
        self, dout: Tensor, ids: Tensor, dtable: Tensor, threshold: int, seed: Tensor | None,
        scale: float,
    ) -> None: ...  # fmt: skip


class AddNormLaunchers(Protocol):
    """h, y, total, normed and their gradients (T, d); moments (2, T) float32.

    moments: the mean and the reciprocal deviation of each row of total. normed has y's dtype.
    dtotal may be None. dvectors (3, d) float32: dbias, dgamma, dbeta.
    """

    def forward(
        self, h: Tensor, y: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, total: Tensor,
        normed: Tensor, moments: Tensor, threshold: int, seed: Tensor | None, eps: float,
    ) -> None: ...  # fmt: skip

    def backward(
        self, dtotal: Tensor | None, dnormed: Tensor, total: Tensor, gamma: Tensor,
        moments: Tensor, dh: Tensor, dy: Tensor, dvectors: Tensor, threshold: int,
        seed: Tensor | None,
    ) -> None: ...  # fmt: skip


class BiasActLaunchers(Protocol):
    """u, out and their gradients (T, d), bias (d,), dbias (d,) float32.

    backward of gelu is given u and bias, that of relu `out`, which shows what relu let through.
    """

    def forward(
        self, u: Tensor, bias: Tensor, out: Tensor, threshold: int, seed: Tensor | None, gelu: bool
    ) -> None: ...

    def backward(
        self, dout: Tensor, u: Tensor | None, bias: Tensor | None, out: Tensor | None, du: Tensor,
        dbias: Tensor, threshold: int, seed: Tensor | None, gelu: bool,
    ) -> None: ...  # fmt: skip


class LinearLaunchers(Protocol):
    """x (T, in), weight (out, in) and bias (out,) float32, out (T, out), dout like out.

    weight is contiguous, or its transpose is. dweight and dbias are float32.
    """

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None: ...

    def backward(self, dout: Tensor, x: Tensor, dweight: Tensor, dbias: Tensor | None) -> None: ...


class FeedForwardLaunchers(Protocol):
    """n, out, dn, dout (T, d); up (d_ff, d), bias (d_ff,), down (d, d_ff) float32, contiguous.

    u, du (T, d_ff): what the second product multiplies, and the gradient of what goes into the
    activation. before (T, d_ff): that itself, for gelu; None for relu. dup, dbias, ddown float32.
    A gradient that is None is not wanted; dbias is where dup is.
    """

    def forward(
        self, n: Tensor, up: Tensor, bias: Tensor, down: Tensor, before: Tensor | None, u: Tensor,
        out: Tensor, threshold: int, seed: Tensor | None,
    ) -> None: ...  # fmt: skip

    def backward(
        self, dout: Tensor, n: Tensor, up: Tensor, down: Tensor, before: Tensor | None, u: Tensor,
        du: Tensor, dn: Tensor | None, dup: Tensor | None, dbias: Tensor | None,
        ddown: Tensor | None, threshold: int, seed: Tensor | None,
    ) -> None: ...  # fmt: skip


@dataclass(frozen=True)
class Launchers:
    """The modules of `fasttx.kernels.<device>`, one an operation, and what their kernels store.

    dtypes: of what linear layers take and give (qkv, y, u); stream: of the residual stream, vectors
    and tables. Tensors of another dtype are widened to float32 on the way in, and what comes of
    them is rounded on the way out. keys: the dispatch keys of torch that the kernels serve.
    checks_spans: `_checks_spans` of `contract.Operations`. Without the last two torch multiplies.
    """

    attention: AttentionLaunchers
    embed: EmbedLaunchers
    add_norm: AddNormLaunchers
    bias_act: BiasActLaunchers
    dtypes: tuple[torch.dtype, ...]
    stream: tuple[torch.dtype, ...]
    keys: tuple[str, ...]
    checks_spans: bool = False
    linear: LinearLaunchers | None = None
    feed_forward: FeedForwardLaunchers | None = None


class _NoForwardMode:
    """A library whose operators refuse derivatives in forward mode.

    torch would take what they return for constants: the derivative would come out as 0.
    """

    def __init__(self, library: torch.library.Library, backend: str) -> None:
        self._library, self._backend = library, backend

    def impl(self, name: str, kernel: Callable[..., Any], key: str, **options: Any) -> None:
        def refusing(keyset: Any, *args: Any, **keywords: Any) -> Any:
            if forward_ad._current_level >= 0 and any(
                isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None
                for x in args
            ):
                raise NotImplementedError(
                    f"the {self._backend} backend has no forward-mode derivatives "
                    "(torch.func.jvp, torch.autograd.forward_ad); use attn_backend='reference'"
                )
            return kernel(keyset, *args, **keywords)

        self._library.impl(name, refusing, key, **options)


_DROPOUT = "int threshold, Tensor? seed"
_ATTENTION = f"Tensor starts, Tensor lens, SymInt max_seqlen, {_DROPOUT}, bool causal, float scale"


class FusedOperations(Operations):
    """The `contract.Operations` of a backend with kernels; differentiable once, in reverse mode."""

    def __init__(self, name: str, launchers: Launchers) -> None:
        self._name, self._launch = name, launchers
        self._checks_spans = launchers.checks_spans
        self._library = torch.library.Library(f"fasttx_{name}", "DEF")
        self._attention_operator, self._attention_qkv_operator = self._define_attention()
        self._embed_operator = self._define_embed()
        self._add_norm_operator = self._define_add_norm()
        self._bias_act_operator = self._define_bias_act()
        # What linear layers of these dtypes multiply with is ours, else torch's.
        self.own_products: frozenset[torch.dtype] = frozenset()
        if launchers.linear is not None:
            self._linear_operator = self._define_linear(launchers.linear)
            assert launchers.feed_forward is not None
            self._feed_forward_operator = self._define_feed_forward(launchers.feed_forward)
            self.own_products = frozenset(launchers.dtypes)

    # --- operators --------------------------------------------------------------------------------

    def _define(self, schema: str, fake: Callable[..., Any], run: Callable[..., Any]) -> Any:
        """The operator with this schema: `run` computes, `fake` says what comes out."""
        name = self._library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        for key in self._launch.keys:
            self._library.impl(name, run, key)
        space = self._library.ns
        torch.library.register_fake(f"{space}::{name}", fake, lib=self._library)
        return getattr(getattr(torch.ops, space), name).default

    def _derive(self, name: str, save: Callable[..., None], backward: Callable[..., Any]) -> None:
        """The derivative of operator `name`, which calls the operator `name`_backward."""
        space = f"{self._library.ns}::{name}"
        library: Any = _NoForwardMode(self._library, self._name)
        torch.library.register_autograd(space, backward, setup_context=save, lib=library)
        # Without this torch only warns, and leaves the missing terms out of a second derivative.
        torch.library.register_autograd(
            f"{space}_backward", self._no_second_derivative, lib=library
        )

    def _no_second_derivative(self, ctx: Any, *gradients: Tensor | None) -> None:
        raise NotImplementedError(
            f"the {self._name} backend has no second derivative (create_graph=True); "
            "use attn_backend='reference'"
        )

    def _define_attention(self) -> tuple[Any, Any]:
        launch = self._launch.attention

        def like(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
            rows, heads, _ = q.shape
            return q.new_empty(q.shape), q.new_empty((heads, rows), dtype=torch.float32)

        def forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
            out, lse = like(q)
            if out.numel():
                launch.forward(_dense(q), _dense(k), _dense(v), out, lse, *_spans(options))
            return out, lse

        def gradients(
            dout: Tensor, qkv: tuple[Tensor, ...], rest: tuple[Any, ...], to: tuple[Tensor, ...]
        ) -> None:
            (q, k, v), (dq, dk, dv) = map(_dense, qkv), to
            out, lse, *options = rest
            if out.numel():
                spans = _spans(tuple(options))
                launch.backward(_dense(dout), q, k, v, out, lse, dq, dk, dv, *spans)

        def packed_backward(dout: Tensor, qkv: Tensor, *rest: Any) -> Tensor:
            dqkv = qkv.new_empty(qkv.shape)
            gradients(dout, qkv.unbind(1), rest, dqkv.unbind(1))
            return dqkv

        def apart_backward(
            dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
        ) -> tuple[Tensor, ...]:
            written = tuple(q.new_empty(q.shape) for _ in range(3))
            gradients(dout, (q, k, v), rest, written)
            return written

        packed = self._define(
            f"attention(Tensor qkv, {_ATTENTION}) -> (Tensor, Tensor)",
            lambda qkv, *rest: like(qkv[:, 0]),
            lambda qkv, *rest: forward(*qkv.unbind(1), *rest),
        )
        apart = self._define(
            f"attention_qkv(Tensor q, Tensor k, Tensor v, {_ATTENTION}) -> (Tensor, Tensor)",
            like,
            forward,
        )
        packed_gradient = self._define(
            f"attention_backward(Tensor dout, Tensor qkv, Tensor out, Tensor lse, {_ATTENTION})"
            " -> Tensor",
            lambda dout, qkv, *rest: qkv.new_empty(qkv.shape),
            packed_backward,
        )
        apart_gradient = self._define(
            "attention_qkv_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, "
            f"Tensor lse, {_ATTENTION}) -> (Tensor, Tensor, Tensor)",
            lambda dout, q, *rest: tuple(q.new_empty(q.shape) for _ in range(3)),
            apart_backward,
        )

        def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
            *projections, starts, lens, max_seqlen, threshold, seed, causal, scale = inputs
            ctx.save_for_backward(*projections, *output, starts, lens, seed)
            ctx.options = max_seqlen, threshold, causal, scale
            ctx.set_materialize_grads(False)  # lse has none

        def backward(operator: Any, count: int) -> Callable[..., Any]:
            def derivative(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
                if dout is None:
                    return (None,) * (count + 7)
                *tensors, starts, lens, seed = ctx.saved_tensors
                max_seqlen, threshold, causal, scale = ctx.options
                options = (starts, lens, max_seqlen, threshold, seed, causal, scale)
                found = operator(dout, *tensors, *options)
                return (*((found,) if count == 1 else found), *(None,) * 7)

            return derivative

        self._derive("attention", save, backward(packed_gradient, 1))
        self._derive("attention_qkv", save, backward(apart_gradient, 3))
        return packed, apart

    def _define_embed(self) -> Any:
        launch = self._launch.embed

        def like(
            ids: Tensor, position_ids: Tensor, table: Tensor, positions: Tensor, *rest: Any
        ) -> Tensor:
            dtype = torch.promote_types(table.dtype, positions.dtype)
            return table.new_empty((ids.shape[0], table.shape[1]), dtype=dtype)

        def forward(
            ids: Tensor, position_ids: Tensor, table: Tensor, positions: Tensor, *rest: Any
        ) -> Tensor:
            out = like(ids, position_ids, table, positions)
            if out.numel():
                ids, position_ids = ids.long().contiguous(), position_ids.int().contiguous()
                launch.forward(
                    ids, position_ids, table.contiguous(), positions.contiguous(), out, *rest
                )
            return out

        def like_table(
            dout: Tensor, ids: Tensor, words: int, dtype: torch.dtype, *rest: Any
        ) -> Tensor:
            return dout.new_empty((words, dout.shape[1]), dtype=dtype)

        def gradient(
            dout: Tensor, ids: Tensor, words: int, dtype: torch.dtype, *rest: Any
        ) -> Tensor:
            dtable = like_table(dout, ids, words, dtype)
            if not dout.numel():
                return dtable.zero_()
            launch.backward(dout.contiguous(), ids.long().contiguous(), dtable, *rest)
            return dtable

        options = f"{_DROPOUT}, float scale"
        operator = self._define(
            "embed(Tensor ids, Tensor position_ids, Tensor table, Tensor positions, "
            f"{options}) -> Tensor",
            like,
            forward,
        )
        operator_backward = self._define(
            "embed_backward(Tensor dout, Tensor ids, SymInt words, ScalarType dtype, "
            f"{options}) -> Tensor",
            like_table,
            gradient,
        )

        def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            ids, _, table, _, threshold, seed, scale = inputs
            ctx.save_for_backward(ids, seed)
            ctx.options = table.shape[0], table.dtype, threshold, scale

        def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
            ids, seed = ctx.saved_tensors
            words, dtype, threshold, scale = ctx.options
            dtable = operator_backward(dout, ids, words, dtype, threshold, seed, scale)
            return (None, None, dtable, *(None,) * 4)

        self._derive("embed", save, backward)
        return operator

    def _define_add_norm(self) -> Any:
        launch = self._launch.add_norm

        def like(h: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, ...]:
            """total, normed, moments; of contiguous h and y."""
            wide = torch.promote_types(h.dtype, y.dtype)
            total = torch.empty_like(h if h.dtype == wide else y)
            return total, torch.empty_like(y), h.new_empty((2, h.shape[0]), dtype=torch.float32)

        def forward(h: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, ...]:
            h, y = h.contiguous(), y.contiguous()
            outs = like(h, y)
            if h.numel():
                bias, gamma, beta, *options = rest
                bias, gamma, beta = bias.contiguous(), gamma.contiguous(), beta.contiguous()
                total, normed, moments = outs
                launch.forward(h, y, bias, gamma, beta, total, normed, moments, *options)
            return outs

        def like_gradients(
            dtotal: Tensor | None, dnormed: Tensor, total: Tensor, gamma: Tensor, moments: Tensor,
            h_dtype: torch.dtype, *rest: Any,
        ) -> tuple[Tensor, ...]:  # fmt: skip
            shape = total.shape
            dvectors = total.new_empty((3, shape[1]), dtype=torch.float32)
            return total.new_empty(shape, dtype=h_dtype), dnormed.new_empty(shape), dvectors

        def gradients(
            dtotal: Tensor | None, dnormed: Tensor, total: Tensor, gamma: Tensor, moments: Tensor,
            h_dtype: torch.dtype, *options: Any,
        ) -> tuple[Tensor, ...]:  # fmt: skip
            written = like_gradients(dtotal, dnormed, total, gamma, moments, h_dtype)
            if not total.numel():
                written[2].zero_()
                return written
            dh, dy, dvectors = written
            dtotal = None if dtotal is None else dtotal.contiguous()
            dnormed, gamma = dnormed.contiguous(), gamma.contiguous()
            launch.backward(dtotal, dnormed, total, gamma, moments, dh, dy, dvectors, *options)
            return written

        operator = self._define(
            f"add_norm(Tensor h, Tensor y, Tensor bias, Tensor gamma, Tensor beta, {_DROPOUT}, "
            "float eps) -> (Tensor, Tensor, Tensor)",
            lambda h, y, *rest: like(h.contiguous(), y.contiguous()),
            forward,
        )
        operator_backward = self._define(
            "add_norm_backward(Tensor? dtotal, Tensor dnormed, Tensor total, Tensor gamma, "
            f"Tensor moments, ScalarType h_dtype, {_DROPOUT}) -> (Tensor, Tensor, Tensor)",
            like_gradients,
            gradients,
        )

        def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            h, y, bias, gamma, beta, threshold, seed, _ = inputs
            total, _, moments = output
            ctx.save_for_backward(total, gamma, moments, seed)
            ctx.options = h.dtype, y.dtype, threshold
            ctx.vectors = bias.dtype, gamma.dtype, beta.dtype
            ctx.set_materialize_grads(False)  # the last block's residual stream has none

        def backward(
            ctx: Any, dtotal: Tensor | None, dnormed: Tensor | None, _: None
        ) -> tuple[Any, ...]:
            total, gamma, moments, seed = ctx.saved_tensors
            h_dtype, y_dtype, threshold = ctx.options
            if dnormed is None:
                if dtotal is None:
                    return (None,) * 8
                dnormed = torch.zeros_like(dtotal, dtype=y_dtype)
            dh, dy, dvectors = operator_backward(
                dtotal, dnormed, total, gamma, moments, h_dtype, threshold, seed
            )
            vectors = (x.to(dtype) for x, dtype in zip(dvectors.unbind(), ctx.vectors, strict=True))
            return (dh, dy, *vectors, None, None, None)

        self._derive("add_norm", save, backward)
        return operator

    def _define_bias_act(self) -> Any:
        launch = self._launch.bias_act

        def forward(u: Tensor, bias: Tensor, *options: Any) -> Tensor:
            u = u.contiguous()
            out = torch.empty_like(u)
            if out.numel():
                launch.forward(u, bias.contiguous(), out, *options)
            return out

        def like_gradients(dout: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
            dbias = dout.new_empty(dout.shape[1:], dtype=torch.float32)
            return dout.new_empty(dout.shape), dbias

        def gradients(
            dout: Tensor, u: Tensor | None, bias: Tensor | None, out: Tensor | None, *options: Any
        ) -> tuple[Tensor, Tensor]:
            du, dbias = like_gradients(dout)
            if not dout.numel():
                return du, dbias.zero_()
            u, bias, out = (x if x is None else x.contiguous() for x in (u, bias, out))
            launch.backward(dout.contiguous(), u, bias, out, du, dbias, *options)
            return du, dbias

        options = f"{_DROPOUT}, bool gelu"
        operator = self._define(
            f"bias_act(Tensor u, Tensor bias, {options}) -> Tensor",
            lambda u, *rest: u.new_empty(u.shape),
            forward,
        )
        operator_backward = self._define(
            f"bias_act_backward(Tensor dout, Tensor? u, Tensor? bias, Tensor? out, {options})"
            " -> (Tensor, Tensor)",
            like_gradients,
            gradients,
        )

        def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            u, bias, threshold, seed, gelu = inputs
            ctx.save_for_backward(*((u, bias, None) if gelu else (None, None, output)), seed)
            ctx.options = threshold, gelu, bias.dtype

        def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
            *tensors, seed = ctx.saved_tensors
            threshold, gelu, dtype = ctx.options
            du, dbias = operator_backward(dout, *tensors, threshold, seed, gelu)
            return du, dbias.to(dtype), None, None, None

        self._derive("bias_act", save, backward)
        return operator

    def _define_linear(self, launch: LinearLaunchers) -> Any:
        def like(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return x.new_empty((x.shape[0], weight.shape[0]))

        def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            out = like(x, weight, bias)
            if out.numel():
                weight = weight if 1 in weight.stride() else weight.contiguous()
                bias = bias if bias is None else bias.contiguous()
                launch.forward(x.contiguous(), weight, bias, out)
            return out

        def like_gradients(dout: Tensor, x: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
            outputs = dout.shape[1]
            dweight = x.new_empty((outputs, x.shape[1]), dtype=torch.float32)
            return dweight, x.new_empty(outputs if bias else 0, dtype=torch.float32)

        def gradients(dout: Tensor, x: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
            dweight, dbias = like_gradients(dout, x, bias)
            if dweight.numel() and len(x):
                given = dbias if bias else None
                launch.backward(dout.contiguous(), x.contiguous(), dweight, given)
                return dweight, dbias
            return dweight.zero_(), torch.sum(
                dout, 0, dtype=torch.float32, out=dbias
            ) if bias else dbias

        operator = self._define(
            "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", like, forward
        )
        operator_backward = self._define(
            "linear_backward(Tensor dout, Tensor x, bool bias) -> (Tensor, Tensor)",
            like_gradients,
            gradients,
        )

        def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            x, weight, _ = inputs
            ctx.save_for_backward(x, weight)

        def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
            x, weight = ctx.saved_tensors
            needs_x, needs_weight, needs_bias = ctx.needs_input_grad
            dx = operator(dout, weight.t(), None) if needs_x else None
            if not needs_weight:
                return dx, None, torch.sum(dout, 0, dtype=torch.float32) if needs_bias else None
            dweight, dbias = operator_backward(dout, x, needs_bias)
            return dx, dweight, dbias if needs_bias else None

        self._derive("linear", save, backward)
        return operator

    def _define_feed_forward(self, launch: FeedForwardLaunchers) -> Any:
        def like(
            n: Tensor, up: Tensor, bias: Tensor, down: Tensor, threshold: int, seed: Tensor | None,
            gelu: bool,
        ) -> tuple[Tensor, ...]:  # fmt: skip
            """out, u, before."""
            rows, hidden = n.shape[0], up.shape[0]
            u = n.new_empty((rows, hidden))
            return n.new_empty((rows, down.shape[0])), u, n.new_empty((rows if gelu else 0, hidden))

        def forward(
            n: Tensor, up: Tensor, bias: Tensor, down: Tensor, threshold: int, seed: Tensor | None,
            gelu: bool,
        ) -> tuple[Tensor, ...]:  # fmt: skip
            outs = out, u, before = like(n, up, bias, down, threshold, seed, gelu)
            if len(n):
                n, up, bias, down = (x.contiguous() for x in (n, up, bias, down))
                given = before if gelu else None
                launch.forward(n, up, bias, down, given, u, out, threshold, seed)
            return outs

        def like_gradients(
            dout: Tensor, n: Tensor, up: Tensor, down: Tensor, *rest: Any
        ) -> tuple[Tensor, ...]:
            """dn, dup, dbias, ddown; without elements where it is not wanted."""
            *_, wants_n, wants_up, wants_down = rest
            dup, dbias, ddown = (
                up.new_empty(shape if wanted else (0,) * len(shape), dtype=torch.float32)
                for shape, wanted in (
                    (up.shape, wants_up), (up.shape[:1], wants_up), (down.shape, wants_down)
                )
            )  # fmt: skip
            return n.new_empty(n.shape if wants_n else (0, 0)), dup, dbias, ddown

        def gradients(
            dout: Tensor, n: Tensor, up: Tensor, down: Tensor, u: Tensor, before: Tensor,
            threshold: int, seed: Tensor | None, gelu: bool, *wants: bool,
        ) -> tuple[Tensor, ...]:  # fmt: skip
            written = like_gradients(dout, n, up, down, *wants)
            if not len(n):
                for x in written:
                    x.zero_()
                return written
            dout, n, up, down, u, before = (x.contiguous() for x in (dout, n, up, down, u, before))
            du, given = torch.empty_like(u), before if gelu else None
            dn, dup, dbias, ddown = (x if x.numel() else None for x in written)
            wanted = dn, dup, dbias, ddown
            launch.backward(dout, n, up, down, given, u, du, *wanted, threshold, seed)
            return written

        options = f"{_DROPOUT}, bool gelu"
        operator = self._define(
            f"feed_forward(Tensor n, Tensor up, Tensor bias, Tensor down, {options})"
            " -> (Tensor, Tensor, Tensor)",
            like,
            forward,
        )
        operator_backward = self._define(
            "feed_forward_backward(Tensor dout, Tensor n, Tensor up, Tensor down, Tensor u, "
            f"Tensor before, {options}, bool wants_n, bool wants_up, bool wants_down)"
            " -> (Tensor, Tensor, Tensor, Tensor)",
            like_gradients,
            gradients,
        )

        def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            n, up, _, down, threshold, seed, gelu = inputs
            ctx.save_for_backward(n, up, down, *output[1:], seed)
            ctx.options = threshold, gelu
            ctx.set_materialize_grads(False)  # u and before have none

        def backward(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Any, ...]:
            if dout is None:
                return (None,) * 7
            *tensors, seed = ctx.saved_tensors
            threshold, gelu = ctx.options
            n, up, bias, down, *_ = ctx.needs_input_grad
            wants = (n, up or bias, down)
            found = operator_backward(dout, *tensors, threshold, seed, gelu, *wants)
            needed = zip(found, (n, up, bias, down), strict=True)
            return (*(x if needs else None for x, needs in needed), None, None, None)

        self._derive("feed_forward", save, backward)
        return operator

    # --- what a model calls -----------------------------------------------------------------------

    def _attend_packed(self, qkv: Tensor, how: Attend) -> Tensor:
        out, _ = self._attention_operator(self._stored(qkv), *_flat(how))
        return out.to(qkv.dtype)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, how: Attend) -> Tensor:
        same = q.dtype == k.dtype == v.dtype
        stored = (self._stored(x) if same else x.float() for x in (q, k, v))
        out, _ = self._attention_qkv_operator(*stored, *_flat(how))
        return out.to(q.dtype)

    def _embed(
        self, ids: Tensor, position_ids: Tensor, table: Tensor, positions: Tensor, dropout: Dropout,
        scale: float,
    ) -> Tensor:  # fmt: skip
        tables = self._streamed(table), self._streamed(positions)
        t, seed, _ = dropout
        h = self._embed_operator(ids, position_ids, *tables, t, seed, scale)
        return h.to(torch.promote_types(table.dtype, positions.dtype))

    def _add_norm(
        self, h: Tensor, y: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, dropout: Dropout,
        eps: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        vectors = (self._streamed(x) for x in (bias, gamma, beta))
        t, seed, _ = dropout
        total, normed, _ = self._add_norm_operator(
            self._streamed(h), self._stored(y), *vectors, t, seed, eps
        )
        return total.to(torch.promote_types(h.dtype, y.dtype)), normed.to(y.dtype)

    def _bias_act(self, u: Tensor, bias: Tensor, dropout: Dropout, activation: str) -> Tensor:
        t, seed, _ = dropout
        gelu = activation == "gelu"
        out = self._bias_act_operator(self._stored(u), self._streamed(bias), t, seed, gelu)
        return out.to(u.dtype)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if (dtype := self._own_product(x, weight)) is None:
            return super()._linear(x, weight, bias)
        bias = bias if bias is None else bias.float()
        out: Tensor = self._linear_operator(x.to(dtype), weight.float(), bias)
        return out

    def _feed_forward(
        self, n: Tensor, up: Tensor, bias: Tensor, down: Tensor, dropout: Dropout, activation: str
    ) -> Tensor:
        if (dtype := self._own_product(n, up)) is None or down.dtype != up.dtype:
            return super()._feed_forward(n, up, bias, down, dropout, activation)
        t, seed, _ = dropout
        gelu = activation == "gelu"
        out, _, _ = self._feed_forward_operator(
            n.to(dtype), up.float(), bias.float(), down.float(), t, seed, gelu
        )
        y: Tensor = out
        return y

    def _own_product(self, x: Tensor, weight: Tensor) -> torch.dtype | None:
        """What x is multiplied in, if by our kernels: its own dtype, or that of autocast."""
        device, dtype = x.device.type, x.dtype
        if torch.is_autocast_enabled(device):
            if torch.float64 in (dtype, weight.dtype):
                return None
            dtype = torch.get_autocast_dtype(device)
        elif weight.dtype != dtype:
            return None  # torch says what is wrong
        return dtype if dtype in self.own_products else None

    # --- arguments --------------------------------------------------------------------------------

    def _stored(self, x: Tensor) -> Tensor:
        return x if x.dtype in self._launch.dtypes else x.float()

    def _streamed(self, x: Tensor) -> Tensor:
        return x if x.dtype in self._launch.stream else x.float()


def _dense(x: Tensor) -> Tensor:
    """x, or a copy where its last dimension has gaps: launchers take any other strides."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _flat(how: Attend) -> tuple[Any, ...]:
    """As the operators take it."""
    threshold, seed, _ = how.dropout
    return (*how.spans, threshold, seed, how.causal, how.scale)


def _spans(options: tuple[Any, ...]) -> tuple[Any, ...]:
    starts, lens, *rest = options
    return (starts.int().contiguous(), lens.int().contiguous(), *rest)
