"""Run folders of an earlier revision (8fdc31c, in tests/data/runs) are read as that one read them.

Of each task one run is finished, and one was interrupted in its second epoch of three. What that
revision answered, and where its runs ended, stands in expected.json.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import fasttx
import train
from fasttx.commands import cli
from fasttx.training.folder import RunFolder

RUNS = Path(__file__).resolve().parent / "data" / "runs"
EXPECTED: dict[str, Any] = json.loads((RUNS / "expected.json").read_text(encoding="utf-8"))
RESUME = {
    "classification-half": lambda run: train.main(["--resume", run]),
    "pretraining-half": lambda run: cli.main(["pretrain", "--resume", run]),
    "lstm-half": lambda run: cli.main(["baseline", "lstm", "--resume", run]),
}


@pytest.fixture
def run(request, tmp_path, monkeypatch) -> Path:
    """A copy of the folder that the test names."""
    monkeypatch.setenv("FASTTX_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(RUNS / request.param, tmp_path / request.param))


@pytest.mark.parametrize("run", EXPECTED["predict"], indirect=True)
def test_it_predicts(run):
    wanted = EXPECTED["predict"][run.name]
    found = fasttx.load(run).predict([p["text"] for p in wanted])
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.label == theirs["label"]
        assert mine.probabilities == pytest.approx(theirs["probabilities"], abs=1e-5)


@pytest.mark.parametrize("run", EXPECTED["evaluate"], indirect=True)
def test_it_is_evaluated(run, capsys):
    assert cli.main(["evaluate", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    wanted = EXPECTED["evaluate"][run.name]
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("run", RESUME, indirect=True)
def test_it_is_resumed(run):
    """And ends where the earlier revision ended it, but for what another processor rounds."""
    assert RESUME[run.name](str(run)) == 0
    wanted, folder = EXPECTED["resumed"][run.name], RunFolder(run)
    results = json.loads(folder.results.read_text(encoding="utf-8"))
    losses = {k: v for k, v in wanted["results"].items() if k.endswith(("loss", "perplexity"))}
    assert {k: results[k] for k in losses} == pytest.approx(losses, rel=1e-4)
    assert results["parameters"] == wanted["results"]["parameters"]
    lines = folder.metrics.read_text(encoding="utf-8").splitlines()
    epochs = [row for row in map(json.loads, lines) if row["kind"] == "epoch"]
    for mine, theirs in zip(epochs, wanted["epochs"], strict=True):
        assert mine["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-4)
        # Of pretraining it was the mean over batches, and is now the mean over hidden words.
        close = 1e-2 if "pretraining" in run.name else 1e-4
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=close)


@pytest.mark.parametrize("run", ["classification-finished"], indirect=True)
def test_it_is_reported_and_explained(run, capsys):
    pytest.importorskip("matplotlib")
    assert cli.main(["report", str(run)]) == 0
    assert "50.00&nbsp;%" in (run / "report.html").read_text(encoding="utf-8")
    assert cli.main(["explain", str(run), "A dull film."]) == 0
    assert "margin over" in capsys.readouterr().out


@pytest.mark.parametrize("run", ["pretraining-finished", "classification-finished"], indirect=True)
def test_a_new_run_starts_from_its_encoder(run, tmp_path):
    state = torch.load(run / "best_model.pt", weights_only=True)
    out = tmp_path / "new"
    settings = (
        "--dataset demo --train-samples 64 --test-samples 20 --batch-size 8 --epochs 1 --lr 0 "
        "--max-len 16 --weight-decay 0 --attn-backend reference"
    )
    assert train.main([*settings.split(), "--init-from", str(run), "--out", str(out)]) == 0
    found = torch.load(out / "best_model.pt", weights_only=True)
    for name in (name for name in found if not name.startswith("head.")):
        assert torch.equal(found[name], state[name]), name
