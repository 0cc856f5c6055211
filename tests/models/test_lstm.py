"""The LSTM: what it computes, and how large it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fasttx.config import RECIPES, ModelConfig
from fasttx.models.classifier import TransformerClassifier
from fasttx.models.lstm import LSTMClassifier
from fasttx.ops.dropout import keep_scale, row_keep, site_seeds, threshold

CONFIG = ModelConfig(
    vocab_size=50, num_classes=3, d_model=16, num_heads=2, num_layers=1, d_ff=32, dropout=0.3
)
LENGTHS = (5, 0, 9, 1, 9)


def packed(dead_tail: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (T,) and cu_seqlens of texts of LENGTHS, one of them empty and two equally long."""
    ids = torch.randint(2, 50, (sum(LENGTHS) + dead_tail,))
    return ids, torch.tensor([0, *LENGTHS]).cumsum(0).int()


def bidirectional(model: LSTMClassifier) -> torch.nn.LSTM:
    """Torch's own LSTM in both directions, with the weights of `model`."""
    lstm = torch.nn.LSTM(CONFIG.d_model, model.hidden_size, bidirectional=True)
    weights = dict(model.onward.named_parameters())
    weights |= {f"{name}_reverse": w for name, w in model.from_end.named_parameters()}
    for name, weight in weights.items():
        delattr(lstm, name)
        setattr(lstm, name, weight)
    return lstm


def by_torch(
    model: LSTMClassifier, ids: torch.Tensor, cu_seqlens: torch.Tensor, p: float = 0.0,
    seed: int = 0,
) -> torch.Tensor:  # fmt: skip
    """Logits from torch's bidirectional LSTM on each text by itself, an ordinary (L, 1, d) tensor,
    with the shared dropout masks of `seed` around it."""
    seeds, t, lstm = site_seeds(torch.tensor(seed), 2), threshold(p), bidirectional(model)

    def drop(x: torch.Tensor, site: int) -> torch.Tensor:
        return x * row_keep(seeds[site], *x.shape, t) * keep_scale(t)

    words = drop(model.embedding[ids], 0)[: cu_seqlens[-1]]
    pooled = [
        lstm(text[:, None])[0].mean((0, 1)) if len(text) else text.new_zeros(24)
        for text in words.split(cu_seqlens.diff().tolist())
    ]
    return model.classify(drop(torch.stack(pooled), 1))


@pytest.mark.parametrize("dead_tail", [0, 7])
def test_packed_equals_one_by_one(dead_tail: int) -> None:
    model = LSTMClassifier(CONFIG).eval()
    ids, cu_seqlens = packed(dead_tail)
    logits = model(ids, cu_seqlens=cu_seqlens)
    assert logits.shape == (len(LENGTHS), 3)
    torch.testing.assert_close(logits, by_torch(model, ids, cu_seqlens))
    roomy = model(ids, cu_seqlens=cu_seqlens, max_seqlen=20)  # any upper bound will do
    torch.testing.assert_close(roomy, logits)


def test_gradients_equal_those_of_one_by_one() -> None:
    model = LSTMClassifier(CONFIG).double().eval()
    ids, cu_seqlens = packed(dead_tail=3)
    weights = list(model.parameters())
    mine = torch.autograd.grad(model(ids, cu_seqlens=cu_seqlens).square().sum(), weights)
    theirs = torch.autograd.grad(by_torch(model, ids, cu_seqlens).square().sum(), weights)
    torch.testing.assert_close(mine, theirs)


def test_texts_without_a_word() -> None:
    model = LSTMClassifier(CONFIG).eval()
    logits = model(torch.zeros(0, dtype=torch.int64), cu_seqlens=torch.zeros(3, dtype=torch.int32))
    torch.testing.assert_close(logits, model.classify.bias.expand(2, 3))


def test_dropout_is_a_function_of_the_seed() -> None:
    model = LSTMClassifier(CONFIG).train()
    ids, cu_seqlens = packed()
    one, two = (model(ids, cu_seqlens=cu_seqlens, seed=torch.tensor(seed)) for seed in (1, 2))
    torch.testing.assert_close(one, by_torch(model, ids, cu_seqlens, CONFIG.dropout, seed=1))
    assert not torch.equal(one, two)
    with pytest.raises(TypeError, match="dropout needs a"):
        model(ids, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_is_as_large_as_the_transformer(recipe: str) -> None:
    config = replace(RECIPES[recipe].model, attn_backend="reference")
    lstm, transformer = (
        sum(p.numel() for p in build(config).parameters())
        for build in (LSTMClassifier, TransformerClassifier.from_config)
    )
    assert abs(lstm - transformer) < 0.05 * transformer
    if recipe == "full":
        assert lstm == 5_798_562  # as docs/accuracy.md says
