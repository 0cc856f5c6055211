"""`fasttx ensemble`: its weights, what it measures and labels, and who learns from that."""

from __future__ import annotations

import csv
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import fasttx
import train
from fasttx.commands import cli
from fasttx.errors import CheckpointError
from fasttx.models.pool import Pool
from fasttx.tasks import TASKS, read_config
from fasttx.text import splits as data
from fasttx.text.packing import pack
from fasttx.training.checkpoint import load_state
from fasttx.training.distributed import Processes
from fasttx.training.folder import RunFolder
from fasttx.training.metrics import log_softmax
from fasttx.training.predictions import Predictions, PseudoLabels
from fasttx.training.task import Examples, Run, Splits
from fasttx.training.trainer import Trainer

SMALL = (
    "--vocab-size 100 --d-model 16 --num-heads 2 --num-layers 1 --d-ff 32 --max-len 32 --epochs 3 "
    "--lr 0.01 --attn-backend sdpa"
).split()
UNLABELLED = 90


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.csv, test.csv and unsupervised.csv; one text in six says the opposite of its label, so
    that nobody is right or certain all the time."""
    folder = tmp_path_factory.mktemp("data") / "little"
    folder.mkdir()
    rng = random.Random(0)
    for name, count in (("train", 400), ("test", 80), ("unsupervised", UNLABELLED)):
        with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as f:
            rows = csv.writer(f)
            rows.writerow(["text", "label"][: 1 if name == "unsupervised" else 2])
            for i in range(count):
                words = [f"w{rng.randrange(40)}" for _ in range(rng.randrange(3, 60))]
                said = i % 2 if rng.random() < 5 / 6 else 1 - i % 2
                words.insert(rng.randrange(len(words)), ("awful", "great")[said])
                label = [("bad", "good")[i % 2]] if name != "unsupervised" else []
                rows.writerow([" ".join(words), *label])
    return folder


@pytest.fixture(scope="module")
def members(reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two finished runs on the same splits."""
    folder = tmp_path_factory.mktemp("runs")
    differences = ("--long-texts windows", "--max-len 20 --seed 5 --split-seed 0")
    for name, more in zip("ab", differences, strict=True):
        arguments = [*SMALL, *more.split(), "--dataset", str(reviews), "--out", str(folder / name)]
        assert train.main(arguments) == 0
    return folder / "a", folder / "b"


