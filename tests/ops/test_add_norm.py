"""The residual sum and its LayerNorm of every backend against float64, forward and backward."""

from __future__ import annotations

import pytest
import torch

from fasttx.ops.registry import BACKENDS
from fasttx.testing import RowCase, dropout_of, largest, rows
from tests import backends
from tests.backends import HALVES, check, over_backends

pytestmark = backends.POISONED


@pytest.mark.parametrize("case", rows.ADD_NORM, ids=str)
@over_backends(torch.float32, torch.float64)
def test_values_and_gradients(target, dtype, case):
    check(target, case, dtype, 0.0, 0.1, 0.5)


@pytest.mark.parametrize("case", backends.of_33_rows(rows.ADD_NORM), ids=str)
@over_backends(*HALVES)
def test_half_precision(target, dtype, case):
    check(target, case, dtype, 0.0, 0.1)


@over_backends()
def test_a_dropout_of_one(target):
    """Nothing but the residual stream is left, and nothing is NaN."""
    check(target, rows.ADD_NORM[0], torch.float32, 1.0)


@pytest.mark.parametrize("wanted", [0, 1], ids=["sum", "normed"])
@over_backends(torch.float32, torch.bfloat16)
def test_one_output_is_used(target, dtype, wanted):
    """And the other gets no gradient at all, as the sum after the last block."""
    case, dropout = rows.ADD_NORM[0], dropout_of(0.0, target.device)
    gradients = []
    for wide in (dtype, torch.float64):
        operations = target.operations if wide == dtype else BACKENDS["reference"].operations
        device = target.device if wide == dtype else "cpu"
        leaves = {k: x.to(device, wide).requires_grad_() for k, x in case.leaves(dtype).items()}
        used = [leaves[name] for name in ("h", "y", "bias")]
        out = case.call(operations, leaves, dropout)[wanted]
        gradients.append([x.cpu().double() for x in torch.autograd.grad(out.square().sum(), used)])
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance * max(1, largest(y)))


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck_of_the_specification(p):
    assert backends.gradcheck(RowCase("add_norm", 3, 4), p)
