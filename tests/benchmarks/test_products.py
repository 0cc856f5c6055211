"""Whose products make the limit: right ones, and the fastest of them. Nothing here takes a time."""

from __future__ import annotations

import limit
import products
import pytest
import torch
from products import Operands, Product
from workload import TINY as CONFIG

from fasttx.ops.registry import BACKENDS

CPU = torch.device("cpu")
SHAPES = products.linear_products(rows=9, inputs=6, outputs=4, backward=True)
over_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@over_dtypes
@pytest.mark.parametrize("product", SHAPES, ids=lambda product: product.layout)
def test_every_library_multiplies(product, dtype):
    known = products.libraries(CPU, dtype)
    assert known
    products.verify(product, Operands([product, Product(3, 5, 20)], CPU, dtype), known)


@over_dtypes
def test_the_kernels_of_the_cpu_take_part(dtype):
    """Whoever multiplies for models."""
    if reasons := BACKENDS["cpu"].unavailable_reasons(CPU, dtype, 32):
        pytest.skip("; ".join(reasons))
    assert "fasttx-cpu" in products.libraries(CPU, dtype)


def test_a_wrong_product_is_not_timed():
    known = {
        "good": products._torch,
        "bad": lambda p, left, right, out: lambda: left @ right * 1.001,
    }
    with pytest.raises(AssertionError, match=r"bad, \(9, 6, 4, 'nt'\): product is .* off"):
        products.verify(SHAPES[0], Operands(SHAPES, CPU, torch.float32), known)


def test_a_library_that_leaves_its_output_alone_is_not_timed():
    def idle(product, left, right, out):
        torch.mm(left, right, out=out)
        kept = out.clone()
        out.fill_(torch.nan)
        return lambda: out if kept.numel() else kept

    with pytest.raises(AssertionError, match="idle, .* not finite"):
        products.verify(SHAPES[0], Operands(SHAPES, CPU, torch.float32), {"idle": idle})


def test_a_variable_that_slows_openblas_down_is_named(monkeypatch, capsys):
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    assert "OpenBLAS" not in products.libraries(CPU, torch.float32)
    said = capsys.readouterr().err
    assert "OPENBLAS_CORETYPE is set" in said or "numpy multiplies with" in said


def test_the_limit_is_that_of_the_fastest(monkeypatch):
    """Of each product, and it is named."""
    known = {"slow": products._torch, "good at dw": products._torch, "good": products._torch}
    rate = {"slow": 1.0, "good at dw": 2.0, "good": 3.0}

    def seconds(product, operands, known, turns):
        dw = product.layout == "tn"
        rates = rate | ({"good at dw": 4.0} if dw else {})
        return {name: product.flops / rates[name] for name in known}

    monkeypatch.setattr(products, "libraries", lambda device, dtype: known)
    monkeypatch.setattr(products, "seconds", seconds)
    work = limit.Work.of_model(CONFIG, [7, 9], backward=True)
    measured = limit.Limit([work], CPU, torch.float32)
    assert measured.fastest == "good 8, good at dw 4"
    total = limit.model_flops(CONFIG, [7, 9], True)  # a third of it y, dx and dw each
    assert measured.seconds(0) == pytest.approx(total * (2 / 3 + 1 / 4) / 3)
