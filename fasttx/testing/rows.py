"""The operations on rows by their definitions, and the inputs they are checked with.

T rows, d columns, V words of the table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttx.ops.contract import Operations
from fasttx.ops.dropout import NO_DROPOUT, Dropout
from fasttx.testing.attention import strided
from fasttx.testing.philox import multipliers, row_uniforms


@dataclass(frozen=True)
class RowCase:
    """One operation of `OPERATIONS` on inputs of one shape; columns of feed_forward: d_ff."""

    op: str
    rows: int
    columns: int
    activation: str = "relu"
    offset: float = 0.0  # of the residual stream, in which LayerNorm must not cancel
    eps: float = 1e-5
    scale: float | None = None  # of embeddings; None: the square root of columns
    mixed: bool = False  # as autocast has it: y and u in the dtype, all else in float32
    strided: bool = False  # matrices are views with gaps, and gradients have strides of 0

    def __str__(self) -> str:
        name = {"bias_act": self.activation, "feed_forward": f"MLP {self.activation}"}.get(
            self.op, self.op
        )
        extra = {
            "offset": self.offset, "eps": self.eps != 1e-5, "scale": self.scale,
            "mixed": self.mixed, "strided": self.strided,
        }  # fmt: skip
        return " ".join((f"{name} {self.rows}x{self.columns}", *(k for k, x in extra.items() if x)))

    @property
    def condition(self) -> float:
        return max(1.0, self.offset)

    def _stream(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of all but y and u."""
        return torch.promote_types(dtype, torch.float32) if self.mixed else dtype

    def leaves(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """The inputs with a gradient, by name."""
        g = torch.Generator().manual_seed(self.rows * 1000 + self.columns)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g, dtype=torch.float64)

        rows, d = self.rows, self.columns
        if self.op == "embed":
            found = {"table": randn(6, d)}
        elif self.op == "bias_act":
            found = {"u": randn(rows, d), "bias": randn(d)}
            if self.mixed:  # multiples of 1/8, whose sums no dtype rounds over the kink of ReLU
                found = {name: x.mul(4).round().div(4) for name, x in found.items()}
                found["bias"] += 0.125
        elif self.op == "feed_forward":
            found = {
                "n": randn(rows, d // 2 + 1), "up": randn(d, d // 2 + 1), "bias": randn(d),
                "down": randn(d // 2 + 1, d),
            }  # fmt: skip
        elif self.op == "linear":
            found = {"x": randn(rows, d), "weight": randn(d // 2 + 1, d), "bias": randn(d // 2 + 1)}
        else:
            found = {
                "h": randn(rows, d) + self.offset, "y": randn(rows, d), "bias": randn(d),
                "gamma": 1 + 0.3 * randn(d), "beta": randn(d),
            }  # fmt: skip
        wide = self._stream(dtype)
        return {name: x.to(dtype if name in ("y", "u") else wide) for name, x in found.items()}

    def fixed(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """Inputs of `embed` without one: few ids, so that rows of the table meet again."""
        if self.op != "embed":
            return {}
        g = torch.Generator().manual_seed(1)
        positions = torch.randn(7, self.columns, generator=g, dtype=torch.float64)
        return {
            "ids": torch.randint(0, 5, (self.rows,), generator=g),
            "position_ids": torch.randint(0, 7, (self.rows,), generator=g).int(),
            "positions": positions.to(self._stream(dtype)),
        }

    def call(
        self, operations: Operations, inputs: dict[str, Tensor], dropout: Dropout
    ) -> tuple[Tensor, ...]:
        """The operation of a backend on the leaves and what is fixed: one output, or two."""
        if self.op == "embed":
            scale = math.sqrt(self.columns) if self.scale is None else self.scale
            return (operations.embed(**inputs, dropout=dropout, scale=scale),)
        if self.op == "add_norm":
            return operations.add_norm(**inputs, dropout=dropout, eps=self.eps)
        if self.op == "bias_act":
            return (operations.bias_act(**inputs, dropout=dropout, activation=self.activation),)
        if self.op == "feed_forward":
            mlp = operations.feed_forward
            return (mlp(**inputs, dropout=dropout, activation=self.activation),)
        return (operations.linear(**inputs),)

    def run(
        self,
        operations: Operations,
        device: torch.device | str,
        dtype: torch.dtype,
        dropout: Dropout = NO_DROPOUT,
    ) -> dict[str, Tensor]:
        """Outputs and gradients by a backend, on the CPU.

        Raises AssertionError where an input changes, or a value has another dtype than it should.
        """
        leaves = {name: x.to(device) for name, x in self.leaves(dtype).items()}
        fixed = {name: x.to(device) for name, x in self.fixed(dtype).items()}
        if self.strided:
            leaves = {name: strided(x) if x.dim() == 2 else x for name, x in leaves.items()}
        before = {name: x.clone() for name, x in leaves.items()}
        leaves = {name: x.requires_grad_() for name, x in leaves.items()}
        outs = self.call(operations, leaves | fixed, dropout)
        stream = self._stream(dtype) if self.op in ("embed", "add_norm") else dtype
        if outs[0].dtype != stream or outs[-1].dtype not in (dtype, stream):
            raise AssertionError(f"{self}: the output is {outs[0].dtype}; expected {stream}")
        values = self._with_gradients(outs, leaves, dtype, device)
        for name, x in leaves.items():
            if not torch.equal(x, before[name]):
                raise AssertionError(f"{self}: {name} changed")
        return {name: x.cpu() for name, x in values.items()}

    def define(
        self, dtype: torch.dtype, wide: torch.dtype, p: float, seed: int
    ) -> dict[str, Tensor]:
        """The same by definition: in float64 if that is `wide`, else in the dtypes given."""

        def widen(x: Tensor) -> Tensor:
            return x.double() if wide == torch.float64 and x.is_floating_point() else x

        leaves = {name: widen(x).requires_grad_() for name, x in self.leaves(dtype).items()}
        fixed = {name: widen(x) for name, x in self.fixed(dtype).items()}
        factors = multipliers(row_uniforms(seed, self.rows, self.columns), p)
        outs = self._by_definition(leaves | fixed, factors)
        return self._with_gradients(outs, leaves, dtype, "cpu")

    def _by_definition(self, x: dict[str, Tensor], factors: Tensor) -> tuple[Tensor, ...]:
        if self.op == "embed":
            scale = math.sqrt(self.columns) if self.scale is None else self.scale
            h = x["table"][x["ids"]] * scale + x["positions"][x["position_ids"].long()]
            return (h * factors.to(h.dtype),)
        if self.op == "bias_act":
            u = x["u"] + x["bias"].to(x["u"].dtype)
            return (_activation(self.activation, u) * factors.to(u.dtype),)
        if self.op == "feed_forward":
            u = x["n"] @ x["up"].T + x["bias"]
            return ((_activation(self.activation, u) * factors.to(u.dtype)) @ x["down"].T,)
        if self.op == "linear":
            return (x["x"] @ x["weight"].T + x["bias"],)
        y = x["y"] + x["bias"].to(x["y"].dtype)
        h = x["h"] + y * factors.to(y.dtype)
        return h, _layer_norm(h, x["gamma"], x["beta"], self.eps)

    def _with_gradients(
        self,
        outs: Sequence[Tensor],
        leaves: dict[str, Tensor],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(2)
        grads = []
        for out in outs:
            drawn = torch.randn(out.shape, generator=g, dtype=torch.float64)
            drawn = drawn.to(dtype).to(device, out.dtype)
            grads.append(drawn.new_ones(()).expand(out.shape) if self.strided else drawn)
        gradients = torch.autograd.grad(outs, tuple(leaves.values()), grads)
        for (name, x), grad in zip(leaves.items(), gradients, strict=True):
            if x.dtype != grad.dtype:
                raise AssertionError(f"{self}: d{name} is {grad.dtype}; expected {x.dtype}")
        values = {name: x.detach() for name, x in zip(("out", "normed"), outs, strict=False)}
        return values | {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}


def _layer_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """By its definition in float64; in less, what torch makes of it."""
    if x.dtype != torch.float64:
        return F.layer_norm(x, x.shape[-1:], gamma, beta, eps)
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    return centred / (variance + eps).sqrt() * gamma + beta


def _activation(name: str, x: Tensor) -> Tensor:
    if name == "relu":
        return torch.where(x > 0, x, 0.0)
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


PRODUCTS = ("linear", "feed_forward")
SHAPES = ((33, 256), (1, 8), (7, 20), (130, 10), (257, 32), (0, 16))


def _of(op: str, activation: str = "relu") -> tuple[RowCase, ...]:
    """Each shape, views with gaps, and autocast's mix, which linear layers are not given."""
    return (
        *(RowCase(op, *shape, activation) for shape in SHAPES),
        RowCase(op, 33, 256, activation, strided=True),
        *([] if op in PRODUCTS else [RowCase(op, 33, 64, activation, mixed=True)]),
    )


EMBED = (*_of("embed"), RowCase("embed", 33, 20, scale=0.5))
ADD_NORM = (
    *_of("add_norm"),
    RowCase("add_norm", 9, 64, offset=300.0),
    RowCase("add_norm", 9, 24, eps=0.5),
)
BIAS_ACT = (
    *_of("bias_act"),
    *_of("bias_act", "gelu"),
    RowCase("bias_act", 5, 13),
    RowCase("bias_act", 5, 13, "gelu"),
)
LINEAR = _of("linear")
FEED_FORWARD = (*_of("feed_forward"), *_of("feed_forward", "gelu"))
OPERATIONS = ("embed", "add_norm", "bias_act", *PRODUCTS)


def cases() -> list[RowCase]:
    """A quick check: columns that are multiples of 8 and not, one dtype and autocast's mix."""
    operations = (("embed", ""), ("add_norm", ""), ("bias_act", "relu"), ("bias_act", "gelu"))
    found = [
        RowCase(op, 50, columns, activation, mixed=mixed)
        for columns, mixed in ((256, False), (20, True), (256, True))
        for op, activation in operations
    ]
    # Not relu: what a half precision rounds to the other side of its kink is a large error.
    return [*found, RowCase("linear", 50, 256), RowCase("feed_forward", 50, 100, "gelu")]
