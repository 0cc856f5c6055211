"""Linear layers of every backend against float64, forward and backward."""

from __future__ import annotations

import pytest
import torch

from fasttx.testing import RowCase, rows
from tests import backends
from tests.backends import HALVES, check, over_backends

pytestmark = backends.POISONED


@pytest.mark.parametrize("case", rows.LINEAR, ids=str)
@over_backends(torch.float32, torch.float64)
def test_values_and_gradients(target, dtype, case):
    check(target, case, dtype, 0.0)


@pytest.mark.parametrize("case", backends.of_33_rows(rows.LINEAR), ids=str)
@over_backends(*HALVES)
def test_half_precision(target, dtype, case):
    check(target, case, dtype, 0.0)


@over_backends(torch.float32, *HALVES)
def test_without_a_bias(target, dtype):
    x, weight = (torch.randn(n, 24, device=target.device).to(dtype) for n in (33, 17))
    out = target.operations.linear(x, weight)
    expected = target.operations.linear(x, weight, weight.new_zeros(17))
    torch.testing.assert_close(out, expected)


@over_backends(*HALVES)
def test_under_autocast(target, dtype):
    """Products in low precision, gradients in the parameters' own dtype."""
    leaves = rows.LINEAR[0].leaves(torch.float32)
    leaves["bias"] = leaves["bias"].mul(4).round().div(4)  # which a backend need not round
    leaves = {name: x.to(target.device).requires_grad_() for name, x in leaves.items()}
    with torch.autocast(target.device, dtype=dtype):
        out = target.operations.linear(**leaves)
    assert out.dtype == dtype
    low = {name: x.detach().to(dtype) for name, x in leaves.items()}
    torch.testing.assert_close(out, target.operations.linear(**low))
    gradients = torch.autograd.grad(out.float().sum(), tuple(leaves.values()))
    assert {x.dtype for x in gradients} == {torch.float32}


def test_gradcheck_of_the_specification():
    assert backends.gradcheck(RowCase("linear", 3, 4), 0.0)
