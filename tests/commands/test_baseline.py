"""`fasttx baseline`: the linear models against scikit-learn and papers, and the command itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from fasttx.commands import baseline as baselines
from fasttx.commands import cli
from fasttx.config import TrainConfig
from fasttx.errors import BaselineError
from fasttx.models import bag_of_words
from fasttx.models.bag_of_words import KINDS, NBSVM, NGRAMS, fit, log_count_ratio
from fasttx.text import splits as data

DEMO = ["--dataset", "demo", "--train-samples", "600", "--test-samples", "200", "--seed", "3"]


def texts_and_labels(classes: int, count: int = 120) -> tuple[list[str], np.ndarray]:
    """Each class has a word of its own among others that all classes share."""
    rng = np.random.default_rng(classes)
    labels = np.arange(count) % classes
    shared = [f"w{i}" for i in range(30)]
    return [
        " ".join([*rng.choice(shared, 8), f"own{label}", *rng.choice(shared, 4)])
        for label in labels
    ], labels


def binary_counts(texts: list[str]):
    from sklearn.feature_extraction.text import CountVectorizer

    return CountVectorizer(binary=True).fit_transform(texts)


@pytest.fixture(autouse=True)
def _needs_scikit_learn(request: pytest.FixtureRequest) -> None:
    if "without_scikit_learn" not in request.fixturenames:
        pytest.importorskip("sklearn")


# --- NBSVM ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1.0, 0.1])
def test_log_count_ratio_is_that_of_naive_bayes(alpha: float) -> None:
    from sklearn.naive_bayes import MultinomialNB

    texts, labels = texts_and_labels(2)
    counts = binary_counts(texts)
    negative, positive = MultinomialNB(alpha=alpha).fit(counts, labels).feature_log_prob_
    found = log_count_ratio(counts, labels == 1, alpha)
    np.testing.assert_allclose(found, positive - negative, rtol=0, atol=1e-12)


def test_nbsvm_lies_between_naive_bayes_and_the_svm() -> None:
    """beta = 0 ranks texts as naive Bayes does, beta = 1 is an SVM on scaled counts; and the scores
    of what lies between are their mixture, equation by equation of the paper."""
    from sklearn.naive_bayes import MultinomialNB
    from sklearn.svm import LinearSVC

    texts, labels = texts_and_labels(2)
    counts = binary_counts(texts)
    joint = MultinomialNB().fit(counts, labels).predict_joint_log_proba(counts)
    bayes = NBSVM(beta=0.0, tol=1e-6).fit(counts, labels)
    log_odds = joint[:, 1] - joint[:, 0]  # the prior is even: labels alternate
    slope = (bayes.decision_function(counts) - bayes.intercept_) / log_odds
    np.testing.assert_allclose(slope, slope[0], rtol=1e-9)

    scaled = counts.multiply(log_count_ratio(counts, labels == 1, 1.0)).toarray()
    svm = LinearSVC(C=1.0, dual=False).fit(scaled, labels)
    at_one = NBSVM(beta=1.0, tol=1e-6).fit(counts, labels).decision_function(counts)
    np.testing.assert_allclose(at_one, svm.decision_function(scaled), rtol=0, atol=1e-3)

    mixed = NBSVM(beta=0.25, tol=1e-6).fit(counts, labels).decision_function(counts)
    mixture = 0.75 * bayes.decision_function(counts) + 0.25 * at_one
    np.testing.assert_allclose(mixed, mixture, rtol=0, atol=1e-9)


# --- every kind -----------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("ngrams", NGRAMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_learns_and_its_logits_are_its_predictions(
    kind: str, ngrams: int, classes: int
) -> None:
    from scipy.special import log_softmax

    texts, labels = texts_and_labels(classes)
    fitted = fit(kind, ngrams, texts[:90], labels[:90], num_classes=classes, seed=0)
    logits = fitted.logits(texts[90:])
    assert logits.shape == (30, classes) and np.isfinite(logits).all()
    assert (logits.argmax(1) == labels[90:]).mean() > 0.9
    x = fitted.vectorizer.transform(texts[90:])
    assert max(term.count(" ") + 1 for term in fitted.vectorizer.vocabulary_) == ngrams
    assert fitted.features == x.shape[1]
    if kind != "nbsvm":  # which has no `predict` to compare with
        np.testing.assert_array_equal(logits.argmax(1), fitted.classifier.predict(x))
    if KINDS[kind].probabilistic:
        wanted = fitted.classifier.predict_log_proba(x)
        np.testing.assert_allclose(log_softmax(logits, axis=1), wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_that_no_training_text_has_is_never_predicted(kind: str) -> None:
    texts, labels = texts_and_labels(2)
    fitted = fit(kind, 1, texts, np.where(labels == 1, 2, 0), num_classes=3, seed=0)
    logits = fitted.logits([*texts, "", "nothing known here"])
    assert logits.shape == (122, 3) and (logits[:, 1] < logits[:, [0, 2]].min(1) - 50).all()
    np.testing.assert_array_equal(logits[:120].argmax(1), np.where(labels == 1, 2, 0))


def test_texts_without_words_are_an_error() -> None:
    with pytest.raises(BaselineError, match="the 4 training texts hold no n-gram"):
        fit("nb", 1, ["", "!", "?", "."], np.array([0, 1, 0, 1]), num_classes=2, seed=0)


# --- the command ----------------------------------------------------------------------------------


def run(*arguments: object) -> int:
    return cli.main(["baseline", *map(str, arguments)])


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_from_end_to_end(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(kind, *DEMO, "--out", tmp_path / "a") == 0
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "a" / "results.json").read_text())
    assert found["test_accuracy"] > 0.55
    assert f"accuracy           {found['test_accuracy']:.2%}" in shown
    assert "660 texts, since nothing is chosen with the latter; tested on 200" in shown
    assert ("scores are margins" in shown) == (kind in ("linear-svm", "nbsvm"))
    assert found["log_probabilities"] == (kind in ("nb", "logreg"))
    assert (found["baseline"], found["ngrams"]) == (kind, KINDS[kind].ngrams)
    assert "scikit-learn" in found["versions"] and "Vectorizer(" in found["pipeline"]
    assert found["config"] == {
        "dataset": "demo", "text_column": None, "label_column": None, "train_samples": 600,
        "test_samples": 200, "subset_order": "shuffled", "allow_single_class": False, "seed": 3,
        "split_seed": None,
    }  # fmt: skip
    assert run(kind, *DEMO, "--out", tmp_path / "a") == 2
    assert "exists already and holds manifest.json, results.json" in capsys.readouterr().err
    assert run(kind, *DEMO, "--out", tmp_path / "a" / "results.json") == 2
    assert "is no folder" in capsys.readouterr().err

    assert run(kind, *DEMO, "--json") == 0
    repeated = json.loads(capsys.readouterr().out)
    assert repeated["test"] == found["test"]


def test_the_splits_are_those_of_a_training_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same texts, by their fingerprint; the test texts are measured on and never fitted to."""
    config = TrainConfig(dataset="demo", train_samples=600, test_samples=200, seed=3)
    trained_on = data.load(config)
    fitted_to: list[str] = []

    def spy(kind, ngrams, texts, labels, **settings):
        fitted_to.extend(texts)
        return fit(kind, ngrams, texts, labels, **settings)

    monkeypatch.setattr(bag_of_words, "fit", spy)
    assert run("nb", *DEMO, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["dataset"]["fingerprint"] == trained_on.fingerprint
    assert fitted_to == trained_on.train.texts + trained_on.validation.texts
    assert sum(map(sum, found["confusion_matrix"])) == len(trained_on.test.texts) == 200


def test_triples_hold_words_of_one_letter() -> None:
    texts, labels = ["I don't like it"] * 2 + ["I do like it"] * 2, np.array([0, 0, 1, 1])
    fitted = fit("linear-svm", 3, texts, labels, num_classes=2, seed=0)
    assert {"don t like", "i do like", "t"} <= fitted.vectorizer.vocabulary_.keys()
    assert fitted.logits(["don't like"]).argmax() == 0


def test_all_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("all", *DEMO, "--json", "--out", tmp_path) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["baseline"], row["ngrams"]) for row in rows] == list(baselines.ALL)
    for row in rows:
        folder = tmp_path / f"{row['baseline']}-{row['ngrams']}"
        assert json.loads((folder / "results.json").read_text()) == row
    assert len({row["dataset"]["fingerprint"] for row in rows}) == 1

    assert run("all", *DEMO, "--ngrams", "1") == 0
    shown = capsys.readouterr().out
    assert [line.count("unigrams") for line in shown.splitlines()[-4:]] == [1, 1, 1, 1]
    assert "bigrams" not in shown


@pytest.fixture
def without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)


@pytest.mark.usefixtures("without_scikit_learn")
def test_without_scikit_learn(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("nb", *DEMO) == 2
    shown = capsys.readouterr()
    assert "scikit-learn, which is not installed: pip install 'fasttx[baselines]'" in shown.err
    assert not shown.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--dataset", "demo", "--train-samples", "0"], "train_samples is 0"),
        (["--dataset", "demo", "--train-samples", "9999999"], "train_samples is 9,999,999"),
        (["--dataset", "demo", "--seed", "-1"], "seed is -1"),
    ],
)
def test_bad_settings_are_one_clear_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run("nb", *arguments) == 2
    assert message in capsys.readouterr().err
