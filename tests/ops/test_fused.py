"""What `fasttx.ops.fused` makes of kernels, for each backend that has them and runs here: operators
that keep torch's rules, and derivatives that are right or refused.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fasttx.ops.fused import FusedOperations
from fasttx.testing import AttentionCase, Case, RowCase, dropout_of
from tests import backends
from tests.backends import TARGETS, Target, over_backends

pytestmark = backends.POISONED

FUSED = [target for target in TARGETS if isinstance(target.operations, FusedOperations)]
over_fused = pytest.mark.parametrize("target", FUSED, ids=str)


def operators(target: Target) -> list[str]:
    names = ["attention", "attention_qkv", "embed", "add_norm", "bias_act"]
    if target.operations._launch.linear is not None:
        names += ["linear", "feed_forward"]
    return [f"{name}{direction}" for name in names for direction in ("", "_backward")]


SEED = 0x1234567_89ABCDEF
ATTENTION = AttentionCase("small", (5, 3), starts=(0, 6), rows=9, head_dim=8, causal=True)
ROW_CASES = [
    RowCase("embed", 5, 12),
    RowCase("add_norm", 5, 12),
    RowCase("bias_act", 5, 12),
    RowCase("bias_act", 5, 12, "gelu"),
    RowCase("feed_forward", 5, 12),
]


# --------------------------------------------------------------------------------------- operators


def operator_calls(device: str, dtype: torch.dtype) -> list[tuple[str, tuple[Any, ...]]]:
    """(operator, arguments) of each, with and without dropout; dtype: of what linear layers give
    and take."""

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    def leaf(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return draw(*shape, dtype=dtype).requires_grad_()

    float32 = torch.float32
    starts, lens, _ = ATTENTION.spans(device)
    ids = torch.tensor([1, 4, 1], device=device)
    places = torch.arange(3, dtype=torch.int32, device=device)
    calls: list[tuple[str, tuple[Any, ...]]] = []
    for drop in ((0, None), (6554, torch.tensor(SEED, device=device))):
        options = (starts, lens, 5, *drop, True, 0.3)
        out, q, k, v = draw(4, 9, 2, 8).unbind()
        lse, qkv = draw(2, 9, dtype=float32), torch.stack((q, k, v), 1)
        calls += [
            ("attention", (leaf(9, 3, 2, 8), *options)),
            ("attention_qkv", (leaf(9, 2, 8), leaf(9, 2, 8), leaf(9, 2, 8), *options)),
            ("attention_backward", (out, qkv, out, lse, *options)),
            ("attention_qkv_backward", (out, q, k, v, out, lse, *options)),
        ]
        bias, gamma, beta = (leaf(12, dtype=float32) for _ in range(3))
        h, x, moments = draw(5, 12, dtype=float32), draw(5, 12), draw(2, 5, dtype=float32)
        calls += [
            ("add_norm", (leaf(5, 12, dtype=float32), leaf(5, 12), bias, gamma, beta, *drop, 1e-5)),
            ("add_norm_backward", (h, x, h, gamma.detach(), moments, float32, *drop)),
            ("add_norm_backward", (None, x, h, gamma.detach(), moments, float32, *drop)),
            ("bias_act", (leaf(5, 12), bias, *drop, False)),
            ("bias_act", (leaf(5, 12), bias, *drop, True)),
            ("bias_act_backward", (x, x, bias.detach(), None, *drop, True)),
            ("bias_act_backward", (x, None, None, x, *drop, False)),
        ]
        table, dout = leaf(6, 12, dtype=float32), draw(3, 12, dtype=float32)
        positions = draw(4, 12, dtype=float32)
        calls += [
            ("embed", (ids, places, table, positions, *drop, 3.0)),
            ("embed_backward", (dout, ids, 6, float32, *drop, 3.0)),
        ]
        up, bias, down = (leaf(*shape, dtype=float32) for shape in ((8, 12), (8,), (12, 8)))
        weights = up.detach(), down.detach()
        calls += [
            ("feed_forward", (leaf(5, 12), up, bias, down, *drop, False)),
            ("feed_forward", (leaf(5, 12), up, bias, down, *drop, True)),
        ]
        # before, and what is wanted of n, up and down
        relu, gelu = (draw(0, 8), *drop, False), (draw(5, 8), *drop, True)
        calls += [
            ("feed_forward_backward", (x, x, *weights, draw(5, 8), *options, *wants))
            for options in (relu, gelu)
            for wants in ((True, True, True), (True, False, False), (False, False, True))
        ]
    x, weight = leaf(5, 12), leaf(7, 12, dtype=float32)
    calls += [
        ("linear", (x, weight, leaf(7, dtype=float32))),
        ("linear", (x, weight, None)),
        ("linear_backward", (draw(5, 7), x.detach(), True)),
        ("linear_backward", (draw(5, 7), x.detach(), False)),
    ]
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("target", "name"), [(target, name) for target in FUSED for name in operators(target)], ids=str
)
def test_operators_keep_torch_s_rules(target, dtype, name):
    """Schemas, shapes without data, autograd's registration, tracing."""
    operator = getattr(getattr(torch.ops, f"fasttx_{target.name}"), name)
    for called, arguments in operator_calls(target.device, dtype):
        if called == name:
            torch.library.opcheck(operator, arguments)


@over_fused
def test_every_operator_is_checked(target):
    space = f"fasttx_{target.name}::"
    names = torch._C._dispatch_get_all_op_names()
    defined = {x.removeprefix(space) for x in names if x.startswith(space)}
    assert defined == set(operators(target))
    assert {name for name, _ in operator_calls(target.device, torch.float32)} >= defined


