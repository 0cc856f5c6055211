"""Attention by its definition, one sequence after another, and the batches it is checked with.

T rows, B sequences, H heads, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fasttx.ops.contract import Operations, Spans
from fasttx.ops.dropout import NO_DROPOUT, Dropout
from fasttx.testing.philox import attention_uniforms, multipliers

NAN, INF = math.nan, math.inf


@dataclass(frozen=True)
class AttentionCase:
    """A batch: its lengths, and how its sequences lie in the rows."""

    name: str
    lens: tuple[int, ...]
    heads: int = 2
    head_dim: int = 16
    causal: bool = False
    starts: tuple[int, ...] | None = None  # None: end to end
    rows: int | None = None  # None: up to the last end
    dead: float = 0.0  # what the rows outside every sequence hold
    strided: bool = False  # qkv is a view whose rows and heads lie apart
    scale: float | None = None
    spread: float = 1.0  # standard deviation of q and k
    slack: int = 0  # by how much max_seqlen is larger than need be

    def __str__(self) -> str:
        return f"{self.name}, causal" if self.causal else self.name

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Start and length of each sequence."""
        starts = self.starts or [sum(self.lens[:i]) for i in range(len(self.lens))]
        return list(zip(starts, self.lens, strict=True))

    @property
    def total(self) -> int:
        return max((s + n for s, n in self.pairs), default=0) if self.rows is None else self.rows

    @property
    def condition(self) -> float:
        """Softmax makes a relative error in a weight of an absolute one in a score."""
        return max(1.0, self.spread**2)

    def live(self) -> Tensor:
        """(T,) bool: the rows that belong to a sequence."""
        live = torch.zeros(self.total, dtype=torch.bool)
        for s, n in self.pairs:
            live[s : s + n] = True
        return live

    def spans(self, device: torch.device | str = "cpu") -> Spans:
        index = torch.tensor(self.pairs, dtype=torch.int32, device=device).view(-1, 2)
        starts, lens = index.unbind(1)
        return Spans.of(starts, lens, max(self.lens, default=0) + self.slack, self.total)

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """qkv (T, 3, H, D) and a gradient of the output (T, H, D)."""
        generator = torch.Generator().manual_seed(len(self.name) + 31 * self.total)
        shape = (self.total, 3, self.heads, self.head_dim)
        qkv = torch.randn(shape, generator=generator, dtype=torch.float64)
        qkv[:, :2] *= self.spread
        grad = torch.randn(shape[0], *shape[2:], generator=generator, dtype=torch.float64)
        dead = ~self.live()
        qkv[dead], grad[dead] = self.dead, self.dead
        return qkv.to(dtype), grad.to(dtype)

    def define(
        self, dtype: torch.dtype, wide: torch.dtype, p: float, seed: int
    ) -> dict[str, Tensor]:
        """out, dq, dk, dv by definition, in `wide`, of inputs rounded to `dtype`."""
        qkv, grad = (x.to(wide) for x in self.inputs(dtype))
        factors = shared_factors(self, p, seed) if p else None
        q, k, v = (x.clone().requires_grad_() for x in qkv.unbind(1))
        out = attend(q, k, v, self, factors)
        gradients = torch.autograd.grad(out, (q, k, v), grad, materialize_grads=True)
        return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *gradients), strict=True))

    def run(
        self,
        operations: Operations,
        device: torch.device | str,
        dtype: torch.dtype,
        dropout: Dropout = NO_DROPOUT,
        *,
        packed: bool = True,
    ) -> dict[str, Tensor]:
        """The same by a backend, on the CPU; by `attention` if packed, else by `attention_qkv`.

        Raises AssertionError where an input changes, or the output has another dtype.
        """
        qkv, grad = (x.to(device) for x in self.inputs(dtype))
        if self.strided:
            qkv, grad = strided(qkv), strided(grad)
        leaves = [qkv]
        if not packed:
            leaves = [x if self.strided else x.contiguous() for x in qkv.unbind(1)]
        leaves = [x.detach().requires_grad_() for x in leaves]
        before = [x.detach().clone() for x in leaves]
        spans, options = self.spans(device), {"causal": self.causal, "scale": self.scale}
        attention: Callable[..., Tensor] = operations.attention
        if not packed:
            attention = operations.attention_qkv
        out = attention(*leaves, spans, dropout, **options)
        if out.dtype != dtype:
            raise AssertionError(f"{self}: the output is {out.dtype}; expected {dtype}")
        gradients = torch.autograd.grad(out, leaves, grad)
        for x, y in zip(leaves, before, strict=True):
            if not torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)):
                raise AssertionError(f"{self}: an input changed")
        if packed:
            gradients = gradients[0].unbind(1)
        values = dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *gradients), strict=True))
        return {name: x.cpu() for name, x in values.items()}


