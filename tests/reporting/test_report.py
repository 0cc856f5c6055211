"""`fasttx report` and `fasttx explain`: the numbers, the sentences, and pages of hostile texts."""

from __future__ import annotations

import csv
import itertools
import json
import random
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

import fasttx
from fasttx.commands import cli
from fasttx.config import ModelConfig, TrainConfig
from fasttx.errors import CheckpointError
from fasttx.models.classifier import TransformerClassifier
from fasttx.reporting import attributions, explain, findings, html_report, page, plots
from fasttx.reporting import finished as finished_run
from fasttx.reporting.escaping import escaped, printable
from fasttx.reporting.finished import open_run
from fasttx.tasks import TASKS, read_config
from fasttx.terminal import one_line
from fasttx.text import splits as data
from fasttx.text.packing import pack
from fasttx.text.tokenizer import UNK_ID
from fasttx.training import run as runs
from fasttx.training.distributed import Processes
from fasttx.training.folder import RunFolder
from fasttx.training.metrics import classification_metrics
from fasttx.training.predictions import Predictions
from fasttx.training.results import time_to_accuracy

# A script, a stylesheet's end, matplotlib's mathematics, a terminal's escape, right to left.
OLD = Path(__file__).resolve().parents[1] / "data" / "runs" / "classification-finished"
LABELS = ("<script>bad</script>", "$x_{$ ok & \x1b[31m", "good\u202e")
HOSTILE = "</p></style><script>alert(1)</script> \u202e \x1b[31m <img src=x onerror=alert(2)> 😀 "

SMALL = TrainConfig(
    epochs=1, batch_size=4, lr=5e-3, device="cpu", log_every=4, truncation="head+tail",
    model=ModelConfig(vocab_size=100, d_model=16, num_heads=2, num_layers=2, d_ff=32, max_len=48,
                      dropout=0.0, attn_backend="sdpa"),
)  # fmt: skip


def write_dataset(folder: Path, labels: tuple[str, ...]) -> Path:
    """Word `k0`, `k1`, ... tells the label; the test split lies now and then, so that any model
    makes mistakes there."""
    folder.mkdir(parents=True)
    rng = random.Random(0)
    for name, count in (("train", 240), ("test", 90)):
        with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as f:
            rows = csv.writer(f)
            rows.writerow(["text", "label"])
            for i in range(count):
                words = [f"w{rng.randrange(60)}" for _ in range(rng.randrange(3, 24))]
                for _ in range(3):
                    words.insert(rng.randrange(len(words)), f"k{i % len(labels)}")
                lies = name == "test" and i % 7 == 0
                label = labels[(i + lies) % len(labels)]
                rows.writerow([("" if i % 3 else HOSTILE) + " ".join(words), label])
    return folder