# ------------------------------------------------------------------------------------- derivatives


def call(case: Case, target: Target, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The outputs of a case for the inputs that have a gradient."""
    device, dropout = target.device, dropout_of(0.3, target.device)
    if isinstance(case, AttentionCase):
        return (target.operations.attention(*inputs, case.spans(device), dropout, causal=True),)
    names = case.leaves()
    fixed = {name: x.to(device) for name, x in case.fixed(torch.float32).items()}
    return case.call(target.operations, dict(zip(names, inputs, strict=True)) | fixed, dropout)


def inputs_of(case: Case, device: str) -> list[Tensor]:
    if isinstance(case, AttentionCase):
        return [case.inputs(torch.float32)[0].to(device)]
    return [x.to(device) for x in case.leaves(torch.float32).values()]


@pytest.mark.parametrize("case", [ATTENTION, *ROW_CASES], ids=str)
@over_fused
def test_a_second_derivative_is_refused(target, case):
    """And not left out with a warning. The first one stands."""
    leaves = [x.requires_grad_() for x in inputs_of(case, target.device)]
    loss = sum(x.square().sum() for x in call(case, target, *leaves))
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    assert all(x.isfinite().all() for x in first)
    with pytest.raises(NotImplementedError, match="second derivative.*reference"):
        sum(x.square().sum() for x in first).backward()


@pytest.mark.parametrize("case", [*ROW_CASES, RowCase("linear", 5, 12)], ids=str)
@over_fused
def test_frozen_inputs_change_no_other_gradient(target, case):
    """Of a part of the inputs the same bits come as of all."""
    inputs = inputs_of(case, target.device)
    leaves = [x.clone().requires_grad_() for x in inputs]
    full = torch.autograd.grad(sum(x.square().sum() for x in call(case, target, *leaves)), leaves)
    for i, expected in enumerate(full):
        mixed = [x.clone().requires_grad_(i == j) for j, x in enumerate(inputs)]
        loss = sum(x.square().sum() for x in call(case, target, *mixed))
        (found,) = torch.autograd.grad(loss, mixed[i])
        if case.op == "linear" and i == 2:  # torch sums it where the kernel is not needed
            torch.testing.assert_close(found, expected)
        else:
            assert torch.equal(found, expected), f"input {i}"


@over_fused
def test_what_is_frozen_costs_no_product(target, monkeypatch):
    """Only products that a wanted gradient needs: of the MLP's five, and of the linear layer's."""
    if target.operations._launch.linear is None:
        pytest.skip("torch multiplies")
    from fasttx.kernels.cpu import linear

    done: list[str] = []
    for name in ("multiply", "backward"):
        launch = getattr(linear, name)

        def counted(*args: Any, launch: Any = launch, name: str = name, **rest: Any) -> None:
            done.append(name)
            launch(*args, **rest)

        monkeypatch.setattr(linear, name, counted)

    def products(case: RowCase, *wanted: int) -> list[str]:
        inputs = inputs_of(case, target.device)
        for i in wanted:
            inputs[i].requires_grad_()
        (out,) = call(case, target, *inputs)
        done.clear()
        out.sum().backward()
        return sorted(done)

    n, up, bias, down = range(4)
    mlp = RowCase("feed_forward", 5, 12)
    assert products(mlp, n, up, bias, down) == ["backward"] * 2 + ["multiply"] * 2
    assert products(mlp, n) == ["multiply"] * 2
    assert products(mlp, down) == ["backward"]
    assert products(mlp, up, bias) == products(mlp, bias) == ["backward", "multiply"]
    x, weight, bias = range(3)
    assert products(RowCase("linear", 5, 12), x) == ["multiply"]
    assert products(RowCase("linear", 5, 12), weight, bias) == ["backward"]
    assert products(RowCase("linear", 5, 12), bias) == []


@pytest.mark.parametrize("case", ROW_CASES, ids=str)
@over_backends(dropout="shared")
def test_forward_mode_derivatives_of_rows_are_right_or_refused(target, case):
    """Never left out: torch takes what it does not know for a constant."""
    inputs = inputs_of(case, target.device)
    generator = torch.Generator().manual_seed(3)
    tangents = [torch.randn(x.shape, generator=generator).to(target.device) for x in inputs]

    def derive() -> tuple[Tensor, ...]:
        function = lambda *x: call(case, target, *x)  # noqa: E731
        return torch.func.jvp(function, tuple(inputs), tuple(tangents))[1]

    if target in FUSED:
        with pytest.raises(NotImplementedError, match="no forward-mode derivatives.*reference"):
            derive()
        return
    step = 1e-3
    ahead, behind = (
        call(case, target, *(x + s * t for x, t in zip(inputs, tangents, strict=True)))
        for s in (step, -step)
    )
    for found, a, b in zip(derive(), ahead, behind, strict=True):
        torch.testing.assert_close(found, (a - b) / (2 * step), rtol=2e-2, atol=2e-2)


@over_fused
def test_projections_of_two_dtypes(target):
    """Computed in float32, and rounded to that of q."""
    q, k, v = torch.randn(3, 9, 2, 16, device=target.device)
    spans, low = AttentionCase("one", (9,)).spans(target.device), q.half()
    out = target.operations.attention_qkv(low, k, v, spans)
    assert out.dtype == torch.float16
    assert torch.equal(out, target.operations.attention_qkv(low.float(), k, v, spans).half())
