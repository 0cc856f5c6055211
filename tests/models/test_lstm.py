"""The LSTM baseline: what it computes, how large it is, and its runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fasttx.commands import baseline as baselines
from fasttx.commands import cli
from fasttx.config import RECIPES, ModelConfig, TrainConfig
from fasttx.models.classifier import TransformerClassifier
from fasttx.models.lstm import LSTMClassifier
from fasttx.ops.dropout import keep_scale, row_keep, site_seeds, threshold
from fasttx.text import splits as data
from fasttx.training import run as runs
from fasttx.training.checkpoint import Progress, RunConfig
from fasttx.training.distributed import Processes
from fasttx.training.predictions import Predictions
from fasttx.training.trainer import Trainer

CONFIG = ModelConfig(
    vocab_size=50, num_classes=3, d_model=16, num_heads=2, num_layers=1, d_ff=32, dropout=0.3
)
LENGTHS = (5, 0, 9, 1, 9)


def packed(dead_tail: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (T,) and cu_seqlens of texts of LENGTHS, one of them empty and two equally long."""
    ids = torch.randint(2, 50, (sum(LENGTHS) + dead_tail,))
    return ids, torch.tensor([0, *LENGTHS]).cumsum(0).int()


def bidirectional(model: LSTMClassifier) -> torch.nn.LSTM:
    """Torch's own LSTM in both directions, with the weights of `model`."""
    lstm = torch.nn.LSTM(CONFIG.d_model, model.hidden_size, bidirectional=True)
    weights = dict(model.onward.named_parameters())
    weights |= {f"{name}_reverse": w for name, w in model.from_end.named_parameters()}
    for name, weight in weights.items():
        delattr(lstm, name)
        setattr(lstm, name, weight)
    return lstm


def by_torch(
    model: LSTMClassifier, ids: torch.Tensor, cu_seqlens: torch.Tensor, p: float = 0.0,
    seed: int = 0,
) -> torch.Tensor:  # fmt: skip
    """Logits from torch's bidirectional LSTM on each text by itself, an ordinary (L, 1, d) tensor,
    with the shared dropout masks of `seed` around it."""
    seeds, t, lstm = site_seeds(torch.tensor(seed), 2), threshold(p), bidirectional(model)

    def drop(x: torch.Tensor, site: int) -> torch.Tensor:
        return x * row_keep(seeds[site], *x.shape, t) * keep_scale(t)

    words = drop(model.embedding[ids], 0)[: cu_seqlens[-1]]
    pooled = [
        lstm(text[:, None])[0].mean((0, 1)) if len(text) else text.new_zeros(24)
        for text in words.split(cu_seqlens.diff().tolist())
    ]
    return model.classify(drop(torch.stack(pooled), 1))


@pytest.mark.parametrize("dead_tail", [0, 7])
def test_packed_equals_one_by_one(dead_tail: int) -> None:
    model = LSTMClassifier(CONFIG).eval()
    ids, cu_seqlens = packed(dead_tail)
    logits = model(ids, cu_seqlens=cu_seqlens)
    assert logits.shape == (len(LENGTHS), 3)
    torch.testing.assert_close(logits, by_torch(model, ids, cu_seqlens))
    roomy = model(ids, cu_seqlens=cu_seqlens, max_seqlen=20)  # any upper bound will do
    torch.testing.assert_close(roomy, logits)


def test_gradients_equal_those_of_one_by_one() -> None:
    model = LSTMClassifier(CONFIG).double().eval()
    ids, cu_seqlens = packed(dead_tail=3)
    weights = list(model.parameters())
    mine = torch.autograd.grad(model(ids, cu_seqlens=cu_seqlens).square().sum(), weights)
    theirs = torch.autograd.grad(by_torch(model, ids, cu_seqlens).square().sum(), weights)
    torch.testing.assert_close(mine, theirs)


def test_texts_without_a_word() -> None:
    model = LSTMClassifier(CONFIG).eval()
    logits = model(torch.zeros(0, dtype=torch.int64), cu_seqlens=torch.zeros(3, dtype=torch.int32))
    torch.testing.assert_close(logits, model.classify.bias.expand(2, 3))


def test_dropout_is_a_function_of_the_seed() -> None:
    model = LSTMClassifier(CONFIG).train()
    ids, cu_seqlens = packed()
    one, two = (model(ids, cu_seqlens=cu_seqlens, seed=torch.tensor(seed)) for seed in (1, 2))
    torch.testing.assert_close(one, by_torch(model, ids, cu_seqlens, CONFIG.dropout, seed=1))
    assert not torch.equal(one, two)
    with pytest.raises(TypeError, match="dropout needs a"):
        model(ids, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_is_as_large_as_the_transformer(recipe: str) -> None:
    config = replace(RECIPES[recipe].model, attn_backend="reference")
    lstm, transformer = (
        sum(p.numel() for p in build(config).parameters())
        for build in (LSTMClassifier, TransformerClassifier.from_config)
    )
    assert abs(lstm - transformer) < 0.05 * transformer
    if recipe == "full":
        assert lstm == 5_798_562  # as docs/accuracy.md says


# --- runs -----------------------------------------------------------------------------------------

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
    assert command("--resume", out, "--epochs", 3, "--out", out) == 2
    assert "leave out --epochs, --out" in capsys.readouterr().err


def test_in_bfloat16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The flag reaches the training, and the loss stays near that of fp32."""
    losses = {}
    for precision in ("fp32", "bf16"):
        out = tmp_path / precision
        given = [*DEMO, "--epochs", 1, "--json", "--out", out, "--precision", precision]
        assert command(*given) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["config"]["precision"] == precision
        losses[precision] = found["history"][0]["train_loss"]
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.01)

    assert command(*DEMO, "--precision", "fp8") == 2
    assert "precision" in capsys.readouterr().err


def test_the_settings_of_a_run_on_imdb() -> None:
    full, config = RECIPES["full"], baselines.lstm_config({"seed": 7}, "imdb")
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

    def stopped(self: Trainer, train, validation, on_batch, on_epoch) -> Progress:
        def stop(progress: Progress, reviews: int) -> None:
            self._stop = progress.step == 5  # in the second epoch of four steps

        return fit(self, train, validation, stop, on_epoch)

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
    run = RunConfig(RECIPES["demo"], "sdpa", "cpu", ("a", "b"), {}, "demo")
    run.save(tmp_path / "config.json")
    assert command("--resume", tmp_path) == 2
    assert "a run of classification; expected the LSTM baseline" in capsys.readouterr().err


def test_it_learns_what_needs_word_order(tmp_path: Path) -> None:
    """Which word comes first: no bag of words could tell."""
    rng = torch.Generator().manual_seed(0)
    first, second = torch.randint(0, 2, (2, 200), generator=rng)
    texts = [f"w{a} filler w{b}" for a, b in zip(first.tolist(), second.tolist(), strict=True)]
    split = data.Split([t for t in texts if t[:2] != t[-2:]], (first[first != second]).numpy())
    dataset = data.TextDataset("order", ["a", "b"], split, split, split, [], "")
    model = ModelConfig(d_model=16, num_heads=2, num_layers=1, d_ff=16, vocab_size=8, dropout=0.0)
    config = TrainConfig(lr=1e-2, epochs=10, batch_size=16, device="cpu", model=model)
    folder = runs.new_folder(tmp_path / "run", "lstm", Processes())
    results = baselines.train_lstm(runs.create(config, "lstm", folder, dataset, Processes()))
    assert results["test_accuracy"] == 1.0
    kept = Predictions.load(folder.test_predictions, 2)
    assert np.array_equal(kept.predicted, split.labels)