def attend(
    q: Tensor, k: Tensor, v: Tensor, case: AttentionCase, factors: Sequence[Tensor] | None = None
) -> Tensor:
    """softmax(q k^T scale) v inside each sequence. q, k, v (T, H, D) -> (T, H, D).

    factors: for each sequence what its weights (H, n, n) are multiplied by: dropout.
    """
    out = q.masked_fill(torch.ones((), dtype=torch.bool), 0.0)  # a part of the graph at any size
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    for i, (s, n) in enumerate(case.pairs):
        if not n:
            continue
        q_, k_, v_ = (x[s : s + n].transpose(0, 1) for x in (q, k, v))
        scores = (q_ @ k_.transpose(1, 2)) * scale
        if case.causal:
            later = torch.ones(n, n, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, -math.inf)
        weights = scores.softmax(-1)
        if factors is not None:
            weights = weights * factors[i].to(weights.dtype)
        out[s : s + n] = (weights @ v_).transpose(0, 1)
    return out


def shared_factors(case: AttentionCase, p: float, seed: int) -> list[Tensor]:
    """What dropout multiplies the weights of each sequence by."""
    longest = max(case.lens, default=0)
    uniforms = attention_uniforms(seed, len(case.lens), case.heads, longest, longest)
    return [multipliers(u[:, :n, :n], p) for u, n in zip(uniforms, case.lens, strict=True)]


def strided(x: Tensor) -> Tensor:
    """The same values in a view with gaps of NaN in every dimension, dense in the last one only."""
    wide = x.new_full((*(2 * n for n in x.shape[:-1]), x.shape[-1] + 8), math.nan)
    view = wide[(*(slice(None, None, 2) for _ in x.shape[:-1]), slice(4, -4))]
    view.copy_(x)
    return view


CASES = (
    AttentionCase("one", (1,), heads=1, head_dim=8),
    AttentionCase("odd", (17, 1, 0, 31, 2, 7)),
    AttentionCase("gaps", (7, 0, 33, 2), starts=(40, 47, 3, 52), rows=60, dead=NAN, head_dim=20),
    AttentionCase("infinite", (33, 31, 1), starts=(34, 1, 68), rows=71, dead=INF, head_dim=64),
    AttentionCase("tail", (9, 0, 5), rows=32, dead=-INF, head_dim=8, slack=3),
    AttentionCase("long", (255, 256, 300), heads=1, head_dim=32),
    AttentionCase("wide", (17, 65), head_dim=128, heads=3),
    AttentionCase("strided", (31, 2, 16), strided=True, head_dim=32),
    AttentionCase(
        "gapped views", (31, 8), starts=(40, 1), rows=80, dead=NAN, strided=True, head_dim=20
    ),
    AttentionCase("scaled", (17, 33), scale=0.3),
    AttentionCase("unscaled", (7, 15), scale=1.0),
    AttentionCase("slack", (7, 3), slack=70),
    AttentionCase("peaked", (33, 17), spread=30.0, head_dim=32),
    AttentionCase("alike", (33, 64), spread=1e-3),
    # More sequences than a block of threads looks at, at once or in any round number of steps.
    AttentionCase("33 sequences", (3, 1, 2) * 11, heads=1, head_dim=8),
    AttentionCase("40 sequences", (0, 4, 1, 2) * 10, heads=1, head_dim=8, rows=73, dead=NAN),
    AttentionCase("300 sequences", (2, 1, 0) * 100, heads=1, head_dim=8),
)
EMPTY_CASES = (
    AttentionCase("no sequence", ()),
    AttentionCase("no sequence, dead rows", (), rows=5, dead=NAN),
    AttentionCase("no sequence, room", (), rows=3, slack=4),
    AttentionCase("no row", (0, 0)),
    AttentionCase("no row, room", (0, 0), slack=9),
    AttentionCase("empty sequences", (0, 0, 0), starts=(0, 3, 1), rows=4, dead=NAN),
)
BY_NAME = {case.name: case for case in (*CASES, *EMPTY_CASES)}


def cases(head_dim: int) -> list[AttentionCase]:
    """A quick check: sequences out of order, of lengths 0 and 1 too, between rows of NaN."""
    return [
        AttentionCase(
            "attention", (33, 1, 0, 70, 8), starts=(75, 2, 3, 4, 110), rows=120, dead=NAN,
            head_dim=head_dim, causal=causal,
        )
        for causal in (False, True)
    ]  # fmt: skip
