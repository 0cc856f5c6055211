"""The whole default model trained on the PTX machine: its losses are those of the reference."""

from __future__ import annotations

import functools
import os

import pytest
import torch
import torch.nn.functional as F

from fasttx import TransformerClassifier
from tests.backends import TRITON, Target

pytestmark = [
    pytest.mark.usefixtures("unlisted_backends"),
    pytest.mark.skipif(
        os.environ.get("FASTTX_PTX") != "all", reason="minutes: FASTTX_PTX=all, or make ptx"
    ),
]
STEPS, LENGTHS = 10, (61, 7, 130, 33)


def curve(backend: str, bf16: bool) -> list[float]:
    """The loss of each step: the default model, dropout 0.1 at every site, AdamW."""
    torch.manual_seed(0)
    model = TransformerClassifier(attn_backend=backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    losses = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(1, 10_000, (sum(LENGTHS),), generator=generator)
        labels = torch.randint(0, 2, (len(LENGTHS),), generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(ids, cu_seqlens=cu_seqlens, seed=torch.tensor(step))
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


reference = functools.cache(functools.partial(curve, "reference"))


def off(losses: list[float]) -> float:
    """The largest difference from the reference's curve in float32."""
    return max(abs(x - y) for x, y in zip(losses, reference(False), strict=True))


@pytest.mark.parametrize("target", TRITON, ids=str)
def test_ten_steps_in_float32(target: Target):
    assert off(curve(target.name, False)) <= 1e-5


@pytest.mark.parametrize("target", TRITON, ids=str)
def test_ten_steps_in_bfloat16(target: Target):
    """No further from float32 than twice what the reference is."""
    assert off(curve(target.name, True)) <= 2 * off(reference(True))
