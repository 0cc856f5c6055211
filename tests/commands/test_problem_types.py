"""Multi-label and regression runs, from the command line to every command that takes a run."""

from __future__ import annotations

import asyncio
import csv
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

import fasttx
import train
from fasttx.commands import cli
from fasttx.config import MULTI_LABEL, REGRESSION
from fasttx.errors import ConfigError, DataError
from fasttx.training.folder import RunFolder
from fasttx.training.predictions import Predictions

SIZES = {
    "d_model": 16, "num_heads": 2, "num_layers": 1, "d_ff": 32, "max_len": 24, "vocab_size": 60,
    "dropout": 0.0,
}  # fmt: skip
SETTINGS = SIZES | {
    "batch_size": 16, "lr": 1e-2, "epochs": 6, "schedule": "constant", "device": "cpu",
    "word_dropout": 0.0,
    "warmup_steps": 0, "log_every": 5, "seed": 1,
}  # fmt: skip
TOPICS = {"music": ("song", "band"), "sport": ("goal", "team")}
KINDS = [MULTI_LABEL, REGRESSION]


def flags(settings: dict[str, object]) -> list[str]:
    return [x for k, v in settings.items() for x in ("--" + k.replace("_", "-"), str(v))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """corpora `multi` (jsonl) and `marks` (csv): a text's words tell its topics and its mark."""
    root, rng = tmp_path_factory.mktemp("problems"), random.Random(0)
    for split, count in (("train", 240), ("test", 60)):
        lines, marks = [], []
        for _ in range(count):
            topics = [t for t in TOPICS if rng.random() < 0.5]
            good = rng.randrange(4)
            words = [f"w{rng.randrange(20)}" for _ in range(rng.randrange(2, 8))]
            words += [rng.choice(TOPICS[t]) for t in topics] + ["great"] * good
            rng.shuffle(words)
            lines.append(json.dumps({"text": " ".join(words), "labels": topics}))
            marks.append((" ".join(words), 10 + good / 2))
        for kind in ("multi", "marks"):
            (root / kind).mkdir(exist_ok=True)
        (root / "multi" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
        with open(root / "marks" / f"{split}.csv", "w", newline="") as f:
            csv.writer(f).writerows([("text", "mark"), *marks])
    return root


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Path]:
    found = {}
    for kind, data in ((MULTI_LABEL, "multi"), (REGRESSION, "marks")):
        out = folder / f"run-{data}"
        asked = ["--dataset", str(folder / data), "--problem-type", kind, "--out", str(out)]
        assert train.main([*asked, *flags(SETTINGS)]) == 0
        found[kind] = out
    return found


def said(capsys, *arguments: object) -> str:
    assert cli.main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


def test_results_and_the_choice_of_the_epoch(runs: dict[str, Path]) -> None:
    for kind, chosen, trained, sign in (
        (MULTI_LABEL, "micro_f1", "label_accuracy", 1), (REGRESSION, "rmse", "absolute_error", -1)
    ):  # fmt: skip
        found, folder = results(runs[kind]), RunFolder(runs[kind])
        best = max(found["history"], key=lambda e: (sign * e[f"val_{chosen}"], -e["val_loss"]))
        assert found["best_epoch"] == best["epoch"]
        assert found[f"val_{chosen}"] == best[f"val_{chosen}"]
        assert found[f"test_{chosen}"] == found["test"][chosen]
        assert all(f"train_{trained}" in row for row in found["history"])
        assert "confusion_matrix" not in found and "test_accuracy" not in found
        steps = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
        assert any(trained in row for row in steps if row["kind"] == "train")
        kept = Predictions.load(folder.test_predictions, 2 if kind == MULTI_LABEL else 1, kind)
        assert kept.metrics.to_dict() == found["test"]
        assert found["example"] is not None
    assert results(runs[MULTI_LABEL])["test_micro_f1"] > 0.9
    assert results(runs[REGRESSION])["test_rmse"] < 0.3  # the mark's deviation is 0.56


@pytest.mark.parametrize("kind", KINDS)
def test_predict_and_evaluate(runs: dict[str, Path], folder: Path, capsys, kind: str) -> None:
    run, texts = runs[kind], ["great great song", "w1"]
    model = fasttx.load(run, device="cpu")
    logits, found = model.logits(texts).double(), model.predict(texts)
    lines = said(capsys, "predict", run, *texts, "--device", "cpu").splitlines()
    assert lines == [f"{p}  {text}" for p, text in zip(found, texts, strict=True)]
    answers = [json.loads(x) for x in said(capsys, "predict", run, "--json", *texts).splitlines()]
    if kind == MULTI_LABEL:
        p = logits.sigmoid().tolist()
        assert [list(x.probabilities.values()) for x in found] == p
        assert answers[0]["labels"] == list(found[0].labels) == ["music"]
    else:
        assert [[x.value] for x in found] == logits.tolist()
        assert answers[0] == {"text": texts[0], "value": found[0].value}
        assert found[0].value > found[1].value + 0.4
    data = {MULTI_LABEL: "multi", REGRESSION: "marks"}[kind]
    again = json.loads(said(capsys, "evaluate", run, "--dataset", folder / data, "--json"))
    test = results(run)["test"]
    assert {k: again[k] for k in test} == pytest.approx(test, rel=1e-5)
    assert "micro F1" in said(capsys, "evaluate", run) or kind == REGRESSION


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_gets_columns(runs: dict[str, Path], tmp_path: Path, capsys, kind: str) -> None:
    source = tmp_path / "in.csv"
    source.write_text("id,text\n1,great goal song\n2,w3\n")
    out = tmp_path / "out.csv"
    said(capsys, "predict", runs[kind], "--file", source, "--out", out, "--all-probabilities")
    rows = list(csv.DictReader(out.read_text().splitlines()))
    found = fasttx.load(runs[kind], device="cpu").predict(["great goal song", "w3"])
    if kind == REGRESSION:
        assert list(rows[0]) == ["id", "text", "predicted_value"]
        values = [float(row["predicted_value"]) for row in rows]
        assert values == pytest.approx([p.value for p in found], rel=1e-6)
        return
    assert [row["predicted_labels"] for row in rows] == ["|".join(p.labels) for p in found]
    assert rows[0]["predicted_labels"] == "music|sport"
    for row, p in zip(rows, found, strict=True):
        for name, value in p.probabilities.items():
            assert float(row[f"probability_{name}"]) == pytest.approx(value, rel=1e-6)


def test_explain(runs: dict[str, Path], capsys, tmp_path: Path) -> None:
    text = "great song w1"
    shown = said(capsys, "explain", runs[MULTI_LABEL], text, "--label", "sport")
    assert shown.startswith("sport  ") and "logit of sport" in shown
    page = tmp_path / "page.html"
    shown = said(capsys, "explain", runs[REGRESSION], text, "--html", page)
    value = fasttx.load(runs[REGRESSION], device="cpu").predict([text])[0].value
    assert shown.startswith(f"mark  {value:.4f}")
    words = dict(line.rsplit(" ", 1) for line in shown.splitlines()[2:5])
    assert float(words["great"]) == max(map(float, words.values())) > 0
    assert "Raising mark" in page.read_text()
    for run, label, message in (
        (MULTI_LABEL, "nope", "expected one of music, sport"),
        (REGRESSION, "mark", f"it is for {MULTI_LABEL}"),
    ):
        assert cli.main(["explain", str(runs[run]), text, "--label", label]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_report(runs: dict[str, Path], tmp_path: Path, capsys, kind: str) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "report.html"
    said(capsys, "report", runs[kind], "--out", out, "--device", "cpu")
    page, test = out.read_text(), results(runs[kind])["test"]
    pictures = {p.stem for p in (tmp_path / "report").iterdir()}
    if kind == MULTI_LABEL:
        assert f"micro F1 {100 * test['micro_f1']:.2f}&nbsp;%" in page
        assert {"labels", "learning-curves"} <= pictures and "average precision" in page
    else:
        assert f"RMSE {test['rmse']:.4f} on 60 test texts" in page
        assert {"predicted-against-true", "learning-curves"} <= pictures
        assert "Largest errors" in page


@pytest.mark.parametrize("kind", KINDS)
def test_as_a_model_of_transformers(runs: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """The same bits, the same problem_type, and a loss that transformers computes from it."""
    pytest.importorskip("transformers")
    from transformers import AutoModelForSequenceClassification

    import fasttx.hf

    texts = ["great song", "w1 w2 goal"]
    ours = fasttx.load(runs[kind], device="cpu", attn_backend="sdpa")
    saved = fasttx.hf.save_run(runs[kind], tmp_path / "hf")
    model = AutoModelForSequenceClassification.from_pretrained(saved)
    assert model.config.problem_type == kind
    _, tokenizer = fasttx.hf.from_run(runs[kind])
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    model.classifier.to("cpu")
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0]] if kind == MULTI_LABEL else [[11.0], [10.0]])
    found = model(**inputs, labels=labels)
    torch.testing.assert_close(found.logits, ours.logits(texts), rtol=1e-5, atol=1e-5)
    state = fasttx.load(runs[kind], device="cpu").model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in model.classifier.state_dict().items())
    loss, _ = ours.problem.loss(found.logits, labels, 0.0)
    assert found.loss.item() == pytest.approx(loss.item() / 2, rel=1e-6)
    card = (saved / "README.md").read_text()
    assert ("micro F1" if kind == MULTI_LABEL else "RMSE") in card