def train_run(folder: Path, settings: TrainConfig) -> Path:
    """A run as train.py makes it, in this process."""
    task, source = TASKS["classification"].load(), data.resolve(settings.dataset)
    runs.train(runs.create(task, settings, source, "tiny", folder, Processes()))
    return folder


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTTX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three labels, one epoch. Not to be written to."""
    folder = tmp_path_factory.mktemp("three")
    dataset = write_dataset(folder / "data", LABELS)
    return train_run(folder / "run", replace(SMALL, dataset=str(dataset)))


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def report(finished: Path) -> tuple[str, dict[str, plots.Picture]]:
    pytest.importorskip("matplotlib")
    return html_report.build(open_run(finished, "cpu"))


def model_of(classes: int = 3, backend: str = "sdpa", layers: int = 2) -> TransformerClassifier:
    """Random weights, large enough that the margins bend."""
    torch.manual_seed(1)
    model = TransformerClassifier(
        40, classes, d_model=16, num_heads=2, num_layers=layers, d_ff=32, max_len=32,
        attn_backend=backend,
    )  # fmt: skip
    with torch.no_grad():
        model.embedding.mul_(4)
        model.head.classify.weight.mul_(6)
    return model.eval()


# --- predictions and results ----------------------------------------------------------------------


def test_a_run_saves_what_it_predicted(finished: Path) -> None:
    saved = Predictions.load(RunFolder(finished).test_predictions, 3)
    with np.load(RunFolder(finished).test_predictions) as arrays:
        assert arrays["logits"].dtype == np.float32 and arrays["logits"].shape == (90, 3)
        assert arrays["labels"].dtype == np.int64
    results = json.loads((finished / "results.json").read_text())
    assert saved.metrics.accuracy == results["test_accuracy"]
    assert saved.metrics.confusion_matrix.tolist() == results["confusion_matrix"]
    classifier = fasttx.load(finished, device="cpu")
    test = data.load(replace(SMALL, dataset=str(finished.parent / "data"))).test
    np.testing.assert_array_equal(saved.labels, test.labels)
    np.testing.assert_allclose(saved.logits, classifier.logits(test.texts).numpy(), atol=1e-5)


def test_what_is_derived_from_logits() -> None:
    logits = np.array([[0.0, 1.0, 3.0], [5.0, 5.0, -1.0], [1000.0, 0.0, 0.0]], np.float32)
    found = Predictions(logits, np.array([2, 1, 0]))
    expected = torch.from_numpy(logits).double().softmax(-1)
    assert found.predicted.tolist() == [2, 0, 0]
    np.testing.assert_allclose(found.confidence, expected.max(-1).values.numpy(), rtol=1e-12)
    assert found.correct.tolist() == [True, False, True]


@pytest.mark.parametrize("content", [b"", b"nothing of the kind", None])
def test_damaged_predictions_are_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "test_predictions.npz"
    Predictions(np.zeros((4, 2), np.float32), np.zeros(4, np.int64)).save(RunFolder(tmp_path))
    path.write_bytes(path.read_bytes()[:200] if content is None else content)
    with pytest.raises(
        CheckpointError, match="test_predictions.npz (holds no predictions|is damaged)"
    ):
        Predictions.load(path, 2)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((4, 2)), np.zeros(4, np.int64), "2 classes, expected 3"),
        (np.zeros((4, 3)), np.zeros(5, np.int64), "expected \\(4,\\)"),
        (np.full((4, 3), np.nan), np.zeros(4, np.int64), "NaN"),
        (np.zeros((4, 3)), np.full(4, 3), "expected 0 to 2"),
    ],
)
def test_wrong_predictions_are_named(tmp_path: Path, logits, labels, message) -> None:
    path = tmp_path / "test_predictions.npz"
    Predictions(logits, labels).save(RunFolder(tmp_path))
    with pytest.raises(CheckpointError, match=message):
        Predictions.load(path, 3)


def test_time_to_accuracy() -> None:
    rows = [(60.0, 0.70), (50.0, 0.86), (40.0, 0.84), (30.0, 0.88)]
    history = [{"seconds": s, "val_accuracy": a} for s, a in rows]
    assert time_to_accuracy(history) == {"0.85": 110.0, "0.88": 180.0}
    assert time_to_accuracy(history[:2]) == {"0.85": 110.0, "0.88": None}
    assert time_to_accuracy([]) == {"0.85": None, "0.88": None}


def test_results_hold_the_time_to_accuracy(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert results["time_to_accuracy"] == time_to_accuracy(results["history"])


# --- findings -------------------------------------------------------------------------------------


def test_wilson_against_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for n in (1, 7, 600):
        for k in {0, 1, n // 2, n}:
            interval = stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
            low, high = findings.wilson(k, n)
            assert (float(low), float(high)) == pytest.approx(tuple(interval), abs=1e-12)


def drawn(n: int = 500, classes: int = 3, seed: int = 0, scale: float = 2.0) -> Predictions:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    logits = rng.normal(size=(n, classes))
    logits[np.arange(n), labels] += 1.0
    return Predictions((scale * logits).astype(np.float32), labels)


@pytest.mark.parametrize("classes", [2, 4])
def test_reliability_against_a_loop(classes: int) -> None:
    predictions = drawn(classes=classes)
    found = findings.reliability(predictions)
    rows = []
    for m in range(15):
        inside = [
            (c, r)
            for c, r in zip(predictions.confidence, predictions.correct, strict=True)
            if m / 15 < c <= (m + 1) / 15
        ]
        if inside:
            sure, right = zip(*inside, strict=True)
            rows.append((m / 15, (m + 1) / 15, len(inside), np.mean(sure), np.mean(right)))
    mine = np.stack([found.low, found.high, found.count, found.confidence, found.accuracy], 1)
    np.testing.assert_allclose(mine, rows, rtol=1e-12)
    error = sum(n * abs(sure - right) for _, _, n, sure, right in rows) / len(predictions)
    assert predictions.metrics.expected_calibration_error == pytest.approx(error, rel=1e-12)


@pytest.mark.parametrize("lengths", [[5] * 20, list(range(40)), [1, 2, 2, 2, 2, 2, 900]])
def test_length_bins_hold_every_text_once(lengths: list[int]) -> None:
    values = np.array(lengths)
    correct = np.arange(len(values)) % 3 > 0
    found = findings.by_length(values, correct)
    assert found.count.sum() == len(values) and found.right.sum() == correct.sum()
    assert (found.shortest <= found.longest).all()
    assert (found.longest[:-1] < found.shortest[1:]).all()
    for low, high, n, right in zip(
        found.shortest, found.longest, found.count, found.right, strict=True
    ):
        inside = (values >= low) & (values <= high)
        assert (inside.sum(), correct[inside].sum()) == (n, right)


def test_the_most_confident_mistakes() -> None:
    predictions = drawn()
    shown = findings.confident_mistakes(predictions, 5)
    assert not predictions.correct[shown].any()
    rest = np.setdiff1d(np.flatnonzero(~predictions.correct), shown)
    assert (np.diff(predictions.confidence[shown]) <= 0).all()
    assert predictions.confidence[shown].min() >= predictions.confidence[rest].max()


def test_sentences_claim_what_the_numbers_bear() -> None:
    lengths = np.repeat([10, 100], 500)
    right = np.ones(1000, bool)
    right[:50] = right[-55:] = False
    assert "makes no difference" in findings.length_sentence(lengths, right)
    right[-120:] = False
    said = findings.length_sentence(lengths, right)
    assert said.startswith("Longer texts are harder: 76.0 %") and "90.0 %" in said
    assert "easier" in findings.length_sentence(110 - lengths, right)
    assert findings.length_sentence(np.full(9, 3), right[:9]).startswith("All texts")

    sure = drawn(scale=8.0)
    assert findings.calibration_sentence(sure).startswith("Overconfident")
    assert findings.calibration_sentence(drawn(scale=0.2)).startswith("Underconfident")
    labels = np.zeros(100, np.int64)
    labels[:20] = 1
    fair = Predictions(np.tile(np.float32([np.log(4.0), 0.0]), (100, 1)), labels)
    assert findings.calibration_sentence(fair).startswith("Confidence fits")

    names = ["a", "b"]
    metrics = classification_metrics(np.float32([[1, 0], [1, 0], [0, 1]]), np.array([0, 1, 1]))
    assert findings.confusion_sentence(metrics, names).startswith("Most often, b is taken for a: 1")
    perfect = classification_metrics(np.float32([[1, 0], [0, 1]]), np.array([0, 1]))
    assert findings.confusion_sentence(perfect, names) == "No mistake among 2 texts"
    assert findings.classes_sentence(perfect, names) == "F1 is 100.0 % for every label"

    history = [
        {"epoch": e + 1, "val_accuracy": a, "val_loss": v, "train_loss": t}
        for e, (a, v, t) in enumerate([(0.7, 0.6, 0.6), (0.8, 0.5, 0.4), (0.79, 0.7, 0.2)])
    ]
    assert "after epoch 2 the validation loss rises" in findings.curves_sentence(history, 2)
    assert "overfitting" not in findings.curves_sentence(history[:2], 2)
    assert findings.curves_sentence(history[:1], 1).startswith("One epoch")


def test_throughput_of_each_interval() -> None:
    """22 samples an epoch in steps of 4: 8 in 1 s, 8 in 3 s, 6 in 1 s; then all in 2 s."""
    rows = [
        {"kind": "train", "epoch": 1, "step": 2, "samples_per_second": 8 / 1},
        {"kind": "train", "epoch": 1, "step": 4, "samples_per_second": 16 / 4},
        {"kind": "epoch", "epoch": 1, "samples_per_second": 22 / 5},
        {"kind": "train", "epoch": 2, "step": 12, "samples_per_second": 22 / 2},
        {"kind": "epoch", "epoch": 2, "samples_per_second": 22 / 2},
    ]
    ends, rates = findings.throughput(rows, 22, 4)
    np.testing.assert_allclose(ends, [1, 4, 5, 7])
    np.testing.assert_allclose(rates, [8, 8 / 3, 6, 11])


# --- attributions ---------------------------------------------------------------------------------


def slow_integrated_gradients(model, ids: np.ndarray, target: int, rival: int, points: int):
    """Midpoints, one at a time, in float64, with the model's layers called one by one."""
    from fasttx.models.mean_pool import mean_pool
    from fasttx.ops.contract import Spans
    from fasttx.ops.dropout import NO_DROPOUT

    n = len(ids)
    words = model.embedding[torch.from_numpy(ids)].detach()
    baseline = model.embedding[UNK_ID].detach()
    cu_seqlens = torch.tensor([0, n], dtype=torch.int32)
    spans = Spans.from_cu_seqlens(cu_seqlens, n, n)

    def margin(rows):
        h = rows * rows.shape[1] ** 0.5 + model.positions[:n]
        norms = [*(block.norm1 for block in model.blocks), model.norm]
        x = norms[0](h)
        for block, norm in zip(model.blocks, norms[1:], strict=True):
            h, x = block(h, x, norm, model._ops, spans, [NO_DROPOUT] * 4)
        logits = model.head(mean_pool(x, cu_seqlens), model._ops, NO_DROPOUT)[0]
        return logits[target] - logits[rival]

    total = torch.zeros_like(words)
    for k in range(points):
        rows = (baseline + (words - baseline) * (k + 0.5) / points).requires_grad_()
        total += torch.autograd.grad(margin(rows), rows)[0]
    return ((words - baseline) * total / points).sum(-1).numpy(), float(margin(words).detach())


