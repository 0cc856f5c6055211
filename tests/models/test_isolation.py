"""One text's NaN and infinities stay in that text: outputs and gradients of the others are the same
bits as without it.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fasttx import TransformerClassifier
from fasttx.models.lstm import LSTMClassifier
from fasttx.testing import AttentionCase, dropout_of
from tests import backends
from tests.backends import over_backends

pytestmark = backends.POISONED

SIZES = {"d_model": 16, "num_heads": 2, "num_layers": 2, "d_ff": 24, "max_len": 12}
# Texts of words 3 to 8; word 9 stands in the third alone.
IDS = torch.tensor([3, 4, 5, 6, 9, 3, 4, 9, 7, 8, 8, 6, 5])
CU_SEQLENS = torch.tensor([0, 3, 4, 8, 8, 13], dtype=torch.int32)
OTHERS = [0, 1, 3, 4]
over_values = pytest.mark.parametrize("value", [math.nan, math.inf])


def learnt(model: Any, device: str, seed: int | None) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of the embedding, by a loss of every text."""
    options = {} if seed is None else {"seed": torch.tensor(seed, device=device)}
    logits = model(IDS.to(device), cu_seqlens=CU_SEQLENS.to(device), **options)
    weights = torch.linspace(-1, 1, logits.numel(), device=device).view_as(logits)
    (gradient,) = torch.autograd.grad((logits * weights).sum(), model.embedding)
    return logits.detach().cpu(), gradient.cpu()


@over_values
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@over_backends(p=(0.0, 0.3))
def test_a_word_of_one_text(target, p, activation, value):
    torch.manual_seed(0)
    settings = {**SIZES, "dropout": p, "activation": activation, "attn_backend": target.name}
    model = TransformerClassifier(20, **settings).train().to(target.device)
    seed = 5 if p else None
    clean, gradient = learnt(model, target.device, seed)
    with torch.no_grad():
        model.embedding[9] = value
    logits, spoilt = learnt(model, target.device, seed)
    assert not logits[2].isfinite().any()
    assert torch.equal(logits[OTHERS], clean[OTHERS])
    # Words 5 to 8 stand in other texts only: 3 and 4 stand in the spoilt one too.
    assert torch.equal(spoilt[5:9], gradient[5:9])
    assert spoilt[:3].isfinite().all()


@over_values
def test_a_word_of_one_text_in_an_lstm(value):
    torch.manual_seed(0)
    model = LSTMClassifier(TransformerClassifier(20, attn_backend="reference", **SIZES).config)
    clean, gradient = learnt(model.train(), "cpu", 5)
    with torch.no_grad():
        model.embedding[9] = value
    logits, spoilt = learnt(model, "cpu", 5)
    assert torch.equal(logits[OTHERS], clean[OTHERS])
    assert torch.equal(spoilt[5:9], gradient[5:9])


@over_values
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@over_backends(p=(0.0, 0.3))
def test_rows_of_one_sequence(target, p, causal, value):
    """Of attention's inputs and of the gradient that comes back; by both entries."""
    case = AttentionCase(
        "gaps", (33, 5, 0, 17), starts=(8, 2, 0, 43), rows=64, head_dim=16, causal=causal
    )
    qkv, grad = (x.to(target.device) for x in case.inputs(torch.float32))
    spoilt_rows = torch.zeros(64, dtype=torch.bool, device=target.device)
    spoilt_rows[8:41] = True
    dropout, spans = dropout_of(p, target.device), case.spans(target.device)
    entries = (
        lambda x: target.operations.attention(x, spans, dropout, causal=causal),
        lambda x: target.operations.attention_qkv(*x.unbind(1), spans, dropout, causal=causal),
    )

    def run(entry: Any, qkv: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        leaf = qkv.clone().requires_grad_()
        out = entry(leaf)
        return out.detach(), torch.autograd.grad(out, leaf, grad)[0]

    for entry in entries:
        clean = run(entry, qkv, grad)
        for of in (slice(0, 1), slice(1, 2), slice(2, 3), slice(None)):  # q, k, v, all
            x, g = qkv.clone(), grad.clone()
            x[8:41, of], g[8:41] = value, value
            for found, expected in zip(run(entry, x, g), clean, strict=True):
                assert torch.equal(found[~spoilt_rows], expected[~spoilt_rows])
