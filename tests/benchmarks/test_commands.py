"""The benchmarks as a person starts them: what they save, compare, print, draw and refuse.

That each of them runs is CI's own step, `make bench-once`. Nothing here asserts a time.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import figures
import latency_level
import pytest
import side_by_side
import torch

from tests import forks

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
CPU = torch.device("cpu")


def run(*command, cwd=ROOT, **environment):
    # pytest-benchmark takes no times in a worker of xdist, and this process may be one.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment = {"FASTTX_DATA": "", "CUDA_VISIBLE_DEVICES": "", **environment}
    return forks.run([*map(str, command)], cwd, inherited | environment)


PLANTED = """
import time
from pathlib import Path

import pytest
import torch
from contest import Contest


class Sleeper:
    note = ""
    def prepare(self): pass
    def verify(self): pass
    def step(self, i):
        time.sleep(float(Path(__file__).with_name("seconds").read_text()))


def make(setting):
    return Contest("sleep", setting.device, 1, 1, {"peer": Sleeper(), "fasttx-x": Sleeper()})


@pytest.mark.parametrize("contest", [pytest.param(make, id="batch1")], indirect=True)
@pytest.mark.parametrize("name", ["peer", "fasttx-x"])
def test_sleep(compete, name):
    compete(name)
"""


def test_saving_and_comparing(tmp_path):
    """The first run has nothing to compare with, the second has, a slow-down is found."""
    folder = tmp_path / "benchmarks"
    shutil.copytree(BENCHMARKS, folder, ignore=shutil.ignore_patterns("bench_*", "__pycache__"))
    (tmp_path / "fasttx").symlink_to(ROOT / "fasttx")
    (folder / "bench_planted.py").write_text(PLANTED)
    (folder / "seconds").write_text("0.01")
    # As a person would ask: 10 %. Two honest runs on a busy machine may differ by more.
    fail, lenient = (f"--benchmark-compare-fail=median:{n}%" for n in (10, 300))
    pytest_ = ("-m", "pytest", "-p", "no:xdist")

    first = run(
        *pytest_,
        "benchmarks/",
        "--benchmark-compare",
        lenient,
        cwd=tmp_path,
        OMP_WAIT_POLICY="PASSIVE",
    )
    assert first.returncode == 0, first.stdout + first.stderr
    assert "there is nothing to compare with" in " ".join(first.stdout.split())
    assert "Warning" not in first.stdout + first.stderr
    assert "contestant  samples/s  ratio" in first.stdout

    second = run(*pytest_, "--benchmark-compare", lenient, cwd=folder, OMP_WAIT_POLICY="ACTIVE")
    assert second.returncode == 0, second.stdout + second.stderr
    assert "(0001_run)" in second.stdout and "(NOW)" in second.stdout
    assert "changed: OMP_WAIT_POLICY PASSIVE then, ACTIVE now." in second.stdout

    saved = sorted((tmp_path / ".benchmarks").rglob("*.json"))
    assert [path.name for path in saved] == ["0001_run.json", "0002_run.json"]
    record = json.loads(saved[1].read_text())
    infos = {b["name"]: b["extra_info"] for b in record["benchmarks"]}
    assert infos["test_sleep[fasttx-x-batch1]"]["samples_per_second"] > 0
    assert record["machine_info"]["fasttx"]["cpu"] == figures.environment(CPU)["cpu"]

    (folder / "seconds").write_text("0.1")
    third = run(*pytest_, folder, "--benchmark-compare", fail, cwd=ROOT)
    assert third.returncode == 1, third.stdout + third.stderr
    assert "Performance has regressed" in third.stdout + third.stderr


def test_side_by_side(tmp_path):
    path = tmp_path / "figures.json"
    done = run(
        BENCHMARKS / "side_by_side.py", "--level", "inference", "--rounds", "2", "--json", path,
        "--contestants", "padded-sdpa", "fasttx-sdpa", "--allocator", "tuned", "--d-model", "64",
        "--num-heads", "2", "--batch-size", "2", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert ", d_model 64, num_heads 2" in done.stdout
    assert "tuned allocator" in done.stdout and "fasttx-sdpa" in done.stdout
    (record,) = json.loads(path.read_text())
    assert [row["contestant"] for row in record["rows"]] == ["padded-sdpa", "fasttx-sdpa"]
    assert record["level"] == "inference" and record["environment"]["load"] is not None


def test_latency(tmp_path):
    """Each contestant in a process of its own, asked in three conditions."""
    path = tmp_path / "figures.json"
    done = run(
        BENCHMARKS / "side_by_side.py", "--level", "latency", "--rounds", "2", "--json", path,
        "--contestants", "padded-sdpa", "fasttx-sdpa", "--max-len", "16", "--d-model", "64",
        "--num-heads", "2", "--markdown", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (record,) = json.loads(path.read_text())
    rows = record["rows"]
    assert {(row["condition"], row["calls"]) for row in rows} == {
        (condition, 2 * calls) for condition, calls in latency_level.CALLS.items()
    }
    assert [(row["contestant"], row["tokens"]) for row in rows[:2]] == [
        ("padded-sdpa", 16), ("padded-sdpa", 1)
    ]  # fmt: skip
    assert all(0 < row["p50_ms"] <= row["p99_ms"] for row in rows)
    for condition in latency_level.CONDITIONS:
        assert f"\n{condition}, by tokens" in done.stdout
    assert "| contestant | 1 | 16 |\n| --- | --- | --- |\n| padded-sdpa | " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--rounds", "1"], "--rounds is 1; expected at least 2"),
        (["--d-model", "100"], "d_model is 100 and num_heads is 8; expected a d_model that"),
        (["--level", "latency", "--contestants", "nobody"], "nobody; expected some of nn.Trans"),
    ],
)
def test_side_by_side_refuses(arguments, complaint):
    done = run(BENCHMARKS / "side_by_side.py", *arguments)
    assert done.returncode == 2
    assert complaint in done.stderr


def test_side_by_side_says_in_one_line_who_fails_verification(monkeypatch):
    def enter(self, name):
        raise AssertionError(f"{name}: logits are 0.2 from the reference's")

    monkeypatch.setattr(side_by_side.Contest, "enter", enter)
    arguments = ["--level", "text", "--contestants", "fasttx-fp32", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["side_by_side.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        side_by_side.main()
    assert stopped.value.code == "side_by_side.py: fasttx-fp32: logits are 0.2 from the reference's"


def saved_run(path):
    def benchmark(contest, name, **facts):
        row = {
            "contestant": name, "samples_per_second": 10.0, "ms": 5.0, "ideal_ms": 2.0,
            "artefact": False, "rounds": 3, "note": "", **facts,
        }  # fmt: skip
        return {"group": contest, "extra_info": row}

    attention = {"level": "attention", "backward": True, "p": 0.1, "dtype": "float32"}
    records = [
        benchmark(f"n{n}", name, **attention, lengths=f"{n} tokens each", tokens=8192.0)
        for n in (64, 128)
        for name in ("padded-sdpa", "fasttx-sdpa")
    ]
    training = {"level": "training", "batch": 32, "lengths": "real reviews"}
    records += [benchmark("t", name, **training) for name in ("padded-sdpa", "fasttx-sdpa")]
    where = figures.environment(CPU) | {"cpu": "A fine processor"}
    path.write_text(json.dumps({"machine_info": {"fasttx": where}, "benchmarks": records}))


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    saved_run(tmp_path / "0001_run.json")
    done = run(BENCHMARKS / "plots.py", tmp_path / "0001_run.json", "--folder", tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("samples-per-second", "attention-throughput", "attention-time"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        drawn = (tmp_path / f"{name}.svg").read_text()
        assert ">fasttx-sdpa<" in drawn and "A fine processor" in drawn
        assert "mathdefault" not in drawn
    empty = tmp_path / "0002_run.json"
    where = {"machine_info": {"fasttx": figures.environment(CPU)}, "benchmarks": []}
    empty.write_text(json.dumps(where))
    done = run(BENCHMARKS / "plots.py", empty, "--folder", tmp_path / "none")
    assert done.stdout.count("not measured") == 3
    assert not list((tmp_path / "none").iterdir())


def test_curves(tmp_path):
    pytest.importorskip("matplotlib")
    epoch = {"seconds": 2.0, "samples_per_second": 500.0, "train_loss": 0.5, "val_loss": 0.6,
             "train_accuracy": 0.8, "val_accuracy": 0.75}  # fmt: skip
    results = {
        "history": [epoch, epoch], "best_epoch": 1, "test_accuracy": 0.7, "val_accuracy": 0.75,
        "seed": 3, "hardware": {"cpu": "A fine processor", "threads": 2},
        "versions": {"torch": "9.9"},
    }  # fmt: skip
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(results))
    arguments = (f"the first={tmp_path / 'a'}", tmp_path / "b", "--folder", tmp_path)
    done = run(BENCHMARKS / "curves.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "learning-curves.png").read_bytes().startswith(b"\x89PNG")
    drawn = (tmp_path / "learning-curves.svg").read_text()
    for text in ("the first", ">b<", "seed 3", "A fine processor, 2 threads, torch 9.9"):
        assert text in drawn
    done = run(BENCHMARKS / "curves.py", tmp_path / "none")
    assert done.returncode == 2
    assert "none is no finished run of train.py" in done.stderr
