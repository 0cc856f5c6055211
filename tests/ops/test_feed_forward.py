"""The MLP of every backend against float64, forward and backward."""

from __future__ import annotations

import pytest
import torch

from fasttx.testing import RowCase, dropout_of, rows
from tests import backends
from tests.backends import HALVES, check, over_backends

pytestmark = backends.POISONED


@pytest.mark.parametrize("case", rows.FEED_FORWARD, ids=str)
@over_backends(torch.float32, torch.float64)
def test_values_and_gradients(target, dtype, case):
    check(target, case, dtype, 0.0, 0.1)


@pytest.mark.parametrize("case", backends.of_33_rows(rows.FEED_FORWARD), ids=str)
@over_backends(*HALVES)
def test_half_precision(target, dtype, case):
    check(target, case, dtype, 0.0, 0.1)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@over_backends(torch.float32, *HALVES, dropout="shared")
def test_it_is_its_parts(target, dtype, activation):
    """Under autocast too, where the weights are float32."""
    case = RowCase("feed_forward", 40, 64, activation)
    n, up, bias, down = (x.to(target.device) for x in case.leaves(torch.float32).values())
    bias = bias.mul(4).round().div(4)  # which a backend need not round
    ops, dropout = target.operations, dropout_of(0.3, target.device)
    with torch.autocast(target.device, dtype=dtype, enabled=dtype != torch.float32):
        whole = ops.feed_forward(n, up, bias, down, dropout, activation)
        u = ops.bias_act(ops.linear(n, up), bias, dropout, activation)
        parts = ops.linear(u, down)
    assert whole.dtype == parts.dtype == dtype
    # A part rounds what goes into the activation, the whole does not.
    allowed = 4 * torch.finfo(dtype).eps * parts.abs().max().item()
    torch.testing.assert_close(whole, parts, atol=allowed, rtol=0.0)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_gradcheck_of_the_specification(activation, p):
    assert backends.gradcheck(RowCase("feed_forward", 3, 4, activation), p)
