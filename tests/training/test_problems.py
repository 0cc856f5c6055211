"""Losses and metrics of multi-label classification and regression, against other people's code."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from fasttx.config import MULTI_LABEL, PROBLEM_TYPES, REGRESSION, SINGLE_LABEL
from fasttx.errors import NotFiniteError
from fasttx.training.checkpoint import Progress
from fasttx.training.multilabel_metrics import format_multilabel, multilabel_metrics
from fasttx.training.problems import PROBLEMS
from fasttx.training.regression_metrics import format_regression, regression_metrics


def labels_of(problem: str, rng: np.random.Generator, n: int, c: int) -> np.ndarray:
    if problem == SINGLE_LABEL:
        return rng.integers(0, c, n)
    if problem == MULTI_LABEL:
        return (rng.random((n, c)) < 0.4).astype(np.float32)
    return rng.normal(size=(n, c)).astype(np.float32)


@pytest.mark.parametrize("problem", PROBLEM_TYPES)
def test_loss_and_gradients_are_those_of_transformers(problem: str) -> None:
    """Through all weights of a small BERT with the same problem_type."""
    transformers = pytest.importorskip("transformers")
    classes = 1 if problem == REGRESSION else 3
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, num_labels=classes, problem_type=problem,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).double().eval()
    labels = torch.from_numpy(labels_of(problem, np.random.default_rng(0), 5, classes))
    labels = labels if problem == SINGLE_LABEL else labels.double()
    theirs = model(torch.randint(20, (5, 7)), labels=labels)
    theirs.loss.backward(retain_graph=True)
    wanted = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    ours, _ = PROBLEMS[problem].loss(theirs.logits, labels, 0.0)
    (ours / 5).backward()
    assert ours.item() / 5 == pytest.approx(theirs.loss.item(), rel=1e-12)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(grads) == len(wanted) > 5
    for found, expected in zip(grads, wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("seed", range(4))
def test_multi_label_metrics_are_those_of_scikit_learn(seed: int) -> None:
    """Ties included: logits are rounded to halves. Label 2 occurs in no text of the odd seeds."""
    sk = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    n, c = 50, 4
    truth = labels_of(MULTI_LABEL, rng, n, c)
    if seed % 2:
        truth[:, 2] = 0
    logits = np.round(2 * (rng.normal(size=(n, c)) + truth)) / 2
    if seed == 3:
        logits[:, 0] = 0.5  # a constant answer
    found, chosen = multilabel_metrics(logits, truth), logits >= 0
    whole = truth.astype(int)
    each = {"average": None, "zero_division": 0}
    for name, score in (("f1", sk.f1_score), ("precision", sk.precision_score),
                        ("recall", sk.recall_score)):  # fmt: skip
        np.testing.assert_allclose(getattr(found, name), score(whole, chosen, **each), rtol=1e-12)
    assert found.micro_f1 == pytest.approx(sk.f1_score(whole, chosen, average="micro"))
    assert found.macro_f1 == pytest.approx(
        sk.f1_score(whole, chosen, average="macro", zero_division=0)
    )
    assert found.subset_accuracy == pytest.approx(sk.accuracy_score(whole, chosen))
    assert found.label_accuracy == pytest.approx(1 - sk.hamming_loss(whole, chosen))
    there = whole.any(0)
    assert np.isnan(found.average_precision[~there]).all() and there.sum() == 4 - seed % 2
    expected = sk.average_precision_score(whole[:, there], logits[:, there], average=None)
    np.testing.assert_allclose(found.average_precision[there], expected, rtol=1e-12)
    assert found.macro_average_precision == pytest.approx(expected.mean())
    micro = sk.average_precision_score(whole, logits, average="micro")
    assert found.micro_average_precision == pytest.approx(micro)
    p = 1 / (1 + np.exp(-logits))
    assert found.loss == pytest.approx(np.mean([sk.log_loss(whole[:, k], p[:, k], labels=[0, 1])
                                                for k in range(c)]))  # fmt: skip
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["support"] == list(whole.sum(0))
    assert ("-" in format_multilabel(found, list("abcd")).splitlines()[-2]) == bool(seed % 2)


def test_without_any_label_average_precision_is_undefined() -> None:
    found = multilabel_metrics(np.array([[1.0, -1.0]]), np.zeros((1, 2)))
    assert (found.micro_average_precision, found.macro_average_precision) == (None, None)
    assert found.to_dict()["average_precision"] == [None, None]
    assert (found.micro_f1, found.label_accuracy) == (0.0, 0.5)


@pytest.mark.parametrize("seed", range(4))
def test_regression_metrics_are_those_of_scipy_and_scikit_learn(seed: int) -> None:
    stats, sk = pytest.importorskip("scipy.stats"), pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    y = np.round(rng.normal(3, 2, 40), 0 if seed % 2 else 6)  # ties in the odd seeds
    x = np.round(y + rng.normal(0, 1, 40), 0 if seed == 3 else 6)
    found = regression_metrics(x[:, None], y[:, None])
    assert found.loss == pytest.approx(sk.mean_squared_error(y, x))
    assert found.rmse == pytest.approx(sk.root_mean_squared_error(y, x))
    assert found.mean_absolute_error == pytest.approx(sk.mean_absolute_error(y, x))
    assert found.r2 == pytest.approx(sk.r2_score(y, x))
    assert found.pearson == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-12)
    assert found.spearman == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["n"] == 40


@pytest.mark.parametrize("constant", ["predictions", "labels"])
def test_correlations_with_one_number_are_undefined(constant: str) -> None:
    one, several = np.full((5, 1), 2.0), np.arange(5.0)[:, None]
    x, y = (one, several) if constant == "predictions" else (several, one)
    found = regression_metrics(x, y)
    assert (found.pearson, found.spearman) == (None, None)
    assert (found.r2 is None) == (constant == "labels")
    assert math.isfinite(found.rmse)
    assert format_regression(found, ["stars"]).count("  -") == (3 if constant == "labels" else 2)


@pytest.mark.parametrize(
    ("logits", "labels", "said"),
    [
        (np.zeros((2, 3)), np.zeros((2, 2)), "expected that of logits"),
        (np.zeros((1, 2)), np.array([[0.5, 1]]), "other numbers than 0 and 1"),
    ],
)
def test_what_cannot_be_measured(logits, labels, said) -> None:
    with pytest.raises(ValueError, match=said):
        multilabel_metrics(logits, labels)


def test_numbers_that_cannot_be_measured() -> None:
    with pytest.raises(ValueError, match="one number a text"):
        regression_metrics(np.zeros((2, 2)), np.zeros((2, 2)))
    with pytest.raises(ValueError, match="finite"):
        regression_metrics(np.zeros((1, 1)), np.array([[np.nan]]))
    with pytest.raises(NotFiniteError, match="1 of 2 texts"):
        regression_metrics(np.array([[np.inf], [1.0]]), np.zeros((2, 1)))


@pytest.mark.parametrize("problem", PROBLEM_TYPES)
def test_metrics_come_back_from_json(problem: str) -> None:
    rng, kind = np.random.default_rng(0), PROBLEMS[problem]
    c = 1 if problem == REGRESSION else 3
    labels = labels_of(problem, rng, 20, c)
    if problem == MULTI_LABEL:
        labels[:, 1] = 0
    found = kind.metrics(rng.normal(size=(20, c)), labels)
    again = kind.metrics_of(json.loads(json.dumps(found.to_dict())))
    for name, value in vars(found).items():
        np.testing.assert_array_equal(getattr(again, name), value)


def test_the_best_epoch_has_the_best_measure_then_the_lowest_loss() -> None:
    rows = [(0.5, 1.0), (0.75, 2.0), (0.75, 1.5), (0.25, 0.5)]
    for name, more, best in (("micro_f1", True, 2), ("rmse", False, 3), ("accuracy", True, 2)):
        history = [{f"val_{name}": v, "val_loss": loss} for v, loss in rows]
        progress = Progress(history=history, chosen=name, more_is_better=more)
        assert progress.best is history[best]
        assert Progress.of(vars(progress)).best is history[best]


def test_answers() -> None:
    """The numbers of `scores` in words: 0.5 is enough for a label."""
    logits, names = torch.tensor([[0.0, -1.0, 2.0]]), ("a", "b", "c")
    row = PROBLEMS[MULTI_LABEL].scores(logits)[0].tolist()
    found = PROBLEMS[MULTI_LABEL].prediction(names, row)
    assert found.labels == ("a", "c") and found.probabilities["a"] == 0.5
    assert str(found) == "a 50.00%, c 88.08%"
    none = PROBLEMS[MULTI_LABEL].prediction(names, [0.1, 0.2, 0.3])
    assert (none.labels, str(none)) == ((), "(no label)")
    number = PROBLEMS[REGRESSION].prediction(("stars",), [2.5])
    assert (number.value, str(number)) == (2.5, "2.5000")
    one = PROBLEMS[SINGLE_LABEL].prediction(names, [0.2, 0.5, 0.3])
    assert (one.label, one.probability, str(one)) == ("b", 0.5, "b   50.00%")
