"""The mean over the rows of each text: values, derivatives, memory, and what it may not depend on.

T rows, B texts, d columns.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from fasttx.models import mean_pool as module
from fasttx.models.mean_pool import mean_pool
from tests import backends

pytestmark = backends.POISONED[:1]

BATCHES = {
    "usual": (3, 0, 4, 1),
    "no text": (),
    "no row": (0, 0),
    "one": (5,),
    "one row": (1,),
    "empty ends": (0, 2, 0),
    "long": (70, 1, 33, 64),
}
over_batches = pytest.mark.parametrize("lens", BATCHES.values(), ids=BATCHES.keys())
over_tails = pytest.mark.parametrize("tail", [0, 3])


@pytest.fixture(params=["bags", "gathered"])
def way(request: pytest.FixtureRequest, monkeypatch) -> str:
    """How rows are added up on the CPU and CUDA, and elsewhere: both run here."""
    if request.param == "gathered":
        monkeypatch.setattr(module, "_sum", module._gathered_sum)
        monkeypatch.setattr(module, "POSITIONS", 4)
        monkeypatch.setattr(module, "TEXTS", 3)
    return request.param


def bounds(lens: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lens]).cumsum(0).int()


def rows(lens: tuple[int, ...], tail: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(sum(lens) + tail, 6, generator=generator, dtype=torch.float64).to(dtype)


def by_definition(n: Tensor, lens: tuple[int, ...]) -> Tensor:
    texts = n[: sum(lens)].split(lens) if lens else []
    means = [text.mean(0) if len(text) else text.sum(0) for text in texts]
    return torch.stack(means) if means else n.new_zeros(0, n.shape[1])


@over_tails
@over_batches
def test_values_and_gradients(way, lens, tail):
    n = rows(lens, tail).requires_grad_()
    exact = n.detach().double().requires_grad_()
    pooled, expected = mean_pool(n, bounds(lens)), by_definition(exact, lens)
    torch.testing.assert_close(pooled.double(), expected, rtol=1e-6, atol=1e-6)
    if not lens:
        assert not torch.autograd.grad(pooled.sum(), n)[0].any()
        return
    grad = torch.randn_like(expected)
    (mine,) = torch.autograd.grad(pooled, n, grad.float())
    (theirs,) = torch.autograd.grad(expected, exact, grad)
    torch.testing.assert_close(mine.double(), theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("lens", [(3, 0, 4, 1), (0, 0), (1,), (5,)], ids=str)
def test_derivatives_of_every_kind(way, lens):
    n, cu_seqlens = rows(lens, 1, torch.float64)[:, :2].requires_grad_(), bounds(lens)

    def function(x: Tensor) -> Tensor:
        return mean_pool(x, cu_seqlens).sin()

    assert torch.autograd.gradcheck(function, n, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, n, check_fwd_over_rev=True)


def test_torch_func(way):
    lens = BATCHES["usual"]
    n, cu_seqlens = rows(lens, 1, torch.float64), bounds(lens)
    matrix = torch.func.jacrev(lambda x: mean_pool(x, cu_seqlens))(n)
    torch.testing.assert_close(torch.func.jacfwd(lambda x: mean_pool(x, cu_seqlens))(n), matrix)
    plain = torch.func.jacrev(lambda x: by_definition(x, lens))(n)
    torch.testing.assert_close(matrix, plain)
    many = torch.stack([n, 2 * n, -n])
    expected = torch.stack([mean_pool(x, cu_seqlens) for x in many])
    torch.testing.assert_close(torch.vmap(lambda x: mean_pool(x, cu_seqlens))(many), expected)
    twice = torch.vmap(torch.vmap(lambda x: mean_pool(x, cu_seqlens)))(many[None])
    torch.testing.assert_close(twice, expected[None])
    with pytest.raises(NotImplementedError, match="one packing"):
        torch.vmap(lambda x, at: module.pool(x, at, 4))(many, torch.stack([cu_seqlens] * 3))
    with forward_ad.dual_level():
        out = mean_pool(forward_ad.make_dual(n, many[1]), cu_seqlens)
        tangent = forward_ad.unpack_dual(out).tangent
    torch.testing.assert_close(tangent, mean_pool(many[1], cu_seqlens))


def test_a_text_s_mean_depends_on_no_other_text(way, monkeypatch):
    """Bit for bit, whatever stands beside it, and how long that is."""
    monkeypatch.setattr(module, "TEXTS", 100)
    text = torch.randn(37, 48)
    alone = mean_pool(text, bounds((37,)))
    for before, after in ((1, 0), (0, 300), (8, 1), (3, 500)):
        n = torch.cat([torch.randn(before, 48), text, torch.randn(after, 48)])
        for cut in (bounds((before, 37, after)), bounds((*[1] * before, 37, *[1] * after))):
            pooled = mean_pool(n, cut)
            assert torch.equal(pooled[int((cut == before).nonzero().max())], alone[0])


def test_nan_stays_in_its_text(way):
    lens = BATCHES["long"]
    cu_seqlens, clean = bounds(lens), rows(lens, 2)
    for value in (torch.nan, torch.inf):
        n = clean.clone()
        n[70], n[-1] = value, value  # the text of one row, and the dead tail
        n.requires_grad_()
        pooled = mean_pool(n, cu_seqlens)
        others = torch.tensor([0, 2, 3])
        assert not pooled[1].isfinite().any()
        assert torch.equal(pooled[others], mean_pool(clean, cu_seqlens)[others])
        (gradient,) = torch.autograd.grad(pooled[others].sum(), n)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_are_added_up_in_float32(way, dtype):
    lens = (2000, 3)
    n = rows(lens, 1, dtype) + 1
    expected = by_definition(n.double(), lens).to(dtype)
    assert torch.equal(mean_pool(n, bounds(lens)), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mean_pool(n, bounds(lens)), expected)
        assert mean_pool(n.float(), bounds(lens)).dtype == torch.float32


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("lens", [(1,) * 4096, (4096,), (1,) * 3996 + (100,)], ids=len)
def test_memory_is_linear_in_rows(way, lens, monkeypatch):
    """A matrix with an element for each text and row would have 16 million."""
    monkeypatch.setattr(module, "TEXTS", 1024)
    monkeypatch.setattr(module, "POSITIONS", 32)
    n, cu_seqlens = torch.randn(4096, 4, requires_grad=True), bounds(lens)
    with Largest() as largest:
        mean_pool(n, cu_seqlens, max(lens)).sum().backward()
    assert largest.elements <= 8 * n.numel()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic: bool):
    torch._dynamo.reset()
    compiled = torch.compile(module.pool, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for lens in (BATCHES["usual"], BATCHES["long"], BATCHES["one"]):
        n, cu_seqlens = rows(lens, 2).requires_grad_(), bounds(lens)
        out, expected = compiled(n, cu_seqlens, 70), mean_pool(n, cu_seqlens)
        torch.testing.assert_close(out, expected)
        gradients = (torch.autograd.grad(x.sin().sum(), n) for x in (out, expected))
        torch.testing.assert_close(*gradients)


def test_wrong_bounds_are_refused():
    n = torch.randn(4, 3)
    wrong: list[tuple[Any, type[Exception], str]] = [
        (torch.tensor([1, 4]), ValueError, "cu_seqlens begins with 1; expected 0"),
        (torch.tensor([0, 5]), ValueError, "rows 0 to 5"),
        (torch.tensor([0, 3, 2]), ValueError, "length -1"),
        (torch.tensor([0.0, 4.0]), TypeError, "cu_seqlens is torch.float32"),
        ([0, 4], TypeError, "cu_seqlens is a list"),
    ]
    for cu_seqlens, error, message in wrong:
        with pytest.raises(error, match=message):
            mean_pool(n, cu_seqlens)
    with pytest.raises(ValueError, match="max_seqlen is 3"):
        mean_pool(n, torch.tensor([0, 4]), 3)
