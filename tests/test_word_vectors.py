"""Word vectors: the counts against counting by hand, the factors against numpy's SVD."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fasttx.config import ConfigError, ModelConfig, TrainConfig
from fasttx.model import TransformerClassifier
from fasttx.packing import RaggedIds
from fasttx.word_vectors import SMOOTHING, WINDOW, cooccurrence, word_vectors

VOCAB = 30


@pytest.fixture
def ids() -> RaggedIds:
    rng = np.random.default_rng(0)
    return RaggedIds.from_lists(
        [rng.integers(0, VOCAB - 1, rng.integers(0, 25)).tolist() for _ in range(200)]
    )


def by_hand(ids: RaggedIds, contexts: int) -> np.ndarray:
    counts = np.zeros((VOCAB, contexts))
    for i in range(len(ids)):
        text = ids[i].tolist()
        for a, word in enumerate(text):
            for b, near in enumerate(text):
                if 0 < abs(a - b) <= WINDOW and 0 < near < contexts:
                    counts[word, near] += (WINDOW + 1 - abs(a - b)) / WINDOW
    return counts


@pytest.mark.parametrize("contexts", [12, VOCAB])
def test_counts(ids: RaggedIds, contexts: int) -> None:
    counts = cooccurrence(ids, VOCAB, contexts)
    np.testing.assert_allclose(counts.numpy(), by_hand(ids, contexts), rtol=1e-5)


def test_vectors_are_the_leading_factors_of_the_ppmi_matrix(ids: RaggedIds) -> None:
    size = 6
    counts = by_hand(ids, VOCAB)
    near = counts.sum(0) ** SMOOTHING
    with np.errstate(divide="ignore", invalid="ignore"):
        ppmi = np.log(counts / (counts.sum(1, keepdims=True) * near / near.sum()))
    ppmi = np.where(counts > 0, np.maximum(ppmi, 0), 0)
    u, s, _ = np.linalg.svd(ppmi)
    vectors = word_vectors(ids, VOCAB, size).double().numpy()
    # Equal up to a rotation's signs and one scale: so all inner products are, up to that scale.
    expected = (u[:, :size] * s[:size]) @ u[:, :size].T
    found = vectors @ vectors.T
    np.testing.assert_allclose(found / np.abs(found).max(), expected / np.abs(expected).max(),
                               atol=1e-4)  # fmt: skip
    seen = counts.sum(1) > 0
    assert np.sqrt((vectors[seen] ** 2).mean()) == pytest.approx(1.0, abs=1e-5)
    assert not vectors[~seen].any(), "the last word never occurs"


def test_nothing_of_torchs_generator_is_used(ids: RaggedIds) -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    one, again = (word_vectors(ids, VOCAB, 8, seed=3) for _ in range(2))
    assert torch.equal(one, again)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("texts", [[], [[]], [[5]], [[2, 3]]])
def test_hardly_any_words(texts: list[list[int]]) -> None:
    vectors = word_vectors(RaggedIds.from_lists(texts), VOCAB, 8)
    assert vectors.shape == (VOCAB, 8)
    assert vectors.isfinite().all()


def test_embeddings_have_the_size_of_random_ones() -> None:
    torch.manual_seed(0)
    model = TransformerClassifier.from_config(ModelConfig(vocab_size=2000, d_model=64, num_heads=2))
    before = model.embedding[1:].std().item()
    vectors = torch.randn(2000, 64)
    model.set_word_vectors(vectors)
    assert model.embedding[1:].std().item() == pytest.approx(before, rel=0.02)
    torch.testing.assert_close(model.embedding[7], vectors[7] * 0.04)
    assert not model.embedding[0].any()


def test_two_beginnings_are_one_too_many() -> None:
    with pytest.raises(ConfigError, match="use one of them"):
        TrainConfig(word_vectors=True, init_from="runs/words")
