"""What the trackers are told: the numbers of metrics.jsonl, once, over interruptions too."""

from __future__ import annotations

import json
import logging
import sys
import types
from pathlib import Path

import pytest

import train
from fasttx.commands import cli
from fasttx.errors import ConfigError
from fasttx.training import trackers

SMALL = (
    "--dataset demo --train-samples 60 --test-samples 20 --epochs 2 --batch-size 20 --d-model 16 "
    "--num-heads 2 --num-layers 1 --d-ff 16 --max-len 16 --log-every 2 --device cpu"
).split()


class Seen(list):
    """A tracker that remembers."""

    def __init__(self, run, identity, settings, step):
        super().__init__()
        self.identity, self.settings, self.step, self.closed = identity, settings, step, None

    def log(self, values, step):
        self.append((step, dict(values)))

    def close(self, failed):
        self.closed = failed


@pytest.fixture
def seen(monkeypatch) -> list[Seen]:
    opened: list[Seen] = []

    def opening(*arguments):
        opened.append(Seen(*arguments))
        return opened[-1]

    monkeypatch.setitem(trackers.TRACKERS, "seen", opening)
    monkeypatch.setitem(sys.modules, "seen", types.ModuleType("seen"))
    sys.modules["seen"].__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    return opened


def test_a_tracker_is_told_what_metrics_jsonl_holds(tmp_path, seen):
    out = tmp_path / "run"
    assert train.main([*SMALL, "--out", str(out), "--log-to", "seen", "--log-to", "seen"]) == 0
    (tracker,) = seen
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    told = tracker[:-1]
    assert len(told) == len(rows) == 5  # six steps, two epochs
    for (step, values), row in zip(told, rows, strict=True):
        kind = row.pop("kind")
        assert step == row.pop("step", step)
        assert values == {f"{kind}/{name}": value for name, value in row.items()}
    results = json.loads((out / "results.json").read_text())
    step, values = tracker[-1]
    assert (step, values["result/test_accuracy"]) == (6, results["test_accuracy"])
    assert tracker.closed is False and tracker.step == 0
    assert tracker.settings["batch_size"] == 20 and tracker.settings["model.d_model"] == 16


def test_a_run_that_goes_on_is_the_same_run_there(tmp_path, seen, monkeypatch):
    from fasttx.errors import Interrupted
    from fasttx.training.trainer import Trainer

    out, end = tmp_path / "run", Trainer._end_epoch

    def stopped(self):
        row = end(self)
        if self.progress.epoch == 1 and len(seen) == 1:
            raise Interrupted
        return row

    monkeypatch.setattr(Trainer, "_end_epoch", stopped)
    assert train.main([*SMALL, "--out", str(out), "--log-to", "seen"]) == 130
    assert train.main(["--resume", str(out), "--log-to", "seen"]) == 0
    first, second = seen
    assert first.identity == second.identity
    assert (first.closed, second.closed, second.step) == (True, False, 3)
    assert [step for step, _ in second][:2] == [4, 6]


def test_a_tracker_that_fails_ends_nothing(tmp_path, seen, monkeypatch, caplog):
    def failing(self, values, step):
        raise ConnectionError("the service\nis away")

    monkeypatch.setattr(Seen, "log", failing)

    def absent(*arguments):
        raise RuntimeError("no login")

    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", absent)
    monkeypatch.setattr(trackers, "check", lambda names: None)
    with caplog.at_level(logging.WARNING, "fasttx"):
        code = train.main([*SMALL, "--out", str(tmp_path / "run"), "--log-to", "seen",
                           "--log-to", "tensorboard"])  # fmt: skip
    assert code == 0
    said = [record.getMessage() for record in caplog.records if "goes on without" in record.msg]
    assert len(said) == 2
    assert "tensorboard failed (RuntimeError: no login)" in said[0]
    assert "seen failed (ConnectionError: the service is away)" in said[1]


def test_names_are_checked_before_anything_is_made(tmp_path, capsys, monkeypatch):
    with pytest.raises(ConfigError, match="'nix'; expected one of tensorboard, wandb"):
        trackers.check(["nix"])
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    out = ["--out", str(tmp_path / "run"), "--log-to", "wandb"]
    for main, command in (
        (train.main, []), (cli.main, ["pretrain"]), (cli.main, ["baseline", "lstm"])
    ):  # fmt: skip
        assert main([*command, "--dataset", "demo", *out]) == 2
        assert "pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------- the trackers themselves


def run_with(name: str, tmp_path: Path) -> Path:
    out = tmp_path / "run"
    assert train.main([*SMALL, "--out", str(out), "--log-to", name]) == 0
    return out


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = run_with("tensorboard", tmp_path)
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [2, 4, 6]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [row["val_loss"] for row in rows if row["kind"] == "epoch"]
    assert [e.value for e in events.Scalars("epoch/val_loss")] == pytest.approx(losses)
    assert events.Scalars("result/test_accuracy")
    assert cli.main(["verify", str(out)]) == 0


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    run_with("wandb", tmp_path)
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content = file.read_bytes()
    assert b"epoch/val_loss" in content and b"result/test_accuracy" in content


def test_mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    run_with("mlflow", tmp_path)
    (found,) = mlflow.MlflowClient().search_runs(
        [mlflow.get_experiment_by_name("fasttx").experiment_id]
    )
    assert found.info.status == "FINISHED"
    assert found.data.params["batch_size"] == "20" and "result/test_accuracy" in found.data.metrics
    history = mlflow.MlflowClient().get_metric_history(found.info.run_id, "train/loss")
    assert sorted(m.step for m in history) == [2, 4, 6]


def test_trackio(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read at import
    pytest.importorskip("trackio")
    run_with("trackio", tmp_path)
    (database,) = (tmp_path / "trackio").rglob("fasttx*.db")
    import sqlite3

    with sqlite3.connect(database) as connection:
        rows = connection.execute("select step, metrics from metrics").fetchall()
    told = [(step, json.loads(values)) for step, values in rows]
    assert [step for step, values in told if "train/loss" in values] == [2, 4, 6]
