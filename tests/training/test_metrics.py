"""The metrics, against scikit-learn, a slow loop, and numbers worked out by hand."""

import json
import math

import numpy as np
import pytest

from fasttx.training.metrics import classification_metrics, format_metrics


def draw(n, classes, seed, *, present=None, scale=3.0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, present or classes, n)
    logits = rng.normal(size=(n, classes)) * scale
    logits[np.arange(n), labels] += 1.0
    return logits, labels


@pytest.mark.parametrize(
    ("n", "classes", "present"), [(1, 2, 1), (500, 2, 2), (300, 5, 5), (200, 7, 3), (40, 1, 1)]
)
@pytest.mark.filterwarnings("ignore:A single label was found")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_agrees_with_scikit_learn(n, classes, present, dtype):
    sk = pytest.importorskip("sklearn.metrics")
    special = pytest.importorskip("scipy.special")
    logits, labels = draw(n, classes, seed=n + classes, present=present)
    logits = logits.astype(dtype)
    got = classification_metrics(logits, labels)

    everything, predicted = list(range(classes)), logits.argmax(1)
    assert got.n == n
    assert got.accuracy == pytest.approx(sk.accuracy_score(labels, predicted), rel=1e-12)
    wanted = sk.confusion_matrix(labels, predicted, labels=everything)
    np.testing.assert_array_equal(got.confusion_matrix, wanted)
    precision, recall, f1, support = sk.precision_recall_fscore_support(
        labels, predicted, labels=everything, zero_division=0
    )
    np.testing.assert_allclose(got.precision, precision, rtol=1e-12)
    np.testing.assert_allclose(got.recall, recall, rtol=1e-12)
    np.testing.assert_allclose(got.f1, f1, rtol=1e-12)
    np.testing.assert_array_equal(got.support, support)
    assert got.macro_f1 == pytest.approx(f1.mean(), rel=1e-12)
    if classes > 1:
        probabilities = special.softmax(logits.astype(np.float64), axis=1)
        loss = sk.log_loss(labels, probabilities, labels=everything)
        assert got.loss == pytest.approx(loss, rel=1e-10)


def slow_calibration_error(logits, labels, bins=15):
    members = [[] for _ in range(bins)]
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        powers = [math.exp(x - max(row)) for x in row]
        probabilities = [p / sum(powers) for p in powers]
        best = row.index(max(row))
        for m in range(bins):
            if m / bins < probabilities[best] <= (m + 1) / bins:
                members[m].append((best == label, probabilities[best]))
    return sum(
        abs(sum(c for c, _ in b) / len(b) - sum(p for _, p in b) / len(b)) * len(b) / len(labels)
        for b in members
        if b
    )


@pytest.mark.parametrize("classes", [2, 3, 20])
@pytest.mark.parametrize("scale", [0.1, 1.0, 6.0])
def test_calibration_error_agrees_with_a_slow_loop(classes, scale):
    logits, labels = draw(400, classes, seed=classes, scale=scale)
    got = classification_metrics(logits, labels).expected_calibration_error
    assert got == pytest.approx(slow_calibration_error(logits, labels), rel=1e-9)


def test_calibration_error_by_hand():
    # Two bins are in use: (9/15, 10/15] and (13/15, 14/15].
    #   confidence .62 and .66, one of them right: |.5 - .64| = .14
    #   confidence .90 four times, all right:      |1. - .90| = .10
    confidences, right = [0.62, 0.66, 0.9, 0.9, 0.9, 0.9], [True, False, True, True, True, True]
    logits = [[math.log(p / (1 - p)), 0.0] for p in confidences]
    labels = [0 if r else 1 for r in right]
    got = classification_metrics(logits, labels)
    assert got.expected_calibration_error == pytest.approx((2 * 0.14 + 4 * 0.10) / 6, rel=1e-12)
    assert got.accuracy == pytest.approx(5 / 6)
    likelihoods = [0.62, 0.34, 0.9, 0.9, 0.9, 0.9]
    assert got.loss == pytest.approx(-sum(map(math.log, likelihoods)) / 6, rel=1e-12)


def test_a_model_that_always_gives_one_answer():
    got = classification_metrics(np.tile([5.0, -5.0, 0.0], (4, 1)), np.array([0, 1, 1, 0]))
    assert got.confusion_matrix.tolist() == [[2, 0, 0], [2, 0, 0], [0, 0, 0]]
    assert got.precision.tolist() == [0.5, 0, 0]
    assert got.recall.tolist() == [1, 0, 0]
    assert got.f1.tolist() == pytest.approx([2 / 3, 0, 0])
    assert got.macro_f1 == pytest.approx(2 / 9)
    assert got.support.tolist() == [2, 2, 0]


