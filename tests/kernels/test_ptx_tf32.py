"""TF32, which torch.set_float32_matmul_precision("high") allows: no further off than truncation
explains.

Tensor cores read the upper 19 bits of a float32, so operands are truncated, not rounded. The bound
is plain torch's own error where each product's operands are truncated, in the usual multiple.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fasttx.testing import AttentionCase, dropout_of, measure
from fasttx.testing.checking import SEED
from fasttx.testing.tolerances import Measure
from tests.backends import EVERY
from tests.ptx import machine
from tests.ptx.settings import changed

pytestmark = [
    pytest.mark.skipif(machine.missing() is not None, reason=str(machine.missing())),
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton is not installed"
    ),
]
CASE, P = AttentionCase("tf32", (64, 0, 45, 1), head_dim=32), 0.1


class TruncatedProducts(TorchDispatchMode):
    """Matrix products of float32, those of derivatives too, see 10 bits of each operand's
    fraction."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            args = tuple(truncated(x) for x in args)
        return function(*args, **(kwargs or {}))


def truncated(x: Tensor) -> Tensor:
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


@pytest.fixture
def tf32_allowed() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("tf32_allowed")
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_no_further_off_than_truncated_operands(target):
    exact = CASE.define(torch.float32, torch.float64, P, SEED)
    with TruncatedProducts():
        plain = CASE.define(torch.float32, torch.float32, P, SEED)
    bound = Measure.of(exact, plain, torch.float32, dead=~CASE.live())
    texts: dict[str, str] = {}
    with changed(note=lambda ran: texts.setdefault(ran.kernel, ran.text)):
        found = CASE.run(EVERY[target].operations, "cpu", torch.float32, dropout_of(P, "cpu"))
    assert not bound.compare(target, found).failures
    # It is TF32 that ran: float32's own bound is far below.
    assert len(measure(CASE, torch.float32, P).compare(target, found).failures) == len(found)
    product = "m64n32k8.f32.tf32" if target == "sm_90" else "m16n8k8.row.col.f32.tf32"
    assert product in texts["attention_backward"]
    assert not any("cvt.rna" in text for text in texts.values())
