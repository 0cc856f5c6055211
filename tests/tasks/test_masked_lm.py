"""Pretraining: what it learns, what is handed on, and its runs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import fasttx
import train
from fasttx.commands import cli
from fasttx.config import ConfigError, ModelConfig, PretrainConfig
from fasttx.errors import CheckpointError
from fasttx.tasks import TASKS
from fasttx.text.packing import RaggedIds
from fasttx.training.checkpoint import RunConfig, load_state
from fasttx.training.distributed import Processes
from fasttx.training.folder import RunFolder
from fasttx.training.task import Examples, Run, Splits
from fasttx.training.trainer import BATCH_STREAM, Trainer

MODEL = ModelConfig(
    vocab_size=50, d_model=32, num_heads=4, num_layers=2, d_ff=64, max_len=40,
    attn_backend="reference",
)  # fmt: skip
SIZES = (
    "--vocab-size 400 --d-model 32 --num-heads 2 --num-layers 1 --d-ff 64 --max-len 32 "
    "--attn-backend reference"
).split()
QUICK = [*SIZES, *"--dataset demo --train-samples 300 --epochs 2".split()]


def examples(texts: int = 400, vocab: int = 50) -> Examples:
    rng = np.random.default_rng(0)
    ids = RaggedIds.from_lists(
        [rng.integers(1, vocab, rng.integers(1, 40)).tolist() for _ in range(texts)]
    )
    return Examples(ids, np.zeros(texts, dtype=np.int64))


def test_pretrain_then_fine_tune(tmp_path: Path) -> None:
    run, tuned = tmp_path / "pretrained", tmp_path / "tuned"
    settings = "--train-samples 4000 --epochs 4 --lr 0.005 --warmup-steps 20".split()
    assert cli.main(["pretrain", *QUICK, *settings, "--out", str(run)]) == 0
    results = json.loads((run / "results.json").read_text())
    # 400 words, of which the demo's grammar leaves few possible at a place: far below chance's 400.
    assert results["perplexity"] < 150
    assert results["masked_loss"] == pytest.approx(math.log(results["perplexity"]))
    assert "--init-from" in (run / "train.log").read_text(encoding="utf-8")

    # The sizes are those of the encoder, the recipe is the one for it.
    arguments = "--dataset demo --train-samples 300 --test-samples 50 --attn-backend sdpa".split()
    arguments += ["--init-from", str(run), "--out", str(tuned)]
    assert train.main(arguments) == 0
    assert (tuned / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()
    tuned_results = json.loads((tuned / "results.json").read_text())
    assert tuned_results["config"]["init_from"] == str(run)
    assert tuned_results["config"]["model"]["d_model"] == 32
    before, after = (load_state(f / "best_model.pt") for f in (run, tuned))
    moved = (after["embedding"] - before["embedding"]).norm() / before["embedding"].norm()
    assert 0 < moved < 0.5
    fasttx.load(tuned, device="cpu").predict(["fine"])


def test_an_unbroken_run_and_a_resumed_one_are_the_same(tmp_path: Path, monkeypatch) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert cli.main(["pretrain", *QUICK, "--out", str(whole)]) == 0

    step, calls = Trainer._step, iter(range(1000))

    def until_interrupted(self, *arguments):
        step(self, *arguments)
        self._stop = next(calls) == 6  # in the middle of the second epoch

    monkeypatch.setattr(Trainer, "_step", until_interrupted)
    assert cli.main(["pretrain", *QUICK, "--out", str(parts)]) == 130
    monkeypatch.setattr(Trainer, "_step", step)
    assert not (parts / "results.json").exists()
    assert cli.main(["pretrain", "--resume", str(parts)]) == 0
    one, other = (load_state(f / "best_model.pt") for f in (whole, parts))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)


def test_runs_of_the_two_kinds_are_told_apart(tmp_path: Path, capsys) -> None:
    run = tmp_path / "pretrained"
    assert cli.main(["pretrain", *QUICK, "--epochs", "1", "--out", str(run)]) == 0
    with pytest.raises(CheckpointError, match=r"a run of pretraining.*--init-from"):
        fasttx.load(run)
    assert train.main(["--resume", str(run)]) == 2
    assert "fasttx pretrain --resume" in capsys.readouterr().err

    assert train.main([*QUICK, "--d-model", "64", "--init-from", str(run)]) == 2
    message = capsys.readouterr().err
    assert "d_model is 64, and 32 in" in message
    assert "--d-model 32" in message
    assert train.main([*QUICK, "--init-from", str(tmp_path / "none")]) == 2
    assert "is no fasttx run" in capsys.readouterr().err


def test_resume_on_other_texts_is_refused(tmp_path: Path, capsys) -> None:
    folder, run = tmp_path / "texts", tmp_path / "run"
    folder.mkdir()
    rows = [json.dumps({"text": f"number {i} of many", "label": i % 2}) for i in range(40)]
    (folder / "train.jsonl").write_text("\n".join(rows))
    arguments = [*SIZES, "--epochs", "1", "--dataset", str(folder), "--out", str(run)]
    assert cli.main(["pretrain", *arguments]) == 0
    (run / "results.json").unlink()
    (folder / "train.jsonl").write_text("\n".join(rows[1:]))
    assert cli.main(["pretrain", "--resume", str(run)]) == 2
    assert "was made with other texts" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["pretrain", "--resume", str(run), "--lr", "1"])
    assert "leave out --lr" in capsys.readouterr().err


def test_a_share_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="mask_share is 1"):
        PretrainConfig(mask_share=1.0)


def test_batches_come_in_few_sizes_where_shapes_are_kept(tmp_path: Path) -> None:
    """torch keeps a kernel for every shape of a bfloat16 product on a CPU."""
    task, given = TASKS["pretraining"].load(), examples()

    def sizes(precision: str) -> tuple[set[int], set[int]]:
        config = PretrainConfig(precision=precision, model=MODEL)
        saved = RunConfig(config, "reference", "cpu", (), {}, None, task.name)
        here, splits = torch.device("cpu"), Splits(given, given)
        run = Run(task, saved, RunFolder(tmp_path), here, Processes(), splits)
        batches = [task.batch(run, given, np.arange(i, i + 60), (0, i)) for i in range(0, 300, 20)]
        for batch in batches:
            assert batch.rows is not None and batch.labels is not None
            assert len(batch.rows) == len(batch.labels)
        return {len(b.input_ids) for b in batches}, {len(b.rows) for b in batches}  # type: ignore[arg-type]

    tokens, words = sizes("bf16")
    assert all(n % 128 == 0 for n in tokens)
    assert all(n % 32 == 0 and n for n in words)
    tokens, words = sizes("fp32")
    assert any(n % 128 for n in tokens)
    assert any(n % 32 for n in words)


class Of(Processes):
    """A process of its own random numbers; another one hides `others` words in the same step."""

    others = 0

    def share(self, indices):
        return indices

    def sum(self, tensor):
        return tensor.detach().clone() + self.others


def gradients(folder: Path, processes: Processes) -> tuple[Trainer, list[torch.Tensor]]:
    """The trainer, and the gradients of one step on two batches of 3 and 5 texts."""
    task, given = TASKS["pretraining"].load(), examples()
    config = PretrainConfig(model=replace(MODEL, dropout=0.0), grad_accumulation=2, optimizer="sgd")
    saved = RunConfig(config, "reference", "cpu", (), {}, None, task.name)
    run = Run(task, saved, RunFolder(folder), torch.device("cpu"), processes, Splits(given, given))
    torch.manual_seed(0)
    trainer = Trainer(run, task.model(config.model))
    trainer._step([(0, np.arange(3)), (1, np.arange(3, 8))])
    return trainer, [p.grad for p in trainer.model.parameters()]


def test_the_loss_of_a_step_is_the_mean_over_its_hidden_words(tmp_path: Path) -> None:
    """However many batches the step takes them in: a batch with few hidden words weighs less."""
    trainer, found = gradients(tmp_path, Processes())
    run = trainer.run
    torch.manual_seed(0)
    model = run.task.model(run.config.train.model)
    total, words = torch.zeros(()), 0
    for number, indices in ((0, np.arange(3)), (1, np.arange(3, 8))):
        batch = run.task.batch(run, run.splits.train, indices, (0, BATCH_STREAM, 0, number, 0))
        total = total + run.task.loss(run, model, batch)[0]
        words += len(batch.labels)
    (total / words).backward()
    for mine, theirs in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs.grad, rtol=1e-5, atol=1e-7)
    assert trainer.progress.samples == 8
    assert trainer._totals[2:].tolist() == [words, 8]
    assert trainer._totals[0].item() == pytest.approx(total.item(), rel=1e-6)


def test_processes_share_the_mean_over_hidden_words(tmp_path: Path) -> None:
    """A process that hides few words counts for as many as it hides."""
    alone = [gradients(tmp_path, Of(rank)) for rank in range(2)]
    words = [int(trainer._totals[2]) for trainer, _ in alone]
    assert words[0] != words[1]
    for rank in range(2):
        processes = Of(rank)
        object.__setattr__(processes, "others", words[1 - rank])
        _, found = gradients(tmp_path, processes)
        for shared, own in zip(found, alone[rank][1], strict=True):
            share = words[rank] / sum(words)
            torch.testing.assert_close(shared, own * share, rtol=1e-5, atol=1e-7)
