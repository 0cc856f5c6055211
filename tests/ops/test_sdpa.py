"""Backend `sdpa` beyond what every backend is tested for: torch's dropout, and its padded path.

T rows, B sequences, H heads, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fasttx.ops import sdpa
from fasttx.ops.contract import Operations
from fasttx.ops.dropout import NO_DROPOUT, Dropout
from fasttx.testing import AttentionCase, dropout_of, measure
from fasttx.testing.attention import EMPTY_CASES, attend
from tests import backends
from tests.backends import over_backends
from tests.ops.test_attention import (
    ODD,
    PACKED_AND_APART,
    call,
    over_cases,
    over_causal,
    over_entries,
)

pytestmark = backends.POISONED

# -------------------------------------------------------------------- dropout of attention weights
# Where v is the identity the output is the dropped weights, and so shows the mask.

IDENTITY = AttentionCase("identity", (33, 64, 0, 17), starts=(70, 3, 0, 110), rows=130, head_dim=64)
P = 0.3


def check_torch_dropout(operations: Operations, packed: bool, device: str, causal: bool) -> None:
    case = replace(IDENTITY, causal=causal)
    qkv, grad = case.inputs(torch.float32)
    for s, n in case.pairs:
        qkv[s : s + n, 2] = torch.eye(n, 64)[:, None]
    dropout, spans = Dropout.of(P, torch.tensor(0)), case.spans(device)
    out, dqkv = backends.run(
        lambda x: call(operations, x, packed, spans, dropout, causal=causal),
        grad.to(device), qkv.to(device),
    )  # fmt: skip
    exact = attend(*qkv.double().unbind(1), case)
    factors, kept, total = [], 0.0, 0
    for s, n in case.pairs:
        weights, dropped = (x[s : s + n].double().transpose(0, 1) for x in (exact, out))
        assert (dropped[..., n:] == 0).all()
        visible = weights[..., :n] > 0
        factor = torch.where(visible, dropped[..., :n] / weights[..., :n], 0.0)
        keep = factor > 0.5 / (1 - P)
        # 2e-5 is how far the quantised keep probability may be from 1 - P
        torch.testing.assert_close(factor, keep.double() / (1 - P), rtol=1e-4, atol=1e-6)
        factors.append(keep.double() / (1 - P))
        kept, total = kept + keep.sum().item(), total + visible.sum().item()
    assert abs(kept / total - (1 - P)) < 5 * math.sqrt(P * (1 - P) / total)
    # The gradients are those of the very mask that the output showed.
    _, dqkv_of_mask = backends.run(
        lambda x: attend(*x.unbind(1), case, factors), grad.double(), qkv.double()
    )
    torch.testing.assert_close(dqkv.double(), dqkv_of_mask, rtol=1e-4, atol=1e-4)


@over_causal
@over_entries
@over_backends(dropout="torch")
def test_torch_dropout(target, packed, causal):
    check_torch_dropout(target.operations, packed, target.device, causal)


@over_backends(dropout="torch")
def test_torch_dropout_in_the_mean(target):
    """Over many draws: unbiased, each weight dropped as often as it should be, all independent."""
    p, draws, device = 0.25, 4000, target.device
    q = torch.zeros(16, draws, 16, device=device)  # all weights 1 / 16, one draw a head
    v = torch.eye(16, device=device)[:, None].expand(16, draws, 16)
    spans = AttentionCase("mean", (16,)).spans(device)
    out = target.operations.attention_qkv(q, q, v, spans, dropout_of(p, device))
    out = out.cpu().double() * 16
    kept = (out > 0).double()
    deviation = math.sqrt(p * (1 - p) / draws)
    assert (kept.mean(1) - (1 - p)).abs().max() < 5 * deviation  # each of the 256 weights
    assert (out.mean(1) - 1).abs().max() < 5 * deviation / (1 - p) + 1e-4
    centred = (kept - kept.mean(1, keepdim=True)).transpose(0, 1).flatten(1)
    correlation = centred.T @ centred / (draws * p * (1 - p))
    correlation.fill_diagonal_(0.0)
    assert correlation.abs().max() < 5.5 / math.sqrt(draws)  # 32640 pairs


@over_backends(dropout="torch")
def test_torch_dropout_follows_torch_s_generator(target):
    dropout, draws = dropout_of(0.5, target.device), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(ODD.run(target.operations, target.device, torch.float32, dropout)["out"])
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


# ------------------------------------------------- sdpa's other path: of GPUs, and when compiling


@pytest.fixture
def sdpa_padded(monkeypatch) -> Operations:
    from fasttx.ops import sdpa

    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(sdpa, "_one_by_one", None)
    return sdpa.adapter.operations


@pytest.fixture
def check_padded(sdpa_padded) -> Callable[..., None]:
    def check(case: AttentionCase, dropout: Dropout = NO_DROPOUT) -> None:
        for packed in PACKED_AND_APART:
            values = case.run(sdpa_padded, "cpu", torch.float32, dropout, packed=packed)
            found = measure(case, torch.float32).compare(f"sdpa padded, {case}", values)
            assert not found.failures

    return check


@over_cases()
def test_sdpa_padded(check_padded, case):
    check_padded(case)


@over_causal
@pytest.mark.parametrize("case", EMPTY_CASES, ids=str)
def test_sdpa_padded_with_nothing_to_attend_to(check_padded, case, causal):
    for p in (0.0, 0.3, 1.0):
        check_padded(replace(case, causal=causal), dropout_of(p, "cpu"))


@over_causal
def test_sdpa_padded_dropout(sdpa_padded, causal):
    check_torch_dropout(sdpa_padded, True, "cpu", causal)


# --------------------------------------------------------------------------------- dropout of rows


def drop(x: Tensor, p: float) -> Tensor:
    return sdpa.adapter.operations.drop(x, dropout_of(p, "cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_dropout_of_rows_keeps_and_scales(p, dtype):
    x = torch.ones(512, 301, dtype=dtype)
    out = drop(x, p)
    assert out.dtype == dtype
    kept = out != 0
    t = int(p * 65536 + 0.5)
    assert (out[kept] == torch.tensor(65536 / (65536 - t), dtype=dtype)).all()
    probability = 1 - t / 65536
    deviation = math.sqrt(probability * (1 - probability) / x.numel())
    assert abs(kept.double().mean().item() - probability) < 5 * deviation


def test_dropout_of_rows_is_independent():
    """Between neighbours, also of the four values that share one draw of 64 bits, and draws."""
    draws = [(drop(torch.ones(64, 4096), 0.5) > 0).double() * 2 - 1 for _ in range(2)]
    flat = draws[0].flatten()
    bound = 5 * math.sqrt(flat.numel())
    for lag in (1, 2, 3, 4, 8, 4096):
        assert abs((flat[lag:] * flat[:-lag]).sum()) < bound
    assert abs((draws[0] * draws[1]).sum()) < bound
    for lane in range(4):
        assert abs(flat[lane::4].sum()) < bound / 2


def test_dropout_of_rows_follows_torch_s_generator():
    x = torch.randn(33, 65)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(drop(x, 0.5))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    assert not torch.equal(drop(x, 0.5), drop(x, 0.5))


@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 5), (2, 3, 7)])
@pytest.mark.parametrize("p", [0.3, 1 - 2**-16, 1.0])
def test_dropout_of_rows_gradient_has_the_mask(shape, p):
    x = (torch.rand(shape) + 1).requires_grad_()
    out = drop(x, p)
    (dx,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(out, x.detach() * dx)
    if p == 1.0:
        assert (out == 0).all()
        assert (dx == 0).all()


def test_dropout_of_rows_of_zero_is_the_tensor_itself():
    x = torch.randn(3, 4)
    state = torch.get_rng_state()
    assert drop(x, 0.0) is x
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_of_rows_leaves_its_input_alone():
    x = torch.randn(3, 4).T
    before = x.clone()
    drop(x, 0.5)
    assert torch.equal(x, before)


def test_relu_with_dropout_has_the_gradient_of_its_mask():
    u, bias = torch.randn(700, 33, requires_grad=True), torch.randn(33, requires_grad=True)
    out = sdpa.adapter.operations.bias_act(u, bias, dropout_of(0.25, "cpu"), "relu")
    du, dbias = torch.autograd.grad(out.sum(), (u, bias))
    kept = out > 0
    torch.testing.assert_close(out[kept], ((u + bias) / 0.75)[kept])
    torch.testing.assert_close(du, kept.float() / 0.75)
    torch.testing.assert_close(dbias, du.sum(0))
    positive = u + bias > 0
    assert abs(kept.sum() / positive.sum() - 0.75) < 0.02
