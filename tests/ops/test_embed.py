"""Embeddings of every backend against float64, forward and backward."""

from __future__ import annotations

import pytest
import torch

from fasttx.ops.dropout import NO_DROPOUT
from fasttx.testing import RowCase, rows
from tests import backends
from tests.backends import HALVES, check, over_backends

pytestmark = backends.POISONED


@pytest.mark.parametrize("case", rows.EMBED, ids=str)
@over_backends(torch.float32, torch.float64)
def test_values_and_gradients(target, dtype, case):
    check(target, case, dtype, 0.0, 0.1, 0.5)


@pytest.mark.parametrize("case", backends.of_33_rows(rows.EMBED), ids=str)
@over_backends(*HALVES)
def test_half_precision(target, dtype, case):
    check(target, case, dtype, 0.0, 0.1)


@over_backends()
def test_a_dropout_of_one(target):
    """Zeros, and gradients of 0."""
    check(target, rows.EMBED[0], torch.float32, 1.0)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
@over_backends()
def test_ids_of_either_integer_type(target, kind):
    case = rows.EMBED[0]
    inputs = {name: x.to(target.device) for name, x in case.leaves(torch.float32).items()}
    inputs |= {name: x.to(target.device) for name, x in case.fixed(torch.float32).items()}
    expected = case.call(target.operations, inputs, NO_DROPOUT)[0]
    inputs |= {name: inputs[name].to(kind) for name in ("ids", "position_ids")}
    assert torch.equal(case.call(target.operations, inputs, NO_DROPOUT)[0], expected)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck_of_the_specification(p):
    assert backends.gradcheck(RowCase("embed", 3, 4), p)
