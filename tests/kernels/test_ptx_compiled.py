"""What is compiled ahead of time is what is launched."""

from __future__ import annotations

import importlib.util
import re

import pytest
import torch

from fasttx.testing import AttentionCase, dropout_of
from fasttx.testing.rows import RowCase
from tests.backends import EVERY
from tests.ptx import machine
from tests.ptx.settings import changed

pytestmark = [
    pytest.mark.skipif(machine.missing() is not None, reason=str(machine.missing())),
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton is not installed"
    ),
]


@pytest.mark.parametrize("head_dim", [20, 32])
def test_attention(head_dim):
    """Strides that are no multiples of 16 make other kernels, which read element by element."""
    from fasttx.kernels.triton import aot

    from tests.ptx import driver

    case = AttentionCase("launched", (16, 3), heads=aot.HEADS, head_dim=head_dim)
    ran = {}
    with changed(note=lambda launch: ran.setdefault(launch.kernel, launch.text)):
        case.run(EVERY["sm_80"].operations, "cpu", torch.bfloat16)
    for way in ("forward", "backward"):
        configuration = aot.attention(way, "bf16", head_dim, 16, False, False)
        with driver.active(80):
            ahead = aot.compile_for(configuration, "sm_80").asm["ptx"]
        assert ahead == ran[configuration.kernel]
        assert bool(re.search(r"ld\.global\.v\d", ahead)) == (head_dim == 32)


def test_row_operations():
    from fasttx.kernels.triton import aot

    from tests.ptx import driver

    ran = {}
    with changed(note=lambda launch: ran.setdefault(launch.kernel, launch.text)):
        case = RowCase("bias_act", 9, 20)
        case.run(EVERY["sm_80"].operations, "cpu", torch.bfloat16, dropout_of(0.1, "cpu"))
    for kernel in ("bias_act_forward", "bias_act_backward"):
        configuration = aot.row_operation(kernel, "bf16", 20, True)
        with driver.active(80):
            assert aot.compile_for(configuration, "sm_80").asm["ptx"] == ran[kernel]