def test_integrated_gradients_against_a_loop_in_float64() -> None:
    model = model_of(backend="reference", layers=1).double()
    ids = np.array([7, 3, UNK_ID, 12, 3, 20])
    mine, margin, _, _ = attributions.integrated_gradients(model, ids, 2, 0)
    slow, slow_margin = slow_integrated_gradients(model, ids, 2, 0, 400)
    assert margin == pytest.approx(slow_margin, abs=1e-9)
    assert np.abs(slow).max() > 0.5  # there is something to compare
    np.testing.assert_allclose(mine, slow, atol=2 * attributions.TOLERANCE * abs(slow).sum())
    assert mine[2] == 0.0  # <UNK> is what the path begins with


@pytest.mark.parametrize(("classes", "seed"), [(2, 0), (3, 1), (5, 2)])
def test_completeness(classes: int, seed: int) -> None:
    """The axiom of the paper: attributions sum to the margin less the baseline's."""
    model = model_of(classes)
    ids = np.random.default_rng(seed).integers(2, 40, 24)
    mine, margin, baseline, points = attributions.integrated_gradients(model, ids, classes - 1, 0)
    with torch.no_grad():
        both = [model(torch.from_numpy(x)[None])[0] for x in (ids, np.full(24, UNK_ID))]
    assert [margin, baseline] == pytest.approx([float(x[-1] - x[0]) for x in both], abs=1e-4)
    allowed = attributions.TOLERANCE * max(1.0, abs(margin - baseline))
    assert abs(mine.sum() - (margin - baseline)) <= allowed and points <= 512
    assert all(p.grad is None for p in model.parameters())


