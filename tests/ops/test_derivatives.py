"""Every kind of derivative that torch can ask for: right, or refused with an error, never left out.

torch takes an operator that it knows no derivative of for a constant, so a 0 would come out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from fasttx.models.linear_cross_entropy import linear_cross_entropy
from fasttx.ops.fused import FusedOperations
from fasttx.ops.registry import BACKENDS
from fasttx.testing import AttentionCase, RowCase, dropout_of
from tests import backends
from tests.backends import TARGETS, Target, over_backends

pytestmark = [
    *backends.POISONED,
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # torch.vmap's fallback
]

Function = Callable[..., Tensor]
ATTENTION = AttentionCase("small", (4, 3), starts=(0, 5), rows=9, heads=1, head_dim=8, causal=True)
ROWS = {
    "embed": RowCase("embed", 5, 8),
    "add_norm": RowCase("add_norm", 5, 8),
    "relu": RowCase("bias_act", 5, 8),
    "gelu": RowCase("bias_act", 5, 8, "gelu"),
    "linear": RowCase("linear", 5, 8),
    "feed_forward": RowCase("feed_forward", 5, 8),
}
OPERATIONS = ("attention", "attention_qkv", *ROWS)
FUSED = [target for target in TARGETS if isinstance(target.operations, FusedOperations)]


def function_of(name: str, operations: Any, device: str) -> Function:
    """Of the tensors that have a derivative, in training; one output."""
    dropout = dropout_of(0.3, device)
    if name == "attention":
        spans = ATTENTION.spans(device)
        return lambda qkv: operations.attention(qkv, spans, dropout, causal=True)
    if name == "attention_qkv":
        spans = ATTENTION.spans(device)
        return lambda *qkv: operations.attention_qkv(*qkv, spans, dropout, causal=True)
    case = ROWS[name]
    names = tuple(case.leaves(torch.float32))
    fixed = {key: x.to(device) for key, x in case.fixed(torch.float32).items()}

    def function(*leaves: Tensor) -> Tensor:
        given = dict(zip(names, leaves, strict=True)) | fixed
        return torch.cat(case.call(operations, given, dropout), -1)

    return function


def inputs_of(name: str, device: str) -> tuple[Tensor, ...]:
    if name.startswith("attention"):
        qkv = ATTENTION.inputs(torch.float32)[0].to(device)
        return (qkv,) if name == "attention" else qkv.unbind(1)
    return tuple(x.to(device) for x in ROWS[name].leaves(torch.float32).values())


def tangents_of(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(x.shape, generator=generator).to(x.device) for x in inputs)


def scalar(function: Function) -> Function:
    return lambda *x: function(*x).sin().sum()


def by_func_jvp(function: Function, inputs: Any, tangents: Any) -> Any:
    return torch.func.jvp(function, inputs, tangents)[1]


def by_dual_level(function: Function, inputs: Any, tangents: Any) -> Any:
    with forward_ad.dual_level():
        duals = map(forward_ad.make_dual, inputs, tangents)
        tangent = forward_ad.unpack_dual(function(*duals)).tangent
        assert tangent is not None, "the derivative was left out"
        return tangent


def by_dual_level_under_grad(function: Function, inputs: Any, tangents: Any) -> Any:
    return by_dual_level(function, [x.clone().requires_grad_() for x in inputs], tangents).detach()


def by_dual_level_in_inference(function: Function, inputs: Any, tangents: Any) -> Any:
    with torch.no_grad():
        return by_dual_level(function, inputs, tangents)


def by_jacfwd(function: Function, inputs: Any, tangents: Any) -> Any:
    return torch.func.jacfwd(function, argnums=tuple(range(len(inputs))))(*inputs)


def by_jacrev(function: Function, inputs: Any, tangents: Any) -> Any:
    return torch.func.jacrev(function, argnums=tuple(range(len(inputs))))(*inputs)


def by_func_grad(function: Function, inputs: Any, tangents: Any) -> Any:
    return torch.func.grad(scalar(function), argnums=tuple(range(len(inputs))))(*inputs)


def by_func_vjp(function: Function, inputs: Any, tangents: Any) -> Any:
    out, pull = torch.func.vjp(function, *inputs)
    return pull(torch.ones_like(out))


def by_hessian(function: Function, inputs: Any, tangents: Any) -> Any:
    return torch.func.hessian(scalar(function))(*inputs)


def by_grad_of_grad(function: Function, inputs: Any, tangents: Any) -> Any:
    inner = torch.func.grad(scalar(function))
    return torch.func.grad(lambda *x: inner(*x).square().sum())(*inputs)


def by_jvp_of_grad(function: Function, inputs: Any, tangents: Any) -> Any:
    return torch.func.jvp(torch.func.grad(scalar(function)), inputs, tangents)[1]


def by_double_backward(function: Function, inputs: Any, tangents: Any) -> Any:
    leaves = [x.clone().requires_grad_() for x in inputs]
    first = torch.autograd.grad(scalar(function)(*leaves), leaves, create_graph=True)
    total = sum(x.square().sum() for x in first)
    return torch.autograd.grad(total, leaves)


def by_vmap(function: Function, inputs: Any, tangents: Any) -> Any:
    return torch.vmap(function)(
        *(torch.stack([x, t]) for x, t in zip(inputs, tangents, strict=True))
    )


def by_vmap_of_grad(function: Function, inputs: Any, tangents: Any) -> Any:
    both = [torch.stack([x, t]) for x, t in zip(inputs, tangents, strict=True)]
    return torch.vmap(torch.func.grad(scalar(function)))(*both)


def by_autograd_jacobian(function: Function, inputs: Any, tangents: Any) -> Any:
    return torch.autograd.functional.jacobian(function, inputs, vectorize=True)


def by_autograd_jacobian_forward(function: Function, inputs: Any, tangents: Any) -> Any:
    return torch.autograd.functional.jacobian(
        function, inputs, vectorize=True, strategy="forward-mode"
    )


KINDS = (
    by_func_jvp, by_dual_level, by_dual_level_under_grad, by_dual_level_in_inference, by_jacfwd,
    by_jacrev, by_func_grad, by_func_vjp, by_hessian, by_grad_of_grad, by_jvp_of_grad,
    by_double_backward, by_vmap, by_vmap_of_grad, by_autograd_jacobian,
    by_autograd_jacobian_forward,
)  # fmt: skip
over_kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__[3:])


def right_or_refused(kind: Any, function: Function, specification: Function, inputs: Any) -> None:
    tangents = tangents_of(inputs)
    try:
        found = kind(function, inputs, tangents)
    except (NotImplementedError, RuntimeError):
        return
    expected = kind(specification, inputs, tangents)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-4)


@over_kinds
@pytest.mark.parametrize("name", OPERATIONS)
@over_backends(dropout="shared")
def test_operations(target: Target, name: str, kind: Any):
    device = target.device
    ours = function_of(name, target.operations, device)
    specified = function_of(name, BACKENDS["reference"].operations, device)
    right_or_refused(kind, ours, specified, inputs_of(name, device))


@over_kinds
def test_linear_cross_entropy(kind):
    labels = torch.tensor([1, 0, 4])
    inputs = torch.randn(3, 6), torch.randn(5, 6), torch.randn(5)

    def function(*x: Tensor) -> Tensor:
        return linear_cross_entropy(*x, labels)[0]

    def specification(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        logits = x @ weight.mT + bias
        return -logits.log_softmax(-1)[torch.arange(3), labels].sum()

    right_or_refused(kind, function, specification, inputs)


@pytest.mark.parametrize("name", OPERATIONS)
@over_backends(dropout="shared")
def test_forward_mode_inside_compiled_code(target: Target, name: str):
    torch._dynamo.reset()
    ours = function_of(name, target.operations, target.device)
    specified = function_of(name, BACKENDS["reference"].operations, target.device)

    def compiled(function: Function, inputs: Any, tangents: Any) -> Any:
        def derive(*x: Tensor) -> Any:
            return torch.func.jvp(function, x[: len(inputs)], x[len(inputs) :])[1]

        run = torch.compile(derive, backend="aot_eager") if function is ours else derive
        return run(*inputs, *tangents)

    right_or_refused(compiled, ours, specified, inputs_of(name, target.device))


@over_backends(dropout="shared")
def test_compiled_once_and_then_called_in_forward_mode(target: Target):
    """What was compiled without is not taken for the answer."""
    torch._dynamo.reset()
    inputs = inputs_of("gelu", target.device)
    ours = function_of("gelu", target.operations, target.device)
    compiled = torch.compile(ours, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), ours(*inputs))
    specified = function_of("gelu", BACKENDS["reference"].operations, target.device)
    for kind in (by_func_jvp, by_dual_level):
        right_or_refused(kind, compiled, specified, inputs)


@pytest.mark.parametrize("target", FUSED, ids=str)
def test_operators_called_by_their_names(target: Target):
    """Without the operations around them."""
    space = getattr(torch.ops, f"fasttx_{target.operations._name}")
    x, bias = torch.randn(5, 8, device=target.device), torch.randn(8, device=target.device)
    calls: tuple[tuple[Function, Tensor], ...] = (
        (lambda u: space.bias_act(u, bias, 0, None, True), x),
        (lambda u: space.bias_act_backward(u, x, bias, None, 0, None, True)[0], x),
        (lambda h: space.add_norm(h, x, bias, bias, bias, 0, None, 1e-5)[1], x),
    )
    for function, given in calls:
        for kind in (by_func_jvp, by_dual_level, by_dual_level_under_grad, by_jacfwd):
            with pytest.raises((NotImplementedError, RuntimeError), match="forward-mode"):
                kind(function, (given,), (torch.ones_like(given),))
