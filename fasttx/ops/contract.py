"""The contract of a backend: the operations that a model runs on, and what an adapter brings.

Shapes: T tokens of a packed batch (rows), B sequences, H heads, D head_dim, d columns, V words.

To add a backend, write an `Adapter` in a file of this folder and an entry of the table in
`registry`. Its operations either follow `plain.PlainOperations` (tensor algebra, torch's autograd)
or are made of launchers by `fused.FusedOperations`, which adds what is the same for all kernels.
"""

from __future__ import annotations

import numbers
from abc import ABC, abstractmethod
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttx.ops.arguments import (
    ROW_NUMBERS,
    check_finite,
    check_floats,
    kind,
    readable,
    row_numbers,
)
from fasttx.ops.dropout import NO_DROPOUT, Dropout, require_seed

LAYER_NORM_EPS = 1e-5
ACTIVATIONS = ("relu", "gelu")


class Spans(NamedTuple):
    """Where the sequences of a packed batch lie: first row and length of each, (B,) int32.

    `max_seqlen` is at least the longest length; a larger one costs time and changes no result.
    Rows outside every sequence come out of attention as 0, and so do their gradients.
    """

    starts: Tensor
    lens: Tensor
    max_seqlen: int

    @classmethod
    def of(cls, starts: Tensor, lens: Tensor, max_seqlen: int, rows: int) -> Spans:
        """Checked spans of a batch with so many rows.

        Types and shapes are checked everywhere, values where they are `readable`. Raises TypeError
        and ValueError.
        """
        check_spans(cls(starts, lens, max_seqlen), rows)
        return cls(starts.to(torch.int32), lens.to(torch.int32), max_seqlen)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, max_seqlen: int, rows: int) -> Spans:
        """Those that `cu_seqlens` (B + 1,) bounds, as FlashAttention has it; raises as `of`."""
        check_cu_seqlens(cu_seqlens)
        spans = cls.of(cu_seqlens[:-1], cu_seqlens.diff(), max_seqlen, rows)
        if readable(cu_seqlens) and (first := int(cu_seqlens[0])):
            raise ValueError(
                f"cu_seqlens begins with {first}; expected 0: the first sequence begins in row 0"
            )
        return spans


def check_spans(spans: Spans, rows: int, values: bool = True) -> None:
    """As `Spans.of` checks; without the values where a kernel looks at them itself."""
    starts, lens, max_seqlen = spans
    given: tuple[tuple[str, Any], ...] = (("seq_starts", starts), ("seq_lens", lens))
    for name, x in given:
        if not isinstance(x, Tensor) or x.dtype not in ROW_NUMBERS or x.dim() != 1:
            raise TypeError(f"{name} is {kind(x)}; expected int32 (B,), the same B for both")
    if starts.shape != lens.shape:
        raise TypeError(
            f"seq_starts is {kind(starts)} and seq_lens {kind(lens)}; expected int32 (B,), the "
            "same B for both"
        )
    if torch.compiler.is_compiling():
        return
    if type(max_seqlen) is not int:
        whole = isinstance(max_seqlen, numbers.Integral | torch.SymInt)
        if not whole or isinstance(max_seqlen, bool):
            raise TypeError(f"max_seqlen is {max_seqlen!r}; expected an int")
    if max_seqlen < 0:
        raise ValueError(f"max_seqlen is {max_seqlen}; expected the longest length, 0 or more")
    if values and readable(starts) and readable(lens):
        _check_values(starts, lens, max_seqlen, rows)


def check_cu_seqlens(cu_seqlens: Any) -> None:
    """Raises TypeError for what is not (B + 1,) int32 or int64; `Spans` checks the values."""
    is_wrong = not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in ROW_NUMBERS
    if is_wrong or cu_seqlens.dim() != 1 or not len(cu_seqlens):
        raise TypeError(f"cu_seqlens is {kind(cu_seqlens)}; expected int32 (B + 1,)")


def _check_values(starts: Tensor, lens: Tensor, max_seqlen: int, rows: int) -> None:
    spans = list(zip(starts.tolist(), lens.tolist(), strict=True))
    for i, (start, length) in enumerate(spans):
        if start < 0 or length < 0 or start + length > rows:
            raise ValueError(
                f"sequence {i} is rows {start} to {start + length} (length {length}); expected "
                f"rows within 0 to {rows}"
            )
        if length > max_seqlen:
            raise ValueError(
                f"sequence {i} has {length} rows and max_seqlen is {max_seqlen}; expected a "
                "max_seqlen that no sequence exceeds"
            )
    end = 0
    for start, length in sorted(span for span in spans if span[1]):
        if start < end:
            raise ValueError(
                f"the sequence that starts at row {start} overlaps another one; expected "
                "seq_starts and seq_lens to cut out separate runs of rows"
            )
        end = start + length