def test_explain_finds_the_word_that_decides(finished: Path) -> None:
    classifier = fasttx.load(finished, device="cpu", attn_backend="sdpa")
    found = attributions.explain(classifier, "w1 w2 k2 w3 zzz")
    assert (found.label, found.words) == (LABELS[2], ("w1", "w2", "k2", "w3", "zzz"))
    assert found.attributions.argmax() == 2 and found.attributions[2] > 0.5
    assert found.known.tolist() == [True, True, True, True, False] and not found.attributions[4]
    assert found.probability == classifier.predict(["w1 w2 k2 w3 zzz"])[0].probability
    difference = found.margin - found.baseline_margin
    assert abs(found.gap) <= attributions.TOLERANCE * max(1, abs(difference))
    assert found.attention.shape == (2, 2, 5, 5)
    np.testing.assert_allclose(found.attention.sum(-1), 1.0, rtol=1e-5)
    batch = pack(classifier.encode(["w1 w2 k2 w3 zzz"]))
    with torch.no_grad():
        logits = classifier.model(**batch.model_inputs())[0]
    top = logits.sort(descending=True).values
    assert found.margin == pytest.approx(float(top[0] - top[1]), abs=1e-5)


def test_explain_tells_what_was_not_read(finished: Path) -> None:
    classifier = fasttx.load(finished, device="cpu", attn_backend="sdpa")
    text = " ".join(f"w{i}" for i in range(80))
    for how, kept, at in (
        ("head", range(48), 48), ("tail", range(32, 80), 0),
        ("head+tail", [*range(24), *range(56, 80)], 24),
    ):  # fmt: skip
        found = attributions.explain(replace(classifier, truncation=how), text)
        assert found.words == tuple(f"w{i}" for i in kept)
        assert (found.words_left_out, found.left_out_at) == (32, at)
        assert "[32 words not read]" in explain.shaded(found)
        plain = explain.coloured(found).split("[32 words not read]")
        assert len(plain) == 2 and len(plain[0].split()) == at


