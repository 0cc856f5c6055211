"""The fitted opinion pool: its weights against scikit-learn, and that they are the best ones."""

from __future__ import annotations

import numpy as np
import pytest

from fasttx.models.pool import Pool
from fasttx.training.metrics import log_softmax


def some_logits(members: int, texts: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Members of different worth and scale, and a class that is rarer than they believe."""
    rng = np.random.default_rng(0)
    labels = rng.choice(classes, texts, p=[0.1, *[0.9 / (classes - 1)] * (classes - 1)])
    truth = np.eye(classes)[labels]
    scales = [1.0, 40.0, 0.02][:members]
    worth = [1.0, 0.5, 2.0][:members]
    return np.stack(
        [s * (w * truth + rng.normal(size=truth.shape)) for s, w in zip(scales, worth, strict=True)]
    ), labels


def test_weights_are_those_of_scikit_learns_logistic_regression() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    logits, labels = some_logits(3, 400, 2)
    pool = Pool.fit(logits, labels)
    odds = logits[:, :, 1] - logits[:, :, 0]
    deviation = np.sqrt((odds**2).mean(1)) / 2
    reference = linear_model.LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000)
    reference.fit((odds / deviation[:, None]).T, labels)
    np.testing.assert_allclose(pool.weights * deviation, reference.coef_[0], rtol=1e-5)
    bias = pool.bias[1] - pool.bias[0]
    np.testing.assert_allclose(bias, reference.intercept_[0], rtol=1e-5)


def test_weights_are_the_best_ones_for_three_classes() -> None:
    logits, labels = some_logits(3, 300, 3)
    pool = Pool.fit(logits, labels)
    centred = logits - logits.mean(2, keepdims=True)
    deviation = np.sqrt((centred**2).mean((1, 2)))

    def cost(weights: np.ndarray, bias: np.ndarray) -> float:
        pooled = log_softmax(np.einsum("m,mnc->nc", weights, logits) + bias)
        likelihood = pooled[np.arange(len(labels)), labels].sum()
        return float(-likelihood + 0.5 * ((weights * deviation) ** 2).sum())

    best = cost(pool.weights, pool.bias)
    for k in range(3):
        for step in (-0.01, 0.01):
            weights, bias = pool.weights.copy(), pool.bias.copy()
            weights[k] += step / deviation[k]
            bias[k] += step
            assert cost(weights, pool.bias) > best
            assert cost(pool.weights, bias) > best
    np.testing.assert_allclose(
        log_softmax(pool(logits)),
        log_softmax(np.einsum("m,mnc->nc", pool.weights, logits) + pool.bias), atol=1e-9,
    )  # fmt: skip


def test_weights_stay_finite_where_all_texts_are_told_apart() -> None:
    labels = np.arange(40) % 2
    logits = 5.0 * np.eye(2)[labels][None]
    pool = Pool.fit(np.concatenate([logits, np.zeros_like(logits)]), labels)
    assert np.isfinite(pool.weights).all()
    assert pool.weights[1] == 0  # who says nothing weighs nothing
    assert (pool(np.concatenate([logits, logits])).argmax(1) == labels).all()
