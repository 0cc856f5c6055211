"""Kernels that we did not design run rightly on the PTX machine, under several schedules."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from tests.ptx import machine
from tests.ptx.settings import changed

pytestmark = [
    pytest.mark.skipif(machine.missing() is not None, reason=str(machine.missing())),
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton is not installed"
    ),
]
over_targets = pytest.mark.parametrize("capability", [80, 90])
SEEDS = (0, 1, 2)


@over_targets
def test_softmax(capability):
    from tests.ptx import anchors, driver

    x = torch.randn(7, 781)
    for seed in SEEDS:
        out = torch.full_like(x, torch.nan)
        with driver.active(capability), changed(seed=seed):
            anchors.softmax[(7,)](x, out, x.stride(0), x.shape[1], COLUMNS=1024)
        torch.testing.assert_close(out, x.softmax(1))


@over_targets
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_matrix_multiplication(capability, dtype):
    """With three stages of copies under way; bits are the same under every schedule."""
    from tests.ptx import anchors, driver

    m, n, k = 112, 160, 80  # multiples of 16, as a tutorial's are, so that the loop is pipelined
    a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    sizes = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "GROUP": 2}
    found, ran = [], []
    for seed in SEEDS:
        c = torch.full((m, n), torch.nan, dtype=dtype)
        with driver.active(capability), changed(seed=seed, note=ran.append):
            anchors.matmul[(6,)](a, b, c, m, n, k, k, n, n, **sizes, num_stages=3)
        found.append(c)
    exact = a.double() @ b.double()
    torch.testing.assert_close(found[0].double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-3)
    assert all(torch.equal(found[0], other) for other in found[1:])
    text = ran[0].text
    assert "cp.async" in text and ("wgmma.mma_async" if capability == 90 else "mma.sync") in text


@over_targets
def test_fused_attention(capability):
    from tests.ptx import anchors, driver

    q, k, v = (torch.randn(1, 2, 100, 32).half() for _ in range(3))
    for seed in SEEDS[:2]:
        out = torch.full_like(q, torch.nan)
        with driver.active(capability), changed(seed=seed):
            anchors.attention[(2, 2)](q, k, v, out, 100, 32**-0.5, BLOCK_M=64, BLOCK_N=32, D=32)
        exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
        torch.testing.assert_close(out.double(), exact, rtol=2e-3, atol=2e-3)
