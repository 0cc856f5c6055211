"""One training on two backends: the same masks, so the same losses but for rounding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fasttx import TransformerClassifier
from fasttx.ops.dropout import forward_seed
from fasttx.ops.registry import BACKENDS
from fasttx.text.packing import RaggedIds, pack

STEPS = 100


def losses(backend: str) -> list[float]:
    torch.manual_seed(0)
    model = TransformerClassifier(
        vocab_size=200, d_model=64, num_heads=2, num_layers=2, d_ff=128, max_len=64,
        attn_backend=backend,
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    found = []
    for step in range(STEPS):
        labels = torch.randint(0, 2, (8,), generator=generator)
        lengths = torch.randint(1, 65, (8,), generator=generator).tolist()
        # Words of the upper half speak for label 1.
        texts = [
            (torch.randint(2, 120, (n,), generator=generator) + 78 * int(label)).tolist()
            for n, label in zip(lengths, labels, strict=True)
        ]
        seed = torch.tensor(forward_seed(5, step))
        batch = pack(RaggedIds.from_lists(texts))
        loss = F.cross_entropy(model(**batch.model_inputs(), seed=seed), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_a_hundred_steps_are_those_of_the_reference():
    if BACKENDS["cpu"].unavailable_reasons("cpu", torch.float32, 32):
        pytest.skip("backend cpu does not run here")
    expected = losses("reference")
    assert min(expected) < 0.5 * expected[0]  # it learns, with dropout
    assert losses("cpu") == pytest.approx(expected, abs=1e-4)