def test_explain_reads_a_long_text_as_it_is_predicted(finished: Path) -> None:
    cut = fasttx.load(finished, device="cpu", attn_backend="sdpa")
    classifier = replace(cut, long_texts="windows")
    words = [[*(f"w{i}" for i in range(n)), *["k2"] * (40 - n)] for n in (30, 10, 30)]  # windows
    text = " ".join(itertools.chain(*words))
    found = attributions.explain(classifier, text)
    predicted = classifier.predict([text])[0]
    assert found.words == tuple(text.split()) and not found.words_left_out
    assert found.probability == pytest.approx(predicted.probability, abs=1e-6)
    difference = found.margin - found.baseline_margin  # of the averaged logits
    assert abs(found.gap) <= attributions.TOLERANCE * max(1, abs(difference))
    logits = classifier.logits([text])[0].sort(descending=True).values
    assert found.margin == pytest.approx(float(logits[0] - logits[1]), abs=1e-5)
    # A third of what the word says where the second of the three windows is all there is.
    assert found.label == LABELS[2] and found.words[found.attributions.argmax()] == "k2"
    alone = attributions.explain(cut, " ".join(found.words[40:80]))
    assert alone.label == found.label
    np.testing.assert_allclose(found.attributions[40:80], alone.attributions / 3, atol=0.02)
    assert found.mapped == range(40, 80)
    np.testing.assert_allclose(found.attention, alone.attention, atol=1e-5)
    assert "its words 41 to 80" in explain.html(found, "run")


def test_explain_a_text_without_words(finished: Path) -> None:
    classifier = fasttx.load(finished, device="cpu", attn_backend="sdpa")
    found = attributions.explain(classifier, " \n ")
    assert found.words == () and found.attention.shape == (2, 2, 0, 0)
    assert "(no words)" in explain.shaded(found)
    assert explain.terminal(found, False).startswith(one_line(found.label))
    explain.html(found, "run")


# --- pages ----------------------------------------------------------------------------------------

VOID = {"meta", "br", "img", "link", "hr", "input"}


