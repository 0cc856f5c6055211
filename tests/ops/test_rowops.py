"""The row operations of every backend against float64, over the registry; and sdpa's own dropout.

T rows, d and f columns, V rows of the table.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fasttx.ops import sdpa
from fasttx.ops.rows import RowOps, specification
from tests import equivalence
from tests.equivalence import Measure, adapter_of, over_backends

pytestmark = equivalence.POISONED

SEED = -987654321987654321


def seed_on(device: str) -> Tensor:
    return torch.tensor(SEED, dtype=torch.int64, device=device)


def layer_norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """By its definition in float64; in less, what torch makes of it."""
    if x.dtype != torch.float64:
        return F.layer_norm(x, x.shape[-1:], gamma, beta)
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred**2).mean(-1, keepdim=True)
    return centred / (variance + 1e-5).sqrt() * gamma + beta


ACTIVATIONS = {
    "relu": lambda x: torch.where(x > 0, x, 0.0),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
}


@dataclass(frozen=True)
class RowCase:
    """One operation on inputs of one shape."""

    op: str
    rows: int
    columns: int
    activation: str = "relu"
    offset: float = 0.0  # of the residual stream, in which LayerNorm must not cancel

    def leaves(self) -> dict[str, Tensor]:
        """The inputs with a gradient, by name."""
        g = torch.Generator().manual_seed(self.rows * 1000 + self.columns)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g, dtype=torch.float64)

        rows, d = self.rows, self.columns
        if self.op == "embed":
            return {"table": randn(6, d)}
        if self.op == "bias_act":
            return {"u": randn(rows, d), "bias": randn(d)}
        return {
            "h": randn(rows, d) + self.offset, "y": randn(rows, d), "bias": randn(d),
            "gamma": 1 + 0.3 * randn(d), "beta": randn(d),
        }  # fmt: skip

    def fixed(self) -> dict[str, Tensor]:
        """Those without, of `embed`: few different ids, so that rows of the table meet again."""
        g = torch.Generator().manual_seed(1)
        return {
            "ids": torch.randint(0, 5, (self.rows,), generator=g),
            "position_ids": torch.randint(0, 7, (self.rows,), generator=g, dtype=torch.int32),
            "pe": torch.randn(7, self.columns, generator=g, dtype=torch.float64),
        }

    def compute(
        self, function: Callable[..., Any], device: str, given: torch.dtype, wide: torch.dtype
    ) -> dict[str, Tensor]:
        """Outputs and gradients by name, in `wide`, of inputs that are `given` in another dtype.

        function: of the leaves and, for embed, of what is fixed.
        """

        def rounded(x: Tensor) -> Tensor:
            return x.to(given).to(device, wide) if x.is_floating_point() else x.to(device)

        leaves = {k: rounded(x).requires_grad_() for k, x in self.leaves().items()}
        fixed = self.fixed() if self.op == "embed" else {}
        outs = function(**leaves, **{k: rounded(x) for k, x in fixed.items()})
        outs = outs if isinstance(outs, tuple) else (outs,)
        g = torch.Generator().manual_seed(2)
        grads = [rounded(torch.randn(out.shape, generator=g, dtype=torch.float64)) for out in outs]
        gradients = torch.autograd.grad(outs, tuple(leaves.values()), grads)
        values = dict(zip(("out", "normed"), outs, strict=False))
        values |= {f"d{k}": x for k, x in zip(leaves, gradients, strict=True)}
        assert {x.dtype for x in values.values()} == {wide}
        return {k: x.detach().cpu() for k, x in values.items()}

    def plain(self, p: float) -> Callable[..., Any]:
        """The operation by its definition."""
        uniforms = equivalence.row_uniforms(SEED, self.rows, self.columns)
        factors = equivalence.multipliers(uniforms, p)

        def embed(table: Tensor, ids: Tensor, position_ids: Tensor, pe: Tensor) -> Tensor:
            h = table[ids] * math.sqrt(self.columns) + pe[position_ids.long()]
            return h * factors.to(h.dtype)

        def add_norm(
            h: Tensor, y: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor
        ) -> tuple[Tensor, Tensor]:
            h = h + (y + bias) * factors.to(y.dtype)
            return h, layer_norm(h, gamma, beta)

        def bias_act(u: Tensor, bias: Tensor) -> Tensor:
            return ACTIVATIONS[self.activation](u + bias) * factors.to(u.dtype)

        return {"embed": embed, "add_norm": add_norm, "bias_act": bias_act}[self.op]

    def by(self, ops: RowOps, device: str, p: float) -> Callable[..., Any]:
        """The operation of a backend."""
        options: dict[str, Any] = {"p": p, "seed": seed_on(device) if p else None}
        if self.op == "bias_act":
            options["activation"] = self.activation
        return functools.partial(getattr(ops, self.op), **options)

    def __str__(self) -> str:
        name = self.activation if self.op == "bias_act" else self.op
        return f"{name} {self.rows}x{self.columns}" + (" offset" if self.offset else "")


SHAPES = ((33, 256), (1, 8), (7, 20), (130, 10), (257, 32), (0, 16))
CASES = [
    *(RowCase("embed", *shape) for shape in SHAPES),
    *(RowCase("add_norm", *shape) for shape in SHAPES),
    *(RowCase("bias_act", *shape) for shape in (*SHAPES, (5, 13))),
    *(RowCase("bias_act", *shape, "gelu") for shape in (*SHAPES, (5, 13))),
    RowCase("add_norm", 9, 64, offset=300.0),
]
over_cases = pytest.mark.parametrize("case", CASES, ids=str)
over_ops = pytest.mark.parametrize(
    "case", [c for c in CASES if (c.rows, c.columns) == (33, 256)], ids=str
)


@functools.cache
def measure(case: RowCase, dtype: torch.dtype, p: float) -> Measure:
    def compute(wide: torch.dtype) -> dict[str, Tensor]:
        return case.compute(case.plain(p), "cpu", dtype, wide)

    return Measure.of(compute, dtype, condition=max(1.0, case.offset))


def check(case: RowCase, backend: Any, device: str, dtype: torch.dtype, p: float) -> None:
    ops = adapter_of(backend, device, dtype).rowops
    values = case.compute(case.by(ops, device, p), device, dtype, dtype)
    measure(case, dtype, p).check(f"{backend.name}, {case}", **values)


# --------------------------------------------------------------- every backend's, against float64


@over_cases
@over_backends(0.0, 0.1, 0.5)
def test_float32(backend, device, case, p):
    check(case, backend, device, torch.float32, p)


@over_cases
@over_backends(0.0, 0.1)
def test_float64(backend, device, case, p):
    check(case, backend, device, torch.float64, p)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@over_ops
@over_backends(0.0, 0.1)
def test_half_precision(backend, device, case, dtype, p):
    check(case, backend, device, dtype, p)


@over_ops
@over_backends()
def test_a_dropout_of_one(backend, device, case):
    """Nothing but the residual stream is left, and nothing is NaN."""
    ops = adapter_of(backend, device).rowops
    values = case.compute(case.by(ops, device, 1.0), device, torch.float32, torch.float32)
    measure(case, torch.float32, 1.0).check(f"{backend.name}, {case}", **values)
    if case.op != "add_norm":
        assert all((x == 0).all() for x in values.values())


@over_backends(0.0, 0.1)
def test_low_precision_branch_of_a_float32_stream(backend, device, p):
    """What autocast sends: y and u in bfloat16, everything else in float32."""
    ops = adapter_of(backend, device).rowops
    seed = seed_on(device) if p else None
    leaves = RowCase("add_norm", 33, 64).leaves()
    h, y, bias, gamma, beta = (x.to(device, torch.float32) for x in leaves.values())
    low = y.bfloat16().requires_grad_()
    h.requires_grad_()
    out, normed = ops.add_norm(h, low, bias, gamma, beta, p, seed)
    exact, exact_normed = ops.add_norm(h, low.float(), bias, gamma, beta, p, seed)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, exact, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(normed.float(), exact_normed, rtol=3e-2, atol=3e-2)
    dh, dlow = torch.autograd.grad(out.sum() + normed.square().sum(), (h, low))
    assert dh.dtype == torch.float32
    assert dlow.dtype == torch.bfloat16
    assert ops.bias_act(low, bias, p, seed, "gelu").dtype == torch.bfloat16


@over_ops
@over_backends(0.0, 0.1)
def test_strided_inputs(backend, device, case, p):
    """Columns of a wider tensor, and gradients with strides of zero."""
    ops = adapter_of(backend, device).rowops
    function = case.by(ops, device, p)
    fixed = case.fixed() if case.op == "embed" else {}
    fixed = {
        k: x.to(device, torch.float32) if k == "pe" else x.to(device) for k, x in fixed.items()
    }

    def compute(prepare: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaves = {k: x.to(device, torch.float32) for k, x in case.leaves().items()}
        leaves = {
            k: (prepare(x) if x.dim() == 2 else x).requires_grad_() for k, x in leaves.items()
        }
        outs = function(**leaves, **fixed)
        outs = outs if isinstance(outs, tuple) else (outs,)
        total = sum(out.sum() for out in outs)
        return [*outs, *torch.autograd.grad(total, tuple(leaves.values()))]

    for x, y in zip(compute(equivalence.strided), compute(torch.clone), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("op", ["embed", "add_norm", "bias_act"])
@over_backends(dropout="shared")
def test_masks_do_not_depend_on_the_number_of_rows(backend, device, op):
    ops = adapter_of(backend, device).rowops
    case = RowCase(op, 40, 24)
    leaves = {k: x.to(device, torch.float32) for k, x in case.leaves().items()}
    if op == "embed":
        leaves |= {k: x.to(device) for k, x in case.fixed().items()}
        leaves["pe"] = leaves["pe"].float()
    function = case.by(ops, device, 0.5)
    per_row = {"h", "y", "u", "ids", "position_ids"}

    def of_first(rows: int) -> Tensor:
        out = function(**{k: x[:rows] if k in per_row else x for k, x in leaves.items()})
        return out[0] if isinstance(out, tuple) else out

    every = of_first(40)
    for rows in (1, 7, 8, 33):
        torch.testing.assert_close(of_first(rows), every[:rows])


@pytest.mark.parametrize("op", ["embed", "add_norm", "bias_act"])
@over_backends(dropout="shared")
def test_dropout_needs_a_seed(backend, device, op):
    ops = adapter_of(backend, device).rowops
    case = RowCase(op, 4, 8)
    function = functools.partial(getattr(ops, op), p=0.1, seed=None)
    with pytest.raises(TypeError, match="seed is None"):
        case.compute(function, device, torch.float32, torch.float32)


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan])
@pytest.mark.parametrize("op", ["embed", "add_norm", "bias_act"])
@over_backends()
def test_no_probability(backend, device, op, p):
    ops = adapter_of(backend, device).rowops
    case = RowCase(op, 4, 8)
    function = functools.partial(getattr(ops, op), p=p, seed=seed_on(device))
    with pytest.raises(ValueError, match="dropout_p"):
        case.compute(function, device, torch.float32, torch.float32)


# -------------------------------------------------------------------------- of the specification


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize(
    "case",
    [
        RowCase("embed", 3, 4),
        RowCase("add_norm", 3, 4),
        RowCase("bias_act", 3, 4),
        RowCase("bias_act", 3, 4, "gelu"),
    ],
    ids=str,
)
def test_gradcheck(case, p):
    function = case.by(specification, "cpu", p)
    fixed = case.fixed() if case.op == "embed" else {}
    names, leaves = zip(*case.leaves().items(), strict=True)

    def of_leaves(*leaves: Tensor) -> Any:
        return function(**dict(zip(names, leaves, strict=True)), **fixed)

    assert torch.autograd.gradcheck(of_leaves, tuple(x.requires_grad_() for x in leaves))


def test_dropped_elements_are_zero_even_if_infinite():
    """The specification selects; it does not multiply by 0."""
    u = torch.full((8, 32), math.inf)
    out = specification.bias_act(u, torch.zeros(32), 0.5, seed_on("cpu"), "relu")
    assert set(out.unique().tolist()) == {0.0, math.inf}


# ------------------------------------------------------------------------- sdpa's dropout of rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_torch_dropout_keeps_and_scales(p, dtype):
    x = torch.ones(512, 301, dtype=dtype)
    out = sdpa.torch_dropout(x, p)
    assert out.dtype == dtype
    kept = out != 0
    t = int(p * 65536 + 0.5)
    assert (out[kept] == torch.tensor(65536 / (65536 - t), dtype=dtype)).all()
    probability = 1 - t / 65536
    deviation = math.sqrt(probability * (1 - probability) / x.numel())
    assert abs(kept.double().mean().item() - probability) < 5 * deviation


def test_torch_dropout_is_independent():
    """Between neighbours, also of the four values that share one draw of 64 bits, and draws."""
    draws = [(sdpa.torch_dropout(torch.ones(64, 4096), 0.5) > 0).double() * 2 - 1 for _ in range(2)]
    flat = draws[0].flatten()
    bound = 5 * math.sqrt(flat.numel())
    for lag in (1, 2, 3, 4, 8, 4096):
        assert abs((flat[lag:] * flat[:-lag]).sum()) < bound
    assert abs((draws[0] * draws[1]).sum()) < bound
    for lane in range(4):
        assert abs(flat[lane::4].sum()) < bound / 2


def test_torch_dropout_follows_torch_s_generator():
    x = torch.randn(33, 65)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(sdpa.torch_dropout(x, 0.5, seed=torch.tensor(9)))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    assert not torch.equal(sdpa.torch_dropout(x, 0.5), sdpa.torch_dropout(x, 0.5))


@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 5), (2, 3, 7)])
@pytest.mark.parametrize("p", [0.3, 1 - 2**-16, 1.0])
def test_torch_dropout_gradient_has_the_mask(shape, p):
    x = (torch.rand(shape) + 1).requires_grad_()
    out = sdpa.torch_dropout(x, p)
    (dx,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(out, x.detach() * dx)
    if p == 1.0:
        assert (out == 0).all()
        assert (dx == 0).all()


def test_torch_dropout_of_zero_is_the_tensor_itself():
    x = torch.randn(3, 4)
    state = torch.get_rng_state()
    assert sdpa.torch_dropout(x, 0.0) is x
    assert torch.equal(torch.get_rng_state(), state)


def test_torch_dropout_leaves_its_input_alone():
    x = torch.randn(3, 4).T
    before = x.clone()
    sdpa.torch_dropout(x, 0.5)
    assert torch.equal(x, before)