@pytest.fixture(scope="module")
def teacher(members: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ensemble") / "teacher"
    assert cli.main(["ensemble", *map(str, members), "--pseudo-labels", "--out", str(out)]) == 0
    return out


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


# --- the command ----------------------------------------------------------------------------------


def test_what_it_measures(members: tuple[Path, Path], teacher: Path, reviews: Path) -> None:
    found = results(teacher)
    assert [row["name"] for row in found["members"]] == [str(run) for run in members]
    for row, run in zip(found["members"], members, strict=True):
        assert row["test_accuracy"] == pytest.approx(results(run)["test_accuracy"])
        assert row["val_accuracy"] == pytest.approx(results(run)["val_accuracy"])
    weights = np.array([row["weight"] for row in found["members"]])
    kept = [Predictions.load(run / "test_predictions.npz", 2) for run in members]
    pool = Pool(weights, np.array(found["bias"]))
    answers = Predictions.load(teacher / "test_predictions.npz", 2)
    np.testing.assert_allclose(answers.logits, pool(np.stack([p.logits for p in kept])), rtol=1e-5)
    assert found["test_accuracy"] == (answers.predicted == kept[0].labels).mean()

    # A pool of two without one of them is the other, with a weight and bias of its own.
    validation = data.load(fasttx.TrainConfig(dataset=str(reviews))).validation
    for row, other, said in zip(found["members"], members[::-1], kept[::-1], strict=True):
        logits = fasttx.load(other, device="cpu").logits(validation.texts).numpy()
        alone = Pool.fit(logits[None], validation.labels)(said.logits[None])
        assert row["test_accuracy_without"] == (alone.argmax(1) == said.labels).mean()


def test_what_it_says_of_unlabelled_texts(
    members: tuple[Path, Path], teacher: Path, reviews: Path
) -> None:
    found = results(teacher)
    with open(reviews / "unsupervised.csv", newline="", encoding="utf-8") as f:
        texts = [row["text"] for row in csv.DictReader(f)]
    pool = Pool(np.array([r["weight"] for r in found["members"]]), np.array(found["bias"]))
    logits = np.stack([fasttx.load(run, device="cpu").logits(texts).numpy() for run in members])
    labels = PseudoLabels.load(teacher / "pseudo_labels.npz")
    expected = np.exp(log_softmax(pool(logits)))
    np.testing.assert_allclose(labels.probabilities, expected, rtol=1e-4, atol=1e-6)
    assert labels.label_names == ("bad", "good")
    assert labels.texts == data.texts_fingerprint(texts)
    assert sum(found["pseudo_labels"]["label_counts"].values()) == UNLABELLED
    assert 0.5 < found["pseudo_labels"]["mean_confidence"] < 1


def test_linear_models_fit_the_training_split_alone(
    members: tuple[Path, Path], reviews: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    pytest.importorskip("sklearn")
    from fasttx.models import bag_of_words

    fitted_to: list[list[str]] = []
    fit = bag_of_words.fit

    def spy(kind, ngrams, texts, labels, **settings):
        fitted_to.append(list(texts))
        return fit(kind, ngrams, texts, labels, **settings)

    monkeypatch.setattr(bag_of_words, "fit", spy)
    arguments = ["ensemble", str(members[0]), *"--linear nb --linear logreg --json".split()]
    assert cli.main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    names = [row["name"] for row in found["members"][1:]]
    assert names == ["naive Bayes, binary unigrams", "logistic regression, tf-idf bigrams"]
    splits = data.load(fasttx.TrainConfig(dataset=str(reviews)))
    assert fitted_to == [splits.train.texts] * 2

    assert cli.main([*arguments, "--ngrams", "3"]) == 0
    names = [row["name"] for row in json.loads(capsys.readouterr().out)["members"][1:]]
    assert names == ["naive Bayes, binary trigrams", "logistic regression, tf-idf trigrams"]


def test_bad_settings_are_one_clear_line(
    members: tuple[Path, Path], reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: object) -> str:
        assert cli.main(["ensemble", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    a = members[0]
    assert "add --out DIR" in refused(a, "--pseudo-labels")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["ensemble", str(a), "--batch-size", "0"])
    assert "--batch-size is 0; expected at least 1" in capsys.readouterr().err
    assert "add --linear KIND" in refused(a, "--ngrams", 3)
    assert "is no fasttx run" in refused(tmp_path / "none")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "something").touch()
    assert "full exists already and holds" in refused(a, "--out", tmp_path / "full")
    assert train.main([*SMALL, "--dataset", str(reviews), "--seed", "1", "--epochs", "1", "--out",
                       str(tmp_path / "other")]) == 0  # fmt: skip
    message = refused(a, tmp_path / "other")
    assert "was trained on other splits" in message
    assert "seed 1" in message

    # Where there are no texts without labels it says so before it works.
    fewer = tmp_path / "fewer"
    shutil.copytree(reviews, fewer)
    assert train.main([*SMALL, "--dataset", str(fewer), "--epochs", "1", "--out",
                       str(tmp_path / "run")]) == 0  # fmt: skip
    (fewer / "unsupervised.csv").unlink()
    out = tmp_path / "out"
    message = refused(tmp_path / "run", "--pseudo-labels", "--out", out)
    assert "has no unlabelled texts; expected a file such as unsupervised.parquet" in message
    assert not out.exists()


# --- learning from it -----------------------------------------------------------------------------


def test_a_run_learns_from_the_labels(reviews: Path, teacher: Path, tmp_path: Path) -> None:
    run = tmp_path / "student"
    arguments = [*SMALL, "--dataset", str(reviews), "--pseudo-labels", str(teacher)]
    assert train.main([*arguments, "--seed", "7", "--split-seed", "0", "--out", str(run)]) == 0
    found = results(run)
    assert found["dataset"]["train_samples"] == 360
    assert found["dataset"]["pseudo_labels"]["texts"] == UNLABELLED
    assert (
        found["dataset"]["pseudo_labels"]["fingerprint"]
        == (results(teacher)["pseudo_labels"]["fingerprint"])
    )
    # The same splits as without, and all texts in every epoch.
    assert found["dataset"]["fingerprint"] == results(teacher)["dataset"]["fingerprint"]
    seconds = [row["seconds"] * row["samples_per_second"] for row in found["history"]]
    assert seconds == pytest.approx([360 + UNLABELLED] * 3)
    assert f"and {UNLABELLED} texts with the labels of {teacher}" in (run / "train.log").read_text()


def test_probabilities_reach_the_loss(
    reviews: Path, teacher: Path, tmp_path: Path, monkeypatch
) -> None:
    """The unlabelled texts come after the labelled ones, each with its row of the file."""
    seen = []
    fit = Trainer.fit

    def spy(self, *arguments):
        seen.append(self.run.splits.train)
        return fit(self, *arguments)

    monkeypatch.setattr(Trainer, "fit", spy)
    arguments = [*SMALL, "--epochs", "1", "--dataset", str(reviews)]
    assert train.main([*arguments, "--out", str(tmp_path / "plain")]) == 0
    more = ["--pseudo-labels", str(teacher), "--out", str(tmp_path / "student")]
    assert train.main([*arguments, *more]) == 0
    plain, student = seen
    assert np.array_equal(student.labels[:360], np.eye(2, dtype=np.float32)[plain.labels])
    rows = PseudoLabels.load(teacher / "pseudo_labels.npz").probabilities
    assert np.array_equal(student.labels[360:], rows)
    assert np.array_equal(student.ids.select(np.arange(360)).values, plain.ids.values)
    assert len(student.ids) == 360 + UNLABELLED


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_certain_probabilities_are_labels(members: tuple[Path, Path], smoothing: float) -> None:
    folder, task, here = RunFolder(members[0]), TASKS["classification"].load(), torch.device("cpu")
    saved = read_config(folder.config)
    saved = replace(saved, train=replace(saved.train, label_smoothing=smoothing))
    classifier = fasttx.load(members[0], device="cpu")
    ids, labels = classifier.encode(["great w1", "awful w2 w3", "w4"]), np.array([1, 0, 0])
    examples = Examples(ids, labels)
    run = Run(task, saved, folder, here, Processes(), Splits(examples, examples))
    hard = task.loss(run, classifier.model, pack(ids, labels))
    certain = task.loss(run, classifier.model, pack(ids, np.eye(2)[labels]))
    torch.testing.assert_close(certain, hard)


def test_an_unbroken_run_and_a_resumed_one_are_the_same(
    reviews: Path, teacher: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = tmp_path / "labels"
    shutil.copytree(teacher, labels)
    arguments = [*SMALL, "--dataset", str(reviews), "--pseudo-labels", str(labels), "--out"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train.main([*arguments, str(whole)]) == 0

    step, calls = Trainer._step, iter(range(1000))

    def until_interrupted(self, *given):
        step(self, *given)
        self._stop = next(calls) == 18  # in the middle of the second epoch

    monkeypatch.setattr(Trainer, "_step", until_interrupted)
    assert train.main([*arguments, str(parts)]) == 130
    monkeypatch.setattr(Trainer, "_step", step)

    # With other labels it does not go on, and says so.
    found = PseudoLabels.load(labels / "pseudo_labels.npz")
    PseudoLabels(
        found.probabilities[:, ::-1].copy(), found.label_names, found.texts, found.splits
    ).save(RunFolder(labels))
    assert train.main(["--resume", str(parts)]) == 2
    assert "was made with other pseudo-labels" in capsys.readouterr().err
    found.save(RunFolder(labels))
    assert train.main(["--resume", str(parts)]) == 0
    one, two = (load_state(run / "best_model.pt") for run in (whole, parts))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_labels_that_do_not_fit_are_refused(
    reviews: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(labels: Path, dataset: Path = reviews, seed: int = 0) -> str:
        out = tmp_path / "run"
        arguments = [*SMALL, "--dataset", str(dataset), "--pseudo-labels", str(labels)]
        arguments += ["--seed", str(seed)]
        assert train.main([*arguments, "--out", str(out)]) == 2
        assert not out.exists()
        return capsys.readouterr().err

    assert "does not exist. Make it: fasttx ensemble" in refused(tmp_path)
    fewer = tmp_path / "fewer"
    shutil.copytree(reviews, fewer)
    lines = (fewer / "unsupervised.csv").read_text().splitlines()
    (fewer / "unsupervised.csv").write_text("\n".join(lines[:-1]) + "\n")
    assert f"labels other texts than the {UNLABELLED - 1} unlabelled ones" in refused(
        teacher, fewer
    )
    found = PseudoLabels.load(teacher / "pseudo_labels.npz")
    replace(found, label_names=("bad", "better")).save(RunFolder(tmp_path))
    assert "has the classes bad, better; expected those of" in refused(tmp_path)
    assert "comes from other splits than this run's" in refused(teacher, seed=1)


@pytest.mark.parametrize("how", ["cut", "rows", "shape", "text"])
def test_damaged_pseudo_labels_are_named(teacher: Path, tmp_path: Path, how: str) -> None:
    path = tmp_path / "pseudo_labels.npz"
    shutil.copy(teacher / "pseudo_labels.npz", path)
    found = PseudoLabels.load(path)
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "text":
        path.write_text("probabilities")
    else:
        rows = 2 * found.probabilities if how == "rows" else found.probabilities[:, :1]
        replace(found, probabilities=rows).save(RunFolder(tmp_path))
    with pytest.raises(
        CheckpointError, match="pseudo_labels.npz (holds no pseudo-labels|is damaged)"
    ):
        PseudoLabels.load(path)
