"""Texts that occur twice, in a split and across splits, are counted, said and kept."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

import train
from fasttx.commands import cli
from fasttx.config import TrainConfig
from fasttx.text import duplicates
from fasttx.text.splits import load
from fasttx.training.folder import RunFolder
from tests.datafiles import Rows, reviews, write

TINY = (
    "--epochs 1 --batch-size 16 --vocab-size 60 --d-model 16 --num-heads 2 --num-layers 1 --d-ff 16"
    " --max-len 16 --attn-backend reference --device cpu"
).split()


def shouted(rows: Rows) -> Rows:
    return [(f"  {text.upper()}\n", label) for text, label in rows]


def test_counts() -> None:
    splits = {
        "train": ["a b", "a b", "A  b", "c", "", " "],
        "validation": ["c", "d"],
        "test": ["a B", "c", "c", "e", "", ""],
    }
    assert duplicates.count(splits) == {
        "exact": {
            "train": 1, "validation": 0, "test": 1,
            "train/validation": 1, "train/test": 2, "validation/test": 2,
        },
        "folded": {
            "train": 2, "validation": 0, "test": 1,
            "train/validation": 1, "train/test": 3, "validation/test": 2,
        },
    }  # fmt: skip
    assert duplicates.count({"train": ["\ud800"], "held_out": ["\ud800"]})["folded"] == {
        "train": 0, "held_out": 0, "train/held_out": 1
    }  # fmt: skip


def test_what_is_said() -> None:
    counts = duplicates.count({"train": ["a", "A"], "validation": ["b"], "test": ["a", "c"]})
    described: dict[str, Any] = {"duplicates": counts, "test_samples": 2}
    assert duplicates.duplicates_text(described) == (
        "duplicates, but for capitals and white space: 1 in train are repeated (0 letter by "
        "letter); 1 texts of test are in train"
    )
    assert "TEST TEXTS IN TRAIN (1 of 2, 50.0%)" in str(duplicates.overlap_warning(described))
    assert duplicates.overlap_warning({**described, "test_samples": 101}) is None
    assert duplicates.overlap_warning({**described, "test_samples": 100}) is not None
    clean = {"duplicates": duplicates.count({"train": ["a"], "test": ["b"]}), "test_samples": 1}
    for nothing in (clean, {"test_samples": 5}, {"duplicates": None}):  # older runs counted none
        assert duplicates.duplicates_text(nothing) is None
        assert duplicates.overlap_warning(nothing) is None


def test_a_dataset_counts_its_own(tmp_path: Path) -> None:
    rows = reviews(40)
    write(tmp_path / "train.csv", [*rows, *rows[:6]])
    write(tmp_path / "validation.csv", shouted(rows[:4]))
    write(tmp_path / "test.csv", [*rows[:2], *reviews(8, start=100)])
    found = load(TrainConfig(dataset=str(tmp_path)))
    assert found.describe()["duplicates"] == {
        "exact": {
            "train": 6, "validation": 0, "test": 0,
            "train/validation": 0, "train/test": 2, "validation/test": 0,
        },
        "folded": {
            "train": 6, "validation": 0, "test": 0,
            "train/validation": 4, "train/test": 2, "validation/test": 2,
        },
    }  # fmt: skip


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A test split that is the training split, each row twice."""
    rows = reviews(60)
    write(tmp_path / "data" / "train.csv", rows)
    write(tmp_path / "data" / "validation.csv", reviews(20, start=200))
    write(tmp_path / "data" / "test.csv", [*rows, *shouted(rows)])
    return tmp_path / "data"


def test_a_test_split_copied_from_train(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said before training and after it, kept in both files, and shown in the report."""
    out = tmp_path / "run"
    assert train.main(["--dataset", str(copied), *TINY, "--out", str(out)]) == 0
    said, folder = capsys.readouterr().out, RunFolder(out)
    line = "60 in test are repeated (0 letter by letter); 120 texts of test are in train (60 letter"
    warning = "TEST TEXTS IN TRAIN (120 of 120, 100.0%)"
    assert said.count(line) == 1 and said.count(warning) == 2
    for path in (folder.config, folder.results):
        kept = json.loads(path.read_text(encoding="utf-8"))["dataset"]["duplicates"]
        assert kept["exact"]["train/test"] == 60 and kept["folded"]["train/test"] == 120
    assert warning in json.loads(folder.results.read_text(encoding="utf-8"))["warning"]
    assert cli.main(["ensemble", str(out)]) == 0
    assert warning in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    assert cli.main(["report", str(out)]) == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert warning in page and line in page


def test_baselines_say_it_too(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    assert cli.main(["baseline", "nb", "--dataset", str(copied)]) == 0
    assert "TEST TEXTS IN TRAIN (120 of 120" in capsys.readouterr().out


def test_pretraining_says_it_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(tmp_path / "unlabelled.csv", "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([["text"], *([text] for text, _ in reviews(30) * 2)])
    out = tmp_path / "run"
    assert cli.main(["pretrain", "--dataset", str(tmp_path), *TINY, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "duplicates, but for capitals and white space: " in said
    kept = json.loads(RunFolder(out).results.read_text(encoding="utf-8"))["dataset"]["duplicates"]
    assert kept["exact"] == kept["folded"] and set(kept["exact"]) == {
        "train", "held_out", "train/held_out"
    }  # fmt: skip
    assert sum(kept["exact"].values()) == 30
