"""The Metal emulator: what it computes and catches, and that PyTorch's own kernel runs in it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.metal import emulator, prefill
from tests.metal.emulator import FORWARD, REVERSE, SHUFFLED, EmulatorError, ShaderLibrary

pytestmark = pytest.mark.skipif(emulator.MISSING is not None, reason=str(emulator.MISSING))

ORDERS = (FORWARD, REVERSE, SHUFFLED, SHUFFLED + 1)

SUM = """
#include <metal_stdlib>
using namespace metal;
kernel void sum(
    const device float* x [[buffer(0)]], device float* out [[buffer(1)]],
    constant long* size [[buffer(2)]], uint t [[thread_index_in_threadgroup]],
    uint simdgroup_index [[simdgroup_index_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]], uint3 at [[thread_position_in_grid]]) {
  threadgroup float parts[4];
  const float part = simd_sum(int(at.x) < size[0] ? x[at.x] : 0.0f);
  if (lane == 0) parts[simdgroup_index] = part;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  out[at.x] = parts[0] + parts[1] + parts[2] + parts[3];
}
"""


def run_sum(source: str, order: int = FORWARD, **options: object) -> tuple[torch.Tensor, ...]:
    x, out = torch.randn(250), torch.full((256,), torch.nan)
    launch = ShaderLibrary(source).sum
    launch.order = order
    launch(x, out, [250], **{"threads": (256,), "group_size": (128,), **options})
    exact = torch.cat([half.double().sum().repeat(128) for half in x.split(128)])
    return out, exact


@pytest.mark.parametrize("order", ORDERS)
def test_barriers_and_shared_memory(order):
    out, exact = run_sum(SUM, order)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


def test_a_missing_barrier_shows():
    """In an order of the threads in which it matters."""
    broken = SUM.replace("  threadgroup_barrier(mem_flags::mem_threadgroup);\n", "")
    assert broken != SUM
    wrong = 0
    for order in ORDERS:
        out, exact = run_sum(broken, order)
        wrong += not torch.allclose(out.double(), exact, rtol=1e-3, atol=1e-3)
    assert wrong


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("threadgroup_barrier(mem", "if (t < 64) threadgroup_barrier(mem", "deadlock"),
        ("  threadgroup_barrier", "  if (t > 100) return;\n  threadgroup_barrier", "deadlock"),
        (
            "  threadgroup_barrier(mem_flags::mem_threadgroup);",
            """
  if (t < 64) threadgroup_barrier(mem_flags::mem_none);
  else threadgroup_barrier(mem_flags::mem_none);""",
            "different barriers",
        ),
        ("  const float part", "  if (lane == 7) return;\n  const float part", "deadlock"),
        (
            "  if (lane == 0)",
            """
  float y;
  if (lane < 9) y = simd_sum(part);
  else y = simd_max(part);
  if (lane == 0)""",
            "different operations",
        ),
        ("int(at.x) < size[0]", "int(at.x) <= size[0]", "out of bounds"),
        ("x[at.x]", "x[int(at.x) - 1]", "out of bounds"),
        ("out[at.x] =", "out[at.x + 1] =", "out of bounds"),
        ("size[0]", "size[1]", "out of bounds"),
    ],
)
@pytest.mark.parametrize("order", [FORWARD, REVERSE])
def test_what_a_kernel_must_not_do(old, new, complaint, order):
    assert SUM.count(old) >= 1
    with pytest.raises(EmulatorError, match=complaint):
        run_sum(SUM.replace(old, new), order)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"threads": (250,)}, "no whole threadgroups"),
        ({"threads": (0,)}, "no whole threadgroups"),
        ({"group_size": (16,)}, "whole simdgroups"),
        ({"threads": (2048,), "group_size": (2048,)}, "too large"),
    ],
)
def test_what_a_launch_must_not_ask(options, complaint):
    with pytest.raises(EmulatorError, match=complaint):
        run_sum(SUM, **options)


def test_arguments_are_what_the_kernel_declares():
    launch = ShaderLibrary(SUM).sum
    grid = {"threads": (128,), "group_size": (128,)}
    x = torch.zeros(128)
    for arguments, complaint in (
        ((x, x), "has buffers"),
        ((x.double(), x, [128]), "buffer 0 is declared float"),
        ((x, x.half(), [128]), "buffer 1 is declared float"),
        ((x, x, [128.0]), "buffer 2 is declared long"),
    ):
        with pytest.raises(EmulatorError, match=complaint):
            launch(*arguments, **grid)


def test_errors_of_the_compiler_and_of_names():
    with pytest.raises(SyntaxError, match="no_such_function"):
        ShaderLibrary(SUM.replace("simd_sum", "no_such_function"))
    with pytest.raises(SyntaxError, match="ASCII"):
        ShaderLibrary(SUM + "// \N{MICRO SIGN}")
    with pytest.raises(AttributeError, match="no kernel 'mean'"):
        _ = ShaderLibrary(SUM).mean


# ---------------------------------------------------------------------------------- calibration

needs_header = pytest.mark.skipif(
    not prefill.HEADER.exists(), reason=f"torch {torch.__version__} does not bring {prefill.HEADER}"
)


@needs_header
@pytest.mark.parametrize("order", ORDERS)
def test_the_kernel_that_pytorch_ships(order):
    q, k, v = (torch.randn(2, 2, 77, 32) for _ in range(3))
    out = prefill.attention(q, k, v, prefill.source(), order)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), rtol=1e-5, atol=2e-6)


@needs_header
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("((simd_lane_id / 2) % 4)", "((simd_lane_id / 4) % 4)"),
        ("(qid & 2) * 2", "(qid & 2) * 1"),
    ],
)
def test_another_lane_layout_is_wrong(old, new):
    """So the emulator's layout is that of the GPUs on which the kernel is known to work."""
    text = prefill.source()
    assert old in text
    q, k, v = (torch.randn(1, 1, 40, 32) for _ in range(3))
    out = prefill.attention(q, k, v, text.replace(old, new), FORWARD)
    assert not torch.allclose(out, F.scaled_dot_product_attention(q, k, v), atol=1e-2)


def test_the_calibration_runs_where_ci_runs():
    """The pinned torch brings the header; without it the tests above would skip unseen."""
    if torch.__version__.startswith("2.13"):
        assert prefill.HEADER.exists()
