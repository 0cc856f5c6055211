"""Bias, activation and dropout of every backend against float64, forward and backward."""

from __future__ import annotations

import math

import pytest
import torch

from fasttx.testing import RowCase, dropout_of, rows
from tests import backends
from tests.backends import HALVES, check, over_backends

pytestmark = backends.POISONED


@pytest.mark.parametrize("case", rows.BIAS_ACT, ids=str)
@over_backends(torch.float32, torch.float64)
def test_values_and_gradients(target, dtype, case):
    check(target, case, dtype, 0.0, 0.1, 0.5)


@pytest.mark.parametrize("case", backends.of_33_rows(rows.BIAS_ACT), ids=str)
@over_backends(*HALVES)
def test_half_precision(target, dtype, case):
    check(target, case, dtype, 0.0, 0.1)


@over_backends()
def test_a_dropout_of_one(target):
    """Zeros, and gradients of 0."""
    check(target, rows.BIAS_ACT[0], torch.float32, 1.0)


@over_backends(dropout="shared")
def test_what_is_dropped_is_0_even_if_infinite(target):
    """Dropout selects; it does not multiply by 0."""
    u = torch.full((8, 32), math.inf, device=target.device)
    bias = torch.zeros(32, device=target.device)
    out = target.operations.bias_act(u, bias, dropout_of(0.5, target.device), "relu")
    assert set(out.unique().tolist()) == {0.0, math.inf}


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_gradcheck_of_the_specification(activation, p):
    assert backends.gradcheck(RowCase("bias_act", 3, 4, activation), p)
