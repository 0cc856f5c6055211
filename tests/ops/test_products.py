"""The CPU's own products beyond what every backend is tested for: shapes, bits, memory, and who
multiplies. T rows.
"""

from __future__ import annotations

import logging
import resource

import pytest
import torch
import torch.nn.functional as F
from fasttx.kernels.cpu import library as kernels
from fasttx.kernels.cpu import linear
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fasttx import TransformerClassifier
from fasttx.errors import ConfigError
from fasttx.ops import products, registry
from fasttx.ops.registry import BACKENDS
from fasttx.testing import dropout_of
from tests.ops.test_cpu import instruction_set, packed, pytestmark, tiny  # noqa: F401

OPS = BACKENDS["cpu"].operations if BACKENDS["cpu"].adapter() and kernels.library_path() else None
# Around the heights of tiles and the widths of panels, one row, blocks of rows, a deep one.
SHAPES = [
    (1, 1, 1), (1, 256, 256), (2, 65, 33), (5, 17, 7), (7, 768, 256), (47, 31, 1024), (49, 32, 512),
    (113, 100, 300), (300, 14, 64), (1030, 40, 24),
]  # fmt: skip


def close(found: Tensor, exact: Tensor, dtype: torch.dtype, depth: int) -> None:
    """Sums of so many products in float32, rounded once to what is stored."""
    unit = torch.finfo(dtype).eps if dtype != torch.float32 else 0.0
    allowed = unit * exact.abs() + 5e-7 * depth**0.5 * exact.square().mean().sqrt() + 1e-6
    assert ((found.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_of_all_shapes(instruction_set, shape, dtype):  # noqa: F811
    """And of a weight that lies transposed, as the gradient of x has it."""
    rows, n, k = shape
    x, g, weight, bias = (
        torch.randn(rows, k).to(dtype), torch.randn(rows, n).to(dtype), torch.randn(n, k),
        torch.randn(n),
    )  # fmt: skip
    rounded = weight.to(dtype).double()
    y, dx = torch.empty(rows, n, dtype=dtype), torch.empty(rows, k, dtype=dtype)
    linear.forward(x, weight, bias, y)
    linear.forward(g, weight.t(), None, dx)
    close(y, x.double() @ rounded.t() + bias, dtype, k)
    close(dx, g.double() @ rounded, dtype, n)
    dweight, dbias = torch.empty(n, k), torch.empty(n)
    linear.backward(g, x, dweight, dbias)
    close(dweight, g.double().t() @ x.double(), torch.float32, rows)
    close(dbias, g.double().sum(0), torch.float32, rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_has_the_same_bits_in_every_batch(instruction_set, dtype):  # noqa: F811
    """Which torch's products do not promise."""
    x, weight, bias = torch.randn(200, 256).to(dtype), torch.randn(96, 256), torch.randn(96)
    whole = OPS.linear(x, weight.to(dtype), bias.to(dtype))
    for first, last in ((0, 1), (3, 5), (7, 40), (100, 200), (151, 200)):
        part = OPS.linear(x[first:last], weight.to(dtype), bias.to(dtype))
        assert torch.equal(part, whole[first:last]), (first, last)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_text_has_the_same_bits_in_every_batch(precision):
    model = tiny().eval()
    lens = [33, 1, 40, 17, 2]
    inputs = packed(*lens)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        whole = model(**inputs)
        for i, ids in enumerate(inputs["input_ids"].split(lens)):
            assert torch.equal(model(ids[None]), whole[i : i + 1])


def test_bits_do_not_depend_on_the_number_of_threads(monkeypatch):
    """Neither those of the products nor those of the gradients."""
    x, weight = torch.randn(500, 256), torch.randn(300, 256)
    bias, down = torch.randn(300), torch.randn(256, 300)
    found = []
    for threads in (1, 2, 3, 4):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias, down)]
        n, up, b, w = leaves
        out = (
            OPS.feed_forward(n, up, b, w, dropout_of(0.1, "cpu"), "gelu")
            + OPS.linear(n, w.T)[:, :1]
        )
        found.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaves)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_stays_where_it_is(dtype):
    """Over 100 numbers of rows; oneDNN keeps something for each."""

    def step(rows: int) -> None:
        x = torch.ones(rows, 512, dtype=dtype, requires_grad=True)
        w = torch.ones(64, 512, dtype=dtype, requires_grad=True)
        OPS.linear(x, w).sum().backward()

    step(3000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for rows in range(1000, 3000, 20):
        step(rows)
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
    )  # KB; oneDNN in bfloat16: 800 MB


