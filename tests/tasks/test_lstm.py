"""The LSTM baseline: its settings and its runs."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fasttx.commands import cli
from fasttx.config import RECIPES, ModelConfig, TrainConfig
from fasttx.device import autocast
from fasttx.tasks import lstm
from fasttx.text import splits as data
from fasttx.training import run as runs
from fasttx.training.checkpoint import Progress, RunConfig
from fasttx.training.distributed import Processes
from fasttx.training.folder import RunFolder
from fasttx.training.predictions import Predictions
from fasttx.training.trainer import Trainer

DEMO = ["--dataset", "demo", "--train-samples", "120", "--test-samples", "40", "--device", "cpu"]


def command(*arguments: object) -> int:
    return cli.main(["baseline", "lstm", *map(str, arguments)])


def test_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a"
    assert command(*DEMO, "--epochs", 2, "--json", "--out", out) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((out / "results.json").read_text())
    assert found["baseline"] == "lstm" and found["hidden_size"] == 132
    assert sum(map(sum, found["confusion_matrix"])) == 40
    assert [row["epoch"] for row in found["history"]] == [1, 2]
    best = max(found["history"], key=lambda row: (row["val_accuracy"], -row["val_loss"]))
    assert (found["best_epoch"], found["val_accuracy"]) == (best["epoch"], best["val_accuracy"])
    weights = torch.load(out / "best_model.pt", weights_only=True)
    assert sum(w.numel() for w in weights.values()) == found["parameters"]
    assert "120 reviews" in (out / "train.log").read_text()

    same = data.load(TrainConfig(dataset="demo", train_samples=120, test_samples=40))
    assert found["dataset"]["fingerprint"] == same.fingerprint
    for name in ("vocab_size", "max_len", "d_model"):
        assert found["config"]["model"][name] == getattr(RECIPES["demo"].model, name)
    assert found["config"]["truncation"] == RECIPES["demo"].truncation

    assert command("--resume", out) == 0
    assert "is finished" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        command("--resume", out, "--epochs", 3, "--out", out)
    assert "leave out --epochs, --out" in capsys.readouterr().err


def runs_here(precision: str) -> bool:
    """torch has no bfloat16 LSTM for some processors (oneDNN asks for AVX-512)."""
    with contextlib.suppress(RuntimeError), autocast(torch.device("cpu"), precision):
        torch.nn.LSTM(8, 8)(torch.zeros(2, 3, 8))
        return True
    return False


def test_in_bfloat16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The flag reaches the training, and the loss stays near that of fp32; where torch cannot, it
    says so before it makes anything."""
    losses = {}
    for precision in ("fp32", "bf16"):
        out = tmp_path / precision
        given = [*DEMO, "--epochs", 1, "--json", "--out", out, "--precision", precision]
        if not runs_here(precision):
            assert precision == "bf16" and command(*given) == 2
            assert "precision bf16 is not available to an LSTM" in capsys.readouterr().err
            assert not out.exists()
            return
        assert command(*given) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["config"]["precision"] == precision
        losses[precision] = found["history"][0]["train_loss"]
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.01)


def test_a_precision_that_cannot_be_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(*DEMO, "--precision", "fp8") == 2
    assert "precision" in capsys.readouterr().err

    def refuse(*args: object) -> None:
        raise RuntimeError("could not create a primitive descriptor\nmore")

    monkeypatch.setattr(torch.nn.LSTM, "forward", refuse)
    assert command(*DEMO, "--out", tmp_path / "run") == 2
    message = capsys.readouterr().err
    assert "could not create a primitive descriptor'. Use --precision fp32" in message
    assert not (tmp_path / "run").exists()


def test_the_settings_of_a_run_on_imdb() -> None:
    full, config = RECIPES["full"], lstm.settings({"seed": 7}, "imdb")
    changed = {"dataset": "imdb", "seed": 7, "lr": 1e-3, "model": config.model}
    assert config == replace(full, **changed)
    assert (config.model.dropout, config.model.max_len) == (0.3, full.model.max_len)


def test_killed_and_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that stops after a step goes on to bit-identical weights."""
    settings = [*DEMO, "--epochs", 2, "--json"]
    assert command(*settings, "--out", tmp_path / "whole") == 0
    whole = json.loads(capsys.readouterr().out)

    fit = Trainer.fit

    def stopped(self: Trainer, on_batch, *others) -> Progress:
        def stop(progress: Progress, samples: int) -> None:
            self._stop = progress.step == 5  # in the second epoch of four steps

        return fit(self, stop, *others)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "fit", stopped)
        assert command(*settings, "--out", tmp_path / "broken") == 130
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "broken" / "results.json").exists()
    assert command("--resume", tmp_path / "broken", "--json") == 0
    resumed = json.loads(capsys.readouterr().out)
    # Not begun again, which would end in the same weights.
    assert "going on from epoch 2, step 5" in (tmp_path / "broken" / "train.log").read_text()

    for key in ("test", "val_accuracy", "best_epoch", "config", "dataset"):
        assert resumed[key] == whole[key], key
    ours, theirs = (
        torch.load(tmp_path / name / "last.ckpt", weights_only=True)["model"]
        for name in ("whole", "broken")
    )
    assert all(torch.equal(w, theirs[name]) for name, w in ours.items())


def test_a_run_of_train_py_is_not_taken_for_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunConfig(RECIPES["demo"], "sdpa", "cpu", ("a", "b"), {}, "demo", "classification")
    folder = RunFolder(tmp_path)
    folder.write_json(folder.config, run.to_dict())
    folder.seal()
    assert command("--resume", tmp_path) == 2
    assert "a run of classification; expected the LSTM baseline" in capsys.readouterr().err


def test_it_learns_what_needs_word_order(tmp_path: Path) -> None:
    """Which word comes first: no bag of words could tell."""
    rng = torch.Generator().manual_seed(0)
    first, second = torch.randint(0, 2, (2, 200), generator=rng)
    rows = [
        json.dumps({"text": f"w{a} filler w{b}", "label": a})
        for a, b in zip(first.tolist(), second.tolist(), strict=True)
        if a != b
    ]
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    model = ModelConfig(d_model=16, num_heads=2, num_layers=1, d_ff=16, vocab_size=8, dropout=0.0)
    config = TrainConfig(lr=1e-2, epochs=10, batch_size=16, device="cpu", model=model)
    source = data.resolve(str(tmp_path))
    run = runs.create(lstm.TASK, config, source, "lstm", tmp_path / "run", Processes())
    assert runs.train(run)["test_accuracy"] == 1.0
    kept = Predictions.load(run.folder.test_predictions, 2)
    assert np.array_equal(kept.predicted, [json.loads(row)["label"] for row in rows])
