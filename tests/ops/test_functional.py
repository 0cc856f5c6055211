"""fasttx.scaled_dot_product_attention on every backend beside torch's function of that name.

B sequences, H heads, L padded length, D head_dim.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fasttx.errors import BackendUnavailableError, ConfigError
from fasttx.ops import scaled_dot_product_attention
from fasttx.ops.registry import Backend
from fasttx.testing.philox import attention_uniforms, multipliers
from tests import backends
from tests.backends import over_backends

pytestmark = backends.POISONED

over_causal = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


def inputs(device: str = "cpu", batch: int = 3, length: int = 9) -> list[Tensor]:
    return [torch.randn(batch, 2, length, 16, device=device) for _ in range(3)]


PADDINGS = {
    "none": None,
    "full": [[1] * 9] * 3,
    "right": [[1] * 9, [1] * 4 + [0] * 5, [1] + [0] * 8],
    "left": [[1] * 9, [0] * 5 + [1] * 4, [0] * 8 + [1]],
    "both": [[0] * 2 + [1] * 5 + [0] * 2, [0] * 4 + [1] * 5, [1] * 7 + [0] * 2],
    "an empty row": [[1] * 9, [0] * 9, [0] * 3 + [1] * 6],
}


@over_causal
@pytest.mark.parametrize("padding", PADDINGS)
@over_backends()
def test_equals_torch(target, padding, causal):
    device = target.device
    q, k, v = (x.requires_grad_() for x in inputs(device))
    rows = PADDINGS[padding]
    mask = None if rows is None else torch.tensor(rows, device=device)
    real = torch.ones(3, 9, device=device).bool() if mask is None else mask.bool()
    allowed = real[:, None, None, :].expand(3, 2, 9, 9)
    if causal:
        allowed = allowed & torch.ones(9, 9, device=device).bool().tril()
    grad = torch.randn(3, 2, 9, 16, device=device) * real[:, None, :, None]
    # Rows of padding: torch may look at anything there, and is not asked.
    allowed = allowed | ~real[:, None, :, None]
    expected = F.scaled_dot_product_attention(q, k, v, allowed, scale=0.2)
    expected = expected * real[:, None, :, None]
    gradients = torch.autograd.grad(expected, (q, k, v), grad)

    for kind in (torch.bool, torch.int64, torch.float32):
        out = scaled_dot_product_attention(
            q, k, v, None if mask is None else mask.to(kind), is_causal=causal, scale=0.2,
            backend=target.name,
        )  # fmt: skip
        assert out.shape == q.shape
        assert (out.transpose(1, 2)[~real] == 0).all()
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        mine = torch.autograd.grad(out, (q, k, v), grad)
        torch.testing.assert_close(mine, gradients, rtol=1e-4, atol=1e-5)


@over_backends()
def test_dropout_draws_from_torch_s_generator(target):
    q, k, v = inputs(target.device)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(scaled_dot_product_attention(q, k, v, dropout_p=0.5, backend=target.name))
        outs.append(scaled_dot_product_attention(q, k, v, dropout_p=0.5, backend=target.name))
    assert torch.equal(outs[0], outs[2])
    assert torch.equal(outs[1], outs[3])
    assert not torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[4])


@over_backends(dropout="shared")
def test_dropout_is_the_shared_generator_s(target):
    """With the seed it draws; sequence b is row b of the batch."""
    q, k, v = inputs(target.device)
    mask = torch.tensor(PADDINGS["left"])
    torch.manual_seed(5)
    out = scaled_dot_product_attention(
        q, k, v, mask.to(target.device), dropout_p=0.5, backend=target.name
    )
    torch.manual_seed(5)
    seed = torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=target.device)
    factors = multipliers(attention_uniforms(int(seed), 3, 2, 9, 9), 0.5)
    for b, n in enumerate(mask.sum(1).tolist()):
        q_, k_, v_ = (x[b, :, 9 - n :].double().cpu() for x in (q, k, v))
        weights = (q_ @ k_.transpose(1, 2) / 4).softmax(-1) * factors[b, :, :n, :n]
        mine = out[b, :, 9 - n :].double().cpu()
        torch.testing.assert_close(mine, weights @ v_, rtol=1e-5, atol=1e-6)


def test_without_dropout_torch_s_generator_is_left_alone():
    q, k, v = inputs()
    state = torch.get_rng_state()
    scaled_dot_product_attention(q, k, v, backend="reference")
    assert torch.equal(torch.get_rng_state(), state)


@over_backends()
def test_nothing(target):
    for batch, length in ((0, 9), (2, 0), (0, 0)):
        q, k, v = inputs(target.device, batch, length)
        for mask in (None, torch.ones(batch, length, device=target.device)):
            out = scaled_dot_product_attention(q, k, v, mask, backend=target.name)
            assert out.shape == q.shape


@over_backends()
def test_any_strides(target):
    q, k, v = (x.transpose(2, 3) for x in inputs(target.device))
    assert q.shape == (3, 2, 16, 9)
    out = scaled_dot_product_attention(q, k, v, backend=target.name)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("row", [[1, 0] + [1] * 7, [0, 1, 0, 0, 0, 0, 0, 0, 1]])
def test_holes_are_refused(row):
    mask = torch.tensor([[1] * 9, row, [0] * 9])
    with pytest.raises(ValueError, match=r"row 1 has a hole.*together"):
        scaled_dot_product_attention(*inputs(), mask)


def test_wrong_shapes():
    q, k, v = inputs()
    with pytest.raises(ValueError, match=r"\(3, 2, 8, 16\).*expected three equal \(B, H, L, D\)"):
        scaled_dot_product_attention(q, k[:, :, 1:], v)
    with pytest.raises(ValueError, match="expected three equal"):
        scaled_dot_product_attention(q[0], k[0], v[0])
    for shape in ((3, 8), (9,), (3, 1, 1, 9), (9, 3)):
        with pytest.raises(ValueError, match=r"attention_mask has shape .*expected \(3, 9\)"):
            scaled_dot_product_attention(q, k, v, torch.ones(shape))


@pytest.mark.parametrize("p", [-0.5, 1.5, math.nan])
def test_what_is_no_probability(p):
    with pytest.raises(ValueError, match="dropout_p"):
        scaled_dot_product_attention(*inputs(), dropout_p=p)


def test_backends_by_name(monkeypatch):
    with pytest.raises(ConfigError, match=r"unknown attention backend 'fused'.*reference"):
        scaled_dot_product_attention(*inputs(), backend="fused")
    monkeypatch.setattr(Backend, "unavailable_reasons", lambda *args: ["it is broken"])
    with pytest.raises(BackendUnavailableError, match="it is broken"):
        scaled_dot_product_attention(*inputs(), backend="sdpa")