class Attend(NamedTuple):
    """What attention is told besides its tensors."""

    spans: Spans
    dropout: Dropout
    causal: bool
    scale: float


class Operations(ABC):
    """What a model runs on. Every backend computes the same functions, dropout masks included.

    The public methods check their arguments, the same way for all, and call what a backend defines:
    `_attend`, `_embed`, `_add_norm`, `_bias_act`, and `_linear` where torch does not multiply. They
    raise ValueError for shapes that do not fit and for tensors on several devices, TypeError for
    another dtype. Values are checked where they are `readable`: spans as `Spans.of` has it, and
    IndexError for ids outside their table.
    """

    _checks_spans = False  # whether its kernels refuse spans that leave the rows, at every call

    def attention(
        self, qkv: Tensor, spans: Spans, dropout: Dropout = NO_DROPOUT, *, causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:  # fmt: skip
        """softmax(q k^T scale) v inside each sequence, dropout on the weights; read in place.

        qkv (T, 3, H, D) -> (T, H, D). scale: D ** -0.5 by default.
        """
        if qkv.dim() != 4 or qkv.shape[1] != 3:
            raise ValueError(f"qkv has shape {tuple(qkv.shape)}; expected (T, 3, H, D)")
        check_floats("qkv", qkv)
        how = self._how(spans, dropout, causal, scale, qkv.shape[0], qkv.shape[-1])
        _check_site(dropout, qkv, spans.starts, spans.lens)
        return self._attend_packed(qkv, how)

    def attention_qkv(
        self, q: Tensor, k: Tensor, v: Tensor, spans: Spans, dropout: Dropout = NO_DROPOUT, *,
        causal: bool = False, scale: float | None = None,
    ) -> Tensor:  # fmt: skip
        """The same of projections that lie apart, three equal (T, H, D) with any strides."""
        if q.dim() != 3 or q.shape != k.shape or q.shape != v.shape:
            shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
            raise ValueError(f"q, k, v have shapes {shapes}; expected three equal (T, H, D)")
        check_floats("q, k, v", q, k, v)
        how = self._how(spans, dropout, causal, scale, q.shape[0], q.shape[-1])
        _check_site(dropout, q, k, v, spans.starts, spans.lens)
        return self._attend(q, k, v, how)

    def embed(
        self, ids: Tensor, position_ids: Tensor, table: Tensor, positions: Tensor, dropout: Dropout,
        scale: float,
    ) -> Tensor:  # fmt: skip
        """dropout(table[ids] * scale + positions[position_ids]): ids, position_ids (T,) -> (T, d).

        table (V, d); positions (longest, d), which gets no gradient.
        """
        if ids.dim() != 1 or ids.shape != position_ids.shape:
            shapes = f"{tuple(ids.shape)} and {tuple(position_ids.shape)}"
            raise ValueError(f"ids and position_ids have shapes {shapes}; expected two equal (T,)")
        if table.dim() != 2 or positions.dim() != 2 or table.shape[1] != positions.shape[1]:
            shapes = f"{tuple(table.shape)} and {tuple(positions.shape)}"
            raise ValueError(
                f"table and positions have shapes {shapes}; expected (V, d) and (longest, d)"
            )
        check_floats("table and positions", table, positions)
        ids = row_numbers("ids", ids, len(table), "the embedding table")
        position_ids = row_numbers("position_ids", position_ids, len(positions), "the positions")
        check_finite("scale", scale)
        _check_site(dropout, table, ids, position_ids, positions)
        return self._embed(ids, position_ids, table, positions, dropout, scale)

    def add_norm(
        self, h: Tensor, y: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, dropout: Dropout,
        eps: float = LAYER_NORM_EPS,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """h' = h + dropout(y + bias) and LayerNorm(h') * gamma + beta; h, y (T, d) -> two (T, d).

        The second may come in y's dtype: autocast would round it to that for the next layer.
        """
        if h.dim() != 2 or h.shape != y.shape:
            shapes = f"{tuple(h.shape)} and {tuple(y.shape)}"
            raise ValueError(f"h and y have shapes {shapes}; expected two equal (T, d)")
        if not bias.shape == gamma.shape == beta.shape == h.shape[1:]:
            for name, x in (("bias", bias), ("gamma", gamma), ("beta", beta)):
                _check_vector(name, x, h.shape[1])
        check_floats("h and y", h, y)
        check_finite("eps", eps)
        _check_site(dropout, h, y, bias, gamma, beta)
        return self._add_norm(h, y, bias, gamma, beta, dropout, eps)

    def bias_act(self, u: Tensor, bias: Tensor, dropout: Dropout, activation: str) -> Tensor:
        """dropout(act(u + bias)), act "relu" or "gelu" (exact, by erf): u (T, d) -> (T, d)."""
        _check_activation(activation)
        if u.dim() != 2:
            raise ValueError(f"u has shape {tuple(u.shape)}; expected (T, d)")
        check_floats("u", u)
        _check_vector("bias", bias, u.shape[1])
        _check_site(dropout, u, bias)
        return self._bias_act(u, bias, dropout, activation)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x weight^T + bias, as `torch.nn.functional.linear`: (T, in) -> (T, out).

        weight (out, in), bias (out,). Under autocast x and the product are in its dtype.
        """
        if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
            shapes = f"{tuple(x.shape)} and {tuple(weight.shape)}"
            raise ValueError(f"x and weight have shapes {shapes}; expected (T, in) and (out, in)")
        if bias is None:
            check_floats("x and weight", x, weight)
            _check_site(NO_DROPOUT, x, weight)
        else:
            _check_vector("bias", bias, weight.shape[0])
            check_floats("x, weight and bias", x, weight, bias)
            _check_site(NO_DROPOUT, x, weight, bias)
        return self._linear(x, weight, bias)

    def feed_forward(
        self, n: Tensor, up: Tensor, bias: Tensor, down: Tensor, dropout: Dropout, activation: str
    ) -> Tensor:
        """dropout(act(n up^T + bias)) down^T: the MLP of a block but for its last bias.

        n (T, d), up (d_ff, d), bias (d_ff,), down (out, d_ff) -> (T, out). The same as `linear`,
        `bias_act` and `linear`, which it is made of where a backend does not fuse them.
        """
        _check_activation(activation)
        fits = n.dim() == up.dim() == down.dim() == 2
        if not fits or n.shape[1] != up.shape[1] or up.shape[0] != down.shape[1]:
            shapes = ", ".join(str(tuple(x.shape)) for x in (n, up, down))
            raise ValueError(
                f"n, up and down have shapes {shapes}; expected (T, d), (d_ff, d) and (out, d_ff)"
            )
        check_floats("n, up and down", n, up, down)
        _check_vector("bias", bias, up.shape[0])
        _check_site(dropout, n, up, bias, down)
        return self._feed_forward(n, up, bias, down, dropout, activation)

    def _how(
        self, spans: Spans, dropout: Dropout, causal: bool, scale: float | None, rows: int,
        head_dim: int,
    ) -> Attend:  # fmt: skip
        check_spans(spans, rows, values=not self._checks_spans)
        if scale is None:
            scale = max(head_dim, 1) ** -0.5
        check_finite("scale", scale)
        return Attend(spans, dropout, causal, scale)

    # --- what a backend defines -------------------------------------------------------------------

    @abstractmethod
    def _attend(self, q: Tensor, k: Tensor, v: Tensor, how: Attend) -> Tensor: ...

    def _attend_packed(self, qkv: Tensor, how: Attend) -> Tensor:
        q, k, v = qkv.unbind(1)
        return self._attend(q, k, v, how)

    @abstractmethod
    def _embed(
        self, ids: Tensor, position_ids: Tensor, table: Tensor, positions: Tensor, dropout: Dropout,
        scale: float,
    ) -> Tensor: ...  # fmt: skip

    @abstractmethod
    def _add_norm(
        self, h: Tensor, y: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, dropout: Dropout,
        eps: float,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    @abstractmethod
    def _bias_act(self, u: Tensor, bias: Tensor, dropout: Dropout, activation: str) -> Tensor: ...

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def _feed_forward(
        self, n: Tensor, up: Tensor, bias: Tensor, down: Tensor, dropout: Dropout, activation: str
    ) -> Tensor:
        u = self._bias_act(self._linear(n, up, None), bias, dropout, activation)
        return self._linear(u, down, None)


def _check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}")


def _check_vector(name: str, x: Tensor, columns: int) -> None:
    if x.shape != (columns,):
        raise ValueError(f"{name} has shape {tuple(x.shape)}; expected ({columns},)")


def _check_site(dropout: Dropout, first: Tensor, *others: Tensor) -> None:
    """A seed where something is dropped, and one device for all tensors."""
    if dropout.threshold:
        others = (*others, require_seed(dropout.seed))
    device = first.device
    for x in others:
        if x.device != device:
            raise ValueError(f"tensors lie on {device} and {x.device}; expected one device for all")


class Adapter(Protocol):
    """One backend. `registry.Backend` imports it when it is first asked for."""

    def unavailable_reasons(
        self, device: torch.device, dtype: torch.dtype, head_dim: int
    ) -> list[str]:
        """Why it cannot run there; each reason says what to do. Empty, as by default: it can."""
        return []

    @property
    def operations(self) -> Operations:
        """Asked for only where there are no such reasons."""

    def choices(self) -> dict[str, str]:
        """What it would choose here where several ways give other bits; a run keeps it."""
        return {}

    def choose(self, choices: dict[str, str]) -> None:
        """To compute as `choices` says from now on, in the whole process."""
        return  # most choose nothing

    def description(self) -> dict[str, Any]:
        """What it chose on this machine and why, for reports; most choose nothing."""
        return {}