@pytest.mark.filterwarnings("error")
def test_large_logits_neither_overflow_nor_lose_the_loss():
    got = classification_metrics(np.array([[1e4, 0.0], [-1e4, 0.0]], np.float32), [0, 0])
    assert got.loss == 5000.0
    assert got.expected_calibration_error == 0.5


def test_equal_logits_predict_the_first_class():
    got = classification_metrics(np.zeros((3, 4)), [0, 1, 3])
    assert got.confusion_matrix[:, 0].tolist() == [1, 1, 0, 1]
    assert got.loss == pytest.approx(math.log(4))


def test_to_dict_is_ready_for_json():
    got = classification_metrics(*draw(50, 3, seed=1)).to_dict()
    assert json.loads(json.dumps(got)) == got
    assert set(got) == {
        "n", "accuracy", "loss", "confusion_matrix", "precision", "recall", "f1", "support",
        "macro_f1", "expected_calibration_error",
    }  # fmt: skip
    assert all(type(x) is int for row in got["confusion_matrix"] for x in row)
    assert all(type(x) is float for x in (got["accuracy"], got["loss"], *got["f1"]))


def test_the_arguments_are_left_as_they_are():
    logits, labels = draw(20, 2, seed=2)
    before = logits.copy(), labels.copy()
    classification_metrics(logits, labels)
    np.testing.assert_array_equal(logits, before[0])
    np.testing.assert_array_equal(labels, before[1])


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((0, 2)), np.zeros(0, int), "nothing to measure"),
        (np.zeros((0, 0)), [], "nothing to measure"),
        (np.zeros((2, 0)), [0, 0], "at least one class"),
        (np.zeros(3), [0, 0, 0], r"shape \(3,\); expected \(texts, classes\)"),
        (np.zeros((3, 2)), [0, 1], r"labels have shape \(2,\); expected \(3,\)"),
        (np.zeros((3, 2)), [0, 1, 2], r"labels\[2\] is 2; expected 0 to 1"),
        (np.zeros((3, 2)), [0, -1, 1], r"labels\[1\] is -1; expected 0 to 1"),
        (np.zeros((2, 2)), [0.0, 1.0], "labels are float64; expected integers"),
        (np.array([[0, np.nan], [0, 1], [np.inf, 0]]), [0, 0, 0], "logits of 2 of 3 texts"),
    ],
)
def test_what_cannot_be_measured_is_refused(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        classification_metrics(logits, labels)


def test_the_text_form():
    logits = [[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 0.0]]
    text = format_metrics(classification_metrics(logits, [0, 0, 1, 1]), ["negative", "positive"])
    assert "accuracy           75.00%" in text
    assert text.endswith(
        """\
confusion matrix (rows: true label, columns: predicted label)
          negative  positive
negative         2         0
positive         1         1

label     precision   recall      F1  texts
negative     66.67%  100.00%  80.00%      2
positive    100.00%   50.00%  66.67%      2"""
    )
    with pytest.raises(ValueError, match="label_names has 3 names; expected 2"):
        format_metrics(classification_metrics(logits, [0, 0, 1, 1]), ["a", "b", "c"])


def test_absent_labels_are_explained():
    """A label without a text counts as 0 in the mean over all labels: it is said, with the mean
    over the others."""
    metrics = classification_metrics(np.eye(3)[[0, 1, 1, 0]], [0, 1, 1, 1])
    assert metrics.macro_f1 == pytest.approx((2 / 3 + 4 / 5) / 3)
    (line,) = (x for x in format_metrics(metrics, "abc").splitlines() if x.startswith("macro"))
    assert line == (
        "macro F1           48.89%  (1 label has no text here and counts as 0; over the other 2 it "
        "is 73.33%)"
    )
    metrics = classification_metrics(np.eye(3)[[0, 1]], [0, 0])
    assert "2 labels have no text here and count as 0; over the other 1" in (
        format_metrics(metrics, "abc")
    )
    every = classification_metrics(np.eye(2)[[0, 1]], [0, 1])
    assert "macro F1           100.00%\n" in format_metrics(every, "ab")


def test_many_labels_do_not_fill_the_screen():
    labels = np.arange(3000) % 1000
    metrics = classification_metrics(np.eye(1000)[labels], labels)
    text = format_metrics(metrics, [f"label {i}\x1b[2J\n" for i in range(1000)])
    assert len(text) < 5000 and "\x1b" not in text and "label 3\\x1b[2J\\n" in text
    assert "confusion matrix of 1,000 labels is not shown" in text
    assert text.endswith("and 960 labels with fewer texts")