@pytest.mark.parametrize("kind", KINDS)
def test_as_a_service(runs: dict[str, Path], kind: str) -> None:
    pytest.importorskip("starlette")
    pytest.importorskip("prometheus_client")
    from fasttx.serving import app
    from fasttx.serving.limits import Limits
    from fasttx.serving.metrics import Metrics
    from fasttx.serving.models import ServedModel, Source

    model = ServedModel(Source("m", runs[kind], "cpu"), Limits(), Metrics())
    try:
        (answer,) = asyncio.run(model.batcher.submit(["great song"]))
    finally:
        model.batcher.close()
    found, explained = app._prediction(answer), model.explain("great song")
    assert model.described()["problem_type"] == kind
    json.dumps(found | explained, allow_nan=False)
    wanted = fasttx.load(runs[kind], device="cpu").predict(["great song"])[0]
    assert explained["rival"] is None
    if kind == REGRESSION:
        assert set(found) == {"value", "tokens", "truncated"} and explained["probability"] is None
        assert found["value"] == pytest.approx(wanted.value, rel=1e-5)
    else:
        assert found["labels"] == wanted.labels and explained["label"] == "music"
        assert found["probabilities"] == pytest.approx(wanted.probabilities, rel=1e-5)


def test_a_pool_of_other_kinds_is_refused(runs: dict[str, Path], capsys) -> None:
    assert cli.main(["ensemble", str(runs[REGRESSION])]) == 2
    assert "is a run of regression; expected runs of single_label" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_windows_and_an_encoder_to_start_from(
    runs: dict[str, Path], folder: Path, tmp_path: Path, kind: str
) -> None:
    """From the run of the other kind, texts cut into windows of a few words."""
    other = runs[KINDS[1 - KINDS.index(kind)]]
    data = folder / {MULTI_LABEL: "multi", REGRESSION: "marks"}[kind]
    found = fasttx.train(
        data, problem_type=kind, init_from=other, out=tmp_path / "run", quiet=True,
        **SETTINGS | {"max_len": 4, "epochs": 1, "long_texts": "windows"},
    )  # fmt: skip
    longer = ["w1 w2 w3 great great song"]
    ids, owner = found.read(found.tokenizer.encode_batch(longer))
    assert owner is not None and len(ids) == 2
    mean = found.window_logits(ids).mean(0)
    torch.testing.assert_close(found.logits(longer)[0], mean)