class Reader(HTMLParser):
    """The text, headings and elements of a page; fails where an element is not closed."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.headings: list[str] = []
        self.words = ""
        self.feed(source)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.add(tag)
        self.attributes += [(k, v or "") for k, v in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("h1", "h2", "h3"):
            self.headings.append("")

    def handle_startendtag(self, tag, attrs) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> where {self.open[-3:]} is open"

    def handle_data(self, text) -> None:
        text = text.replace("\u00a0", " ")
        self.words += text
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings[-1] += text


def check_page(source: str) -> Reader:
    """Whole, self-contained, and free of whatever the texts tried to bring in."""
    found = Reader(source)
    assert not found.tags & {"script", "link", "img", "iframe", "object", "embed", "base"}
    for name, value in found.attributes:
        assert not name.startswith("on"), f"{name}={value}"
        if name in ("href", "src", "xlink:href"):
            assert value.startswith(("#", "data:image/png;base64,")), value[:80]
    assert "@import" not in source and "url(h" not in source
    assert not set("\x1b\u202e") & set(source)
    ids = [value for name, value in found.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    referred = {v[1:] for k, v in found.attributes if k.endswith("href") and v[:1] == "#"}
    assert referred <= set(ids)
    source.encode("utf-8")
    return found


def test_the_page(report, finished: Path) -> None:
    source, pictures = report
    found = check_page(source)
    results = json.loads((finished / "results.json").read_text())
    correct = round(results["test_accuracy"] * 90)
    assert f"data: {100 * correct / 90:.2f} % of 90 test texts are right" in found.headings[0]
    assert any(h.startswith("One epoch: validation accuracy") for h in found.headings)
    # One text in seven has a wrong label, so that there are mistakes whatever was learnt.
    assert any("most confident of" in h for h in found.headings)
    assert "<script>bad</script>" in found.words  # as text, since it was escaped
    assert "</style><script>alert(1)" in found.words.replace(" ", "")
    assert "integrated gradients" in found.words and "no explanation" in found.words
    assert "Warning." not in found.words
    assert set(pictures) == {
        "learning-curves", "confusion-matrix", "reliability", "accuracy-by-length", "throughput",
        "attention-right", "attention-wrong",
    }  # fmt: skip
    for drawn_ in pictures.values():
        assert drawn_.png.startswith(b"\x89PNG\r\n") and drawn_.svg in source
        assert "var(--ink)" in drawn_.svg and plots.INK not in drawn_.svg
    assert "expected calibration error" in found.words.lower()


def test_an_older_run_is_predicted_once_more(report, copy: Path, capsys) -> None:
    saved = RunFolder(copy).test_predictions
    saved.unlink()
    source, _ = html_report.build(open_run(copy, "cpu"))
    assert "predicting the 90 test texts" in capsys.readouterr().out
    assert Predictions.load(saved, 3).metrics.n == 90
    assert Reader(source).headings == Reader(report[0]).headings
    open_run(copy, "cpu")
    assert "predicting" not in capsys.readouterr().out


def test_without_the_dataset_the_page_says_so(copy: Path, tmp_path: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["train"]["dataset"] = str(tmp_path / "gone")
    (copy / "config.json").write_text(json.dumps(config))
    RunFolder(copy).seal()
    source, pictures = html_report.build(open_run(copy, "cpu"))
    found = check_page(source)
    assert "cannot be had any more" in found.words and "gone" in found.words
    assert "reliability" in pictures and "accuracy-by-length" not in pictures
    RunFolder(copy).test_predictions.unlink()
    source, pictures = html_report.build(open_run(copy, "cpu"))
    assert "confusion-matrix" in pictures and "reliability" not in pictures
    check_page(source)


def test_other_texts_are_not_taken_for_the_runs_own(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["dataset"]["fingerprint"] = "0" * 64
    (copy / "config.json").write_text(json.dumps(config))
    RunFolder(copy).seal()
    run = open_run(copy, "cpu")
    assert run.texts is None and "fingerprint" in run.notes[0]


def test_an_unfinished_run_is_refused_and_its_test_split_untouched(copy: Path) -> None:
    (copy / "results.json").unlink()
    RunFolder(copy).test_predictions.unlink()
    with pytest.raises(CheckpointError, match="not finished.*--resume"):
        open_run(copy, "cpu")
    assert not RunFolder(copy).test_predictions.exists()


def test_predictions_of_another_split_are_refused(copy: Path) -> None:
    path = RunFolder(copy).test_predictions
    saved = Predictions.load(path, 3)
    Predictions(saved.logits, np.roll(saved.labels, 1)).save(RunFolder(copy))
    with pytest.raises(CheckpointError, match="does not belong"):
        open_run(copy, "cpu")


def test_a_single_class_is_a_warning_above_all(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    dataset = write_dataset(tmp_path / "data", ("bad", "good"))
    for name in ("train", "test"):
        head, *rows = (dataset / f"{name}.csv").read_text().splitlines()
        rows.sort(key=lambda row: row.rsplit(",", 1)[1])
        (dataset / f"{name}.csv").write_text("\n".join([head, *rows]) + "\n")
    settings = replace(
        SMALL, dataset=str(dataset), subset_order="file", allow_single_class=True,
        train_samples=80, test_samples=30,
    )  # fmt: skip
    run = open_run(train_run(tmp_path / "run", settings), "cpu")
    source, _ = html_report.build(run)
    found = check_page(source)
    assert "No mistake among 30 texts" in found.headings
    assert found.words.index("ONE CLASS ONLY") < found.words.index("test accuracy")


def test_many_classes_are_drawn() -> None:
    pytest.importorskip("matplotlib")
    metrics = drawn(400, 30).metrics
    names = [f"label number {i}" for i in range(30)]
    assert plots.picture("c", "many", plots.confusion, metrics, names).svg.count("label number") > 0


def test_attention_maps_show_the_most_attended_words() -> None:
    weights = np.full((1, 1, 60, 60), 0.001, np.float32)
    weights[..., 50] = 0.5
    weights[..., 4] = 0.3
    assert plots.most_attended(weights, 2).tolist() == [4, 50]
    assert len(plots.most_attended(weights)) == plots.MOST_WORDS


def test_what_cannot_be_printed_is_replaced() -> None:
    assert escaped('<a href="x">&\u202e\x1b\ud800</a>') == (
        "&lt;a href=&quot;x&quot;&gt;&amp;\ufffd\ufffd\ufffd&lt;/a&gt;"
    )
    assert printable("naïve 日本 👩\u200d🚀") == "naïve 日本 👩\u200d🚀"


# --- commands -------------------------------------------------------------------------------------


def test_the_report_command(copy: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "there" / "page.html"
    assert cli.main(["report", str(copy), "--out", str(out), "--device", "cpu"]) == 2
    assert "does not exist; create it first" in capsys.readouterr().err
    out.parent.mkdir()
    assert cli.main(["report", str(copy), "--out", str(out), "--device", "cpu"]) == 0
    assert str(out) in capsys.readouterr().out
    check_page(out.read_text(encoding="utf-8"))
    assert {p.name for p in (out.parent / "page").iterdir()} >= {"reliability.png"}
    assert cli.main(["report", str(tmp_path / "nothing")]) == 2


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("file/page.html", "file is no folder; expected one"),
        ("file/more/page.html", "file is no folder; expected one"),
        ("folder", "it is a folder; expected the name of a file"),
        ("page.html", "its pictures go to the folder .*page, which is a file"),
        ("none/page.html", "none does not exist; create it first"),
    ],
)
def test_a_report_that_could_not_be_written_is_refused_before_the_work(
    copy: Path, tmp_path: Path, capsys, monkeypatch, out: str, message: str
) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "file").touch()
    (tmp_path / "page").touch()
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr("fasttx.commands.report.open_run", None)  # the work
    assert cli.main(["report", str(copy), "--out", str(tmp_path / out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)


def test_a_folder_that_may_not_be_written(copy: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("fasttx.commands.report.open_run", None)
    monkeypatch.setattr("os.access", lambda *_: False)  # whoever runs the tests may write it
    for argv in (["report", str(copy)], ["report", str(copy), "--out", str(tmp_path / "a.html")]):
        assert cli.main(argv) == 2
        assert "may not be written; change its permissions" in capsys.readouterr().err


def test_a_page_without_a_suffix_has_a_picture_folder_of_another_name(tmp_path: Path) -> None:
    drawn = plots.Picture("<svg/>", b"png")
    page.check_place(tmp_path / "page", pictures=True)
    assert page.write(tmp_path / "page", "<p>", {"a": drawn}) == tmp_path / "page-pictures"
    assert (tmp_path / "page").read_text() == "<p>"


def test_thousands_of_labels_are_drawn_and_named(monkeypatch) -> None:
    pytest.importorskip("matplotlib")
    metrics = drawn(900, 3000).metrics
    seen = []
    imshow = matplotlib_axes().imshow
    monkeypatch.setattr(
        matplotlib_axes(),
        "imshow",
        lambda self, x, **k: seen.append(x.shape) or imshow(self, x, **k),
    )
    plots.confusion(metrics, [f"label {i}" for i in range(3000)])
    assert seen == [(plots.MOST_LABELS, plots.MOST_LABELS, 4)]
    assert "of all" in findings.confusion_sentence(metrics, ["x"] * 3000)


def matplotlib_axes():
    from matplotlib.axes import Axes

    return Axes


def test_a_text_of_many_windows_is_not_explained_in_a_report() -> None:
    predictions = drawn(50, 2)
    among = np.zeros(50, dtype=bool)
    assert len(findings.confident_mistakes(predictions, 8, among)) == 0
    shown = findings.confident_mistakes(predictions, 8, among)
    assert "too long to be explained" in findings.mistakes_sentence(predictions, shown)
    among[:25] = True
    assert (findings.confident_mistakes(predictions, 8, among) < 25).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_accuracy": None}, "test_accuracy is 'None'; expected a finite number"),
        ({"history": []}, "which is none of its history"),
        ({"history": [3]}, "in history: '3'; expected names and values"),
        ({"history": None}, "history is 'None'; expected list"),
        ({"best_epoch": "1"}, "best_epoch is '1'; expected int"),
        ({"test": {}}, "its test has other names than this version of fasttx writes"),
        ({"seconds": float("nan")}, "seconds is 'nan'; expected a finite number"),
        ({"hardware": "cpu"}, "hardware is 'cpu'; expected dict"),
    ],
)
def test_results_that_a_hand_has_changed(change: dict, message: str) -> None:
    values = json.loads((OLD / "results.json").read_text(encoding="utf-8"))
    config = read_config(OLD / "config.json")
    finished_run._check_results(OLD / "results.json", values, config)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        finished_run._check_results(OLD / "results.json", values | change, config)


def test_the_matrix_of_other_labels_is_refused() -> None:
    values = json.loads((OLD / "results.json").read_text(encoding="utf-8"))
    config = replace(read_config(OLD / "config.json"), label_names=("a", "b", "c"))
    with pytest.raises(CheckpointError, match="of test has the shape"):
        finished_run._check_results(OLD / "results.json", values, config)


@pytest.mark.parametrize("line", ["[]", '{"kind": "train"}', "x", '{"kind": "epoch"}', "3"])
def test_metrics_that_a_hand_has_changed(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes((OLD / "metrics.jsonl").read_bytes() + b'{"kind": "of another version"}\n')
    rows = finished_run._rows(path)
    assert {row["kind"] for row in rows} <= {"train", "epoch"} and rows
    path.write_bytes(path.read_bytes() + line.encode() + b"\n")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl"):
        finished_run._rows(path)


def test_without_matplotlib_it_says_what_to_install(copy: Path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["report", str(copy), "--device", "cpu"]) == 2
    assert "pip install 'fasttx[report]'" in capsys.readouterr().err
    assert not (copy / "report.html").exists()
    assert cli.main(["explain", str(copy), "w1 k2", "--device", "cpu"]) == 0  # needs none


def test_the_explain_command(copy: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    pytest.importorskip("matplotlib")
    text, out = "w1 w2 k0 <script>", tmp_path / "one.html"
    command = ["explain", str(copy), text, "--device", "cpu"]
    assert cli.main([*command, "--html", str(out)]) == 0
    shown = capsys.readouterr().out
    classifier = fasttx.load(copy, device="cpu")
    prediction = classifier.predict([text])[0]
    assert shown.startswith(f"{prediction.label}  {100 * prediction.probability:.2f} %\n")
    pairs = [line.rsplit(" ", 1) for line in shown.split("\n\n")[1].splitlines()]
    values = [abs(float(value)) for _, value in pairs]
    assert values == sorted(values, reverse=True)
    assert {word for word, _ in pairs} == {"w1", "w2", "k0", "<", "script", ">"}
    found = check_page(out.read_text(encoding="utf-8"))
    assert "Attention maps" in found.words

    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    cli.main(command)
    assert "\x1b[30;48;5;" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    cli.main(command)
    assert "\x1b" not in capsys.readouterr().out


def test_steps_count_the_pseudo_labelled_texts_too(copy: Path) -> None:
    run = open_run(copy, "cpu")
    assert run.steps_per_epoch == -(-run.config.dataset["train_samples"] // run.samples_per_step)
    dataset = {**run.config.dataset, "pseudo_labels": {"texts": 1000, "fingerprint": ""}}
    more = replace(run, config=replace(run.config, dataset=dataset))
    texts = dataset["train_samples"] + 1000
    assert more.samples_per_epoch == texts
    assert more.steps_per_epoch == -(-texts // run.samples_per_step)