def test_infinities_and_nan_stay_in_their_rows():
    x, weight = torch.randn(40, 64), torch.randn(24, 64)
    clean = OPS.linear(x, weight)
    x[3, 5], x[17] = float("nan"), float("inf")
    out = OPS.linear(x, weight)
    touched = torch.zeros(40, dtype=torch.bool)
    touched[[3, 17]] = True
    assert torch.equal(out[~touched], clean[~touched])
    assert not out[touched].isfinite().any()


# ------------------------------------------------------------------------------- who multiplies


@pytest.fixture
def measured(monkeypatch):
    """The measurement anew, and the process as it was afterwards."""
    before = BACKENDS["cpu"].adapter().operations.own_products
    monkeypatch.delenv(products.VARIABLE, raising=False)
    products.measured.cache_clear()
    yield monkeypatch
    products.measured.cache_clear()
    BACKENDS["cpu"].adapter().operations.own_products = before


def test_the_faster_one_is_chosen_and_said_once(measured, caplog):
    caplog.set_level(logging.INFO, "fasttx")
    for others, expected in ((1.0, "own"), (products.ADVANTAGE * 1.01, "torch")):
        products.measured.cache_clear()
        caplog.clear()
        measured.setattr(products, "rates", lambda dtype, others=others: (1.0, others))
        assert products.choices()["float32"] == expected
        products.choices()
        (line,) = [r.getMessage() for r in caplog.records if "products" in r.getMessage()]
        assert f"float32: {expected}" in line


@pytest.mark.parametrize(("used", "times"), [("neon", 2), ("avx512bf16", 2), ("avx2", 1)])
def test_bfloat16_is_measured_where_torch_may_have_it(measured, used, times):
    measured.setattr(products.library, "instruction_set", lambda: used)
    asked = []
    measured.setattr(products, "rates", lambda dtype: asked.append(dtype) or (1.0, 2.0))
    expected = {"float32": "torch", "bfloat16": "torch" if times == 2 else "own"}
    assert products.choices() == expected and len(asked) == times


def test_both_are_measured(measured):
    assert all(rate > 1e8 for rate in products.rates(torch.float32))


@pytest.mark.parametrize("mode", ["meta", "fake", "inference", "autocast"])
def test_it_is_measured_in_every_mode(measured, mode):
    """A model may be built in any of them, and asks then."""
    modes = {
        "meta": lambda: torch.device("meta"),
        "fake": FakeTensorMode,
        "inference": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    }
    with modes[mode]():
        assert all(rate > 1e8 for rate in products.rates(torch.float32))


def test_the_variable_decides(measured):
    for value in ("own", "torch"):
        measured.setenv(products.VARIABLE, value)
        assert products.choices() == {"float32": value, "bfloat16": value}
    measured.setenv(products.VARIABLE, "mkl")
    with pytest.raises(ConfigError, match="FASTTX_PRODUCTS is 'mkl'; expected own, torch, or none"):
        products.choices()


def test_what_is_chosen_multiplies(measured):
    x, weight = torch.randn(64, 256), torch.randn(32, 256)
    for who in ("torch", "own"):
        registry.choose("cpu", dict.fromkeys(products.DTYPES, who))
        described = registry.descriptions("cpu")["cpu"]
        assert {described[f"products {name}"]["path"] for name in products.DTYPES} == {who}
        with torch.profiler.profile() as profile:
            out = OPS.linear(x, weight)
        assert any(e.key == "fasttx_cpu::linear" for e in profile.key_averages()) == (who == "own")
        torch.testing.assert_close(out, F.linear(x, weight), atol=1e-4, rtol=1e-4)


def test_the_loss_curve_is_the_same_whoever_multiplies(measured):
    def curve(who: str) -> list[float]:
        registry.choose("cpu", dict.fromkeys(products.DTYPES, who))
        model: TransformerClassifier = tiny(dropout=0.1).train()
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        losses = []
        for i in range(20):
            loss = F.cross_entropy(
                model(**packed(9, 30, 4), seed=torch.tensor(i)), torch.tensor([0, 1, 0])
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    assert max(abs(a - b) for a, b in zip(curve("own"), curve("torch"), strict=True)) < 1e-4