# --- from Python ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def splits(folder: Path):
    datasets = pytest.importorskip("datasets")
    files = {s: folder / "marks" / f"{s}.csv" for s in ("train", "test")}
    rows = {s: list(csv.DictReader(path.read_text().splitlines())) for s, path in files.items()}
    return datasets.DatasetDict(
        {s: datasets.Dataset.from_list([r | {"mark": float(r["mark"])} for r in found])
         for s, found in rows.items()}
    )  # fmt: skip


def test_a_dataset_in_python_is_trained_on_like_its_files(
    runs: dict[str, Path], splits, tmp_path: Path
) -> None:
    asked = dict(problem_type=REGRESSION, quiet=True, **SETTINGS)
    found = fasttx.train(splits, out=tmp_path / "a", **asked)
    assert type(found) is type(fasttx.load(tmp_path / "a"))
    by_file = json.loads((runs[REGRESSION] / "config.json").read_text())["dataset"]
    by_object = json.loads((tmp_path / "a" / "config.json").read_text())["dataset"]
    assert by_object["fingerprint"] == by_file["fingerprint"]
    texts = ["great great song", "w1"]
    assert torch.equal(found.logits(texts), fasttx.load(runs[REGRESSION]).logits(texts))
    # A single one is split.
    alone = fasttx.train(splits["train"], out=tmp_path / "b", **{**asked, "epochs": 1})
    assert alone.problem_type == REGRESSION
    sizes = json.loads((tmp_path / "b" / "config.json").read_text())["dataset"]
    assert [sizes[f"{s}_samples"] for s in ("train", "val", "test")] == [195, 21, 24]


