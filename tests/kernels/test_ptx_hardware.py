"""The comparison of the PTX machine with a GPU, with other backends in the GPU's place."""

from __future__ import annotations

import pytest
import torch

from fasttx.ops.reference import ReferenceOperations
from fasttx.ops.registry import BACKENDS
from fasttx.testing.attention import BY_NAME
from tests.ptx import hardware


class Off(ReferenceOperations):
    def _attend(self, *arguments: object) -> torch.Tensor:
        return 1.001 * super()._attend(*arguments)


@pytest.mark.parametrize(
    ("operations", "same", "rounding", "wrong"),
    [
        (BACKENDS["reference"].operations, 1, 0, 0),
        (BACKENDS["sdpa"].operations, 0, 1, 0),
        (Off(), 0, 0, 1),
    ],
    ids=["same bits", "rounding", "wrong"],
)
def test_what_a_comparison_says(operations, same, rounding, wrong):
    work = [(BY_NAME["odd"], 0.0)]
    found = hardware.compare(operations, "cpu", BACKENDS["reference"].operations, work)
    assert (found.same, found.rounding, len(found.wrong)) == (same, rounding, wrong)
    assert f"{same} of 1 cases have the same bits, {rounding} agree to rounding" in str(found)
    assert ("NOT: odd, p=0, out by" in str(found)) == bool(wrong)


def test_there_are_fifty_cases():
    assert len(hardware.WORK) == 50 == len({(str(case), p) for case, p in hardware.WORK})
