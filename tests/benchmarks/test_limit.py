"""What the benchmarks count as work: torch's own FLOP counter counts the same."""

from __future__ import annotations

import dataclasses

import limit
import model_peers
import products
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from workload import TINY as CONFIG

CPU = torch.device("cpu")


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("peer", ["padded-sdpa", "nn.TransformerEncoder"])
def test_model_flops_are_torch_s(peer, backward):
    """Of texts of one length, where padded and packed are the same work."""
    config = dataclasses.replace(CONFIG, dropout=0.0)
    model = model_peers.PEERS[peer](config).train()  # in eval mode fused kernels count nothing
    ids = torch.randint(2, config.vocab_size, (3, 13))
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        loss = model(ids).sum()
        if backward:
            loss.backward()
    assert counter.get_total_flops() == limit.model_flops(config, [13] * 3, backward)


@pytest.mark.parametrize("backward", [False, True])
def test_attention_flops_are_torch_s(backward):
    q, k, v = torch.randn(3, 2, 4, 11, 8, requires_grad=True)
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        if backward:
            out.sum().backward()
    assert counter.get_total_flops() == limit.attention_flops([11, 11], 4, 8, backward)


def test_attention_flops_grow_with_the_square_of_each_length():
    one = limit.attention_flops([7], 2, 8, False)
    assert limit.attention_flops([7, 14], 2, 8, False) == 5 * one


def test_attention_bytes_are_those_of_its_tensors():
    qkv = torch.randn(10, 3, 2, 8, dtype=torch.bfloat16)
    out = torch.randn(10, 2, 8, dtype=torch.bfloat16)
    forward = qkv.nbytes + out.nbytes
    assert limit.attention_bytes(10, 2, 8, 2, False) == forward
    backward = forward + out.nbytes + qkv.nbytes  # reads all and the gradient, writes three
    assert limit.attention_bytes(10, 2, 8, 2, True) == forward + backward


def test_the_limit_multiplies_what_it_counts(monkeypatch):
    """Every product, at its shape: torch's counter sees the FLOPs of one block, of two calls each,
    since the first is not timed."""
    monkeypatch.setattr(products, "libraries", lambda *_: {"torch": products._torch})
    work = limit.Work.of_model(CONFIG, [7, 9], backward=True)
    measured = limit.Limit([work], CPU, torch.float32)
    counter = FlopCounterMode(display=False)
    with counter:
        seconds = measured.seconds(0)
    assert counter.get_total_flops() == 2 * limit.product_flops(work.products)
    total = CONFIG.num_layers * limit.product_flops(work.products) + work.flops
    assert total == limit.model_flops(CONFIG, [7, 9], True)
    assert seconds == pytest.approx(total / measured.rates[-1])