def test_a_run_on_an_object_goes_on_with_the_object(
    splits, tmp_path: Path, monkeypatch, capsys
) -> None:
    """A stop after the third step; the resumed run ends as an unbroken one, bit for bit."""
    from fasttx.errors import Interrupted
    from fasttx.training.trainer import Trainer

    asked = dict(problem_type=REGRESSION, quiet=True, **SETTINGS | {"epochs": 2})
    whole = fasttx.train(splits, out=tmp_path / "whole", **asked)
    step = Trainer._step

    def stopping(self, group):
        step(self, group)
        self._stop = self.progress.step == 3

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", stopping)
        with pytest.raises(Interrupted):
            fasttx.train(splits, out=tmp_path / "half", **asked)
    assert train.main(["--resume", str(tmp_path / "half")]) == 2
    assert "fasttx.train(dataset, resume=" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="leave out epochs"):
        fasttx.train(splits, resume=tmp_path / "half", epochs=3)
    with pytest.raises(DataError, match="needs its data"):
        fasttx.train(resume=tmp_path / "half", quiet=True)
    with pytest.raises(ConfigError, match="was begun with 'a dataset in Python'"):
        fasttx.train("demo", resume=tmp_path / "half", quiet=True)
    again = fasttx.train(splits, resume=tmp_path / "half", quiet=True)
    for name, x in whole.model.state_dict().items():
        assert torch.equal(x, again.model.state_dict()[name])
    assert results(tmp_path / "half")["test"] == results(tmp_path / "whole")["test"]


def test_a_stream_is_trained_on_like_a_dataset(splits, tmp_path: Path, monkeypatch) -> None:
    """Its rows are read once, its texts stay on the disk, and nothing of it is left."""
    from fasttx.text import corpora, stored

    most = []
    read = stored.StoredTexts._read
    monkeypatch.setattr(
        stored.StoredTexts, "_read", lambda self, rows: most.append(len(rows)) or read(self, rows)
    )
    monkeypatch.setattr(corpora, "STORED_FROM", 0)
    monkeypatch.setattr(stored, "BLOCK", 50)
    monkeypatch.setenv("FASTTX_CACHE", str(tmp_path / "cache"))
    asked = dict(problem_type=REGRESSION, quiet=True, **SETTINGS | {"epochs": 1})
    streams = {name: split.to_iterable_dataset() for name, split in splits.items()}
    found = fasttx.train(streams, out=tmp_path / "stream", **asked)
    assert max(most) == 50
    assert not [p for p in (tmp_path / "cache").iterdir() if p.name.startswith(("stream", "tmp"))]
    monkeypatch.undo()
    wanted = fasttx.train(splits, out=tmp_path / "whole", **asked)
    for name, x in wanted.model.state_dict().items():
        assert torch.equal(x, found.model.state_dict()[name])
    kept, by_object = (
        json.loads((tmp_path / n / "config.json").read_text())["dataset"]
        for n in ("stream", "whole")
    )
    assert kept == by_object
    assert results(tmp_path / "stream")["test"] == results(tmp_path / "whole")["test"]


def test_a_stream_that_breaks(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")

    def rows():
        yield {"text": "one", "label": 1.5}
        raise OSError("the line went dead")

    with pytest.raises(DataError, match="cannot be read to its end .*the line went dead"):
        fasttx.train(datasets.IterableDataset.from_generator(rows), out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("bad", [[1], {"train": 3}, 5, np.zeros(3)])
def test_what_is_no_dataset(bad, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected a name, a path, a datasets\.Dataset"):
        fasttx.train(bad, out=tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("settings", [{"epoch": 3}, {"recipe": "fast"}, {"num_classes": 3}])
def test_what_is_no_setting(settings, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(settings))}|recipe is 'fast'"):
        fasttx.train("demo", out=tmp_path / "x", **settings)
