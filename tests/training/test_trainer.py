"""The loop: what it minimises, what it saves, and that a resume changes nothing."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fasttx.config import ModelConfig, TrainConfig
from fasttx.device import Uploads
from fasttx.errors import CheckpointError, DivergedError
from fasttx.models.classifier import TransformerClassifier
from fasttx.ops.dropout import forward_seed
from fasttx.tasks import TASKS
from fasttx.text.packing import RaggedIds, pack, shuffled_batches
from fasttx.text.reading import drop_words
from fasttx.training import inference
from fasttx.training.checkpoint import Progress, RunConfig, load_state
from fasttx.training.distributed import Processes
from fasttx.training.folder import RunFolder
from fasttx.training.optimizer import learning_rate, make_optimizer
from fasttx.training.progress import ProgressDisplay
from fasttx.training.task import Examples, Run, Splits
from fasttx.training.trainer import Interrupted, Trainer

MODEL = ModelConfig(
    vocab_size=100, d_model=32, num_heads=4, num_layers=2, d_ff=64, max_len=40, dropout=0.1
)
VARYING = {"seconds", "samples_per_second"}  # what a clock says differs from run to run


@pytest.fixture
def examples() -> Examples:
    rng = np.random.default_rng(0)
    ids = RaggedIds.from_lists(
        [rng.integers(2, 100, rng.integers(1, 40)).tolist() for _ in range(150)]
    )
    labels = np.array([int((ids[i] < 50).mean() > 0.5) for i in range(len(ids))])
    return Examples(ids, labels)


def make_trainer(folder: Path, examples: Examples, backend: str = "sdpa", **settings) -> Trainer:
    """Of a classifier that is measured on what it is trained on."""
    model = settings.pop("model", MODEL)
    config = TrainConfig(**{"epochs": 2, "lr": 1e-3, "log_every": 2, "model": model} | settings)
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    task, splits = TASKS["classification"].load(), Splits(examples, examples)
    saved = RunConfig(config, backend, "cpu", ("a", "b"), {}, None, task.name)
    run = Run(task, saved, RunFolder(folder), torch.device("cpu"), Processes(), splits)
    return Trainer(run, task.model(model))


def lines(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in VARYING} for row in rows]


def test_learning_rate_against_torch_schedulers() -> None:
    config = TrainConfig(lr=0.5, warmup_steps=10, schedule="cosine")
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=90)
    for step in range(10, 100):
        assert learning_rate(config, step, 100) == pytest.approx(cosine.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        cosine.step()
    assert [learning_rate(config, s, 100) for s in (0, 4, 9)] == pytest.approx([0.05, 0.25, 0.5])
    assert learning_rate(TrainConfig(lr=0.1), 10**6, 10) == 0.1


def test_weight_decay_spares_vectors() -> None:
    model = TransformerClassifier.from_config(MODEL)
    decayed, spared = make_optimizer(
        model, TrainConfig(optimizer="adamw", weight_decay=0.1)
    ).param_groups
    assert decayed["weight_decay"] == 0.1 and spared["weight_decay"] == 0.0
    assert all(p.dim() == 2 for p in decayed["params"]) and all(
        p.dim() == 1 for p in spared["params"]
    )
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))


def test_drop_words_share_and_reproducibility() -> None:
    ids = RaggedIds.from_lists([[5] * 50_000])
    dropped = drop_words(ids, 0.15, (1, 2))
    share = float((dropped.values == 1).mean())
    assert abs(share - 0.15) < 5 * math.sqrt(0.15 * 0.85 / 50_000)
    assert np.array_equal(dropped.values, drop_words(ids, 0.15, (1, 2)).values)
    assert not np.array_equal(dropped.values, drop_words(ids, 0.15, (1, 3)).values)


def test_one_epoch_equals_a_plain_loop(tmp_path: Path, examples: Examples) -> None:
    """Accumulation, label smoothing and clipping against torch written out by hand."""
    model = ModelConfig(**{**vars(MODEL), "dropout": 0.0})
    trainer = make_trainer(
        tmp_path, examples, model=model, epochs=1, batch_size=16, grad_accumulation=2,
        grad_clip=0.5, label_smoothing=0.1, optimizer="sgd", lr=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    plain = TransformerClassifier.from_config(model)
    optimizer = torch.optim.SGD(plain.parameters(), 0.1)
    batches = list(shuffled_batches(len(examples), 16, seed=0, epoch=0))
    for i in range(0, len(batches), 2):
        indices = np.concatenate(batches[i : i + 2])
        batch = pack(examples.ids.select(indices), examples.labels[indices])
        optimizer.zero_grad()
        F.cross_entropy(plain(**batch.model_inputs()), batch.labels, label_smoothing=0.1).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
    trainer.fit()
    for (name, mine), theirs in zip(
        trainer.model.named_parameters(), plain.parameters(), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=lambda m: f"{name}: {m}")  # noqa: B023
    assert trainer.progress.step == 5 and trainer.progress.samples == 150


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("stop_at", [1, 5, 7])
def test_resume_is_bit_identical(
    tmp_path: Path, examples: Examples, backend: str, stop_at: int
) -> None:
    """A run that dies after a step, its checkpoints some steps old, ends as if it had not."""
    settings = {
        "model": ModelConfig(**{**vars(MODEL), "attn_backend": backend}),
        "word_dropout": 0.1,
        "grad_clip": 1.0,
        "schedule": "cosine",
    }
    whole = make_trainer(tmp_path / "whole", examples, backend, **settings)
    whole.fit()

    class Killed(Exception):
        pass

    def die(progress: Progress, samples: int) -> None:
        if progress.step == stop_at:
            raise Killed

    broken = make_trainer(
        tmp_path / "broken", examples, backend, checkpoint_seconds=0.0, **settings
    )
    with pytest.raises(Killed):
        broken.fit(die)
    resumed = make_trainer(tmp_path / "broken", examples, backend, **settings)
    assert resumed.restore() == (stop_at > 1)
    resumed.fit()

    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    assert lines(tmp_path / "whole") == lines(tmp_path / "broken")
    best = [load_state(tmp_path / run / "best_model.pt") for run in ("whole", "broken")]
    assert all(torch.equal(best[0][k], best[1][k]) for k in best[0])


def test_interrupt_saves_and_resumes(tmp_path: Path, examples: Examples) -> None:
    import os
    import signal

    trainer = make_trainer(tmp_path, examples, checkpoint_seconds=1e9)
    before = signal.getsignal(signal.SIGTERM)

    def interrupt(progress: Progress, samples: int) -> None:
        if progress.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        trainer.fit(interrupt)
    assert signal.getsignal(signal.SIGTERM) is before
    again = make_trainer(tmp_path, examples)
    assert again.restore() and again.progress.step in (3, 4)


@pytest.mark.parametrize("where", ["loss", "weight", "optimiser", "validation"])
@pytest.mark.parametrize("before", [True, False])
def test_divergence_keeps_the_last_sound_state_and_tells_the_step(
    tmp_path: Path, examples: Examples, where: str, before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong first in the second epoch's third step, batches of 20, 8 an epoch."""
    settings = {"batch_size": 20, "log_every": 100, "checkpoint_seconds": 0.0 if before else 1e9}
    trainer = make_trainer(tmp_path, examples, epochs=3, **settings)
    seen: list[np.ndarray] = []
    loss, batch, measure = (
        getattr(trainer.run.task, name) for name in ("loss", "batch", "measure")
    )

    def watched(run, examples, indices, stream):
        seen.append(indices)
        return batch(run, examples, indices, stream)

    def broken(run, model, *given, **more):
        summed, right = loss(run, model, *given, **more)
        return (summed * float("nan") if len(seen) == at + 1 else summed), right

    at = 10 if before else 2  # the number of the step that breaks, from 0
    monkeypatch.setattr(trainer.run.task, "batch", watched)
    if where == "loss":
        monkeypatch.setattr(trainer.run.task, "loss", broken)
    if where == "validation":
        at = 15 if before else 7

        def unmeasurable(run, model, examples):
            if len(seen) == at + 1:
                torch.nn.init.constant_(model.head.classify.bias, 3e38)
                with torch.no_grad():
                    model.head.classify.bias *= 10
            return measure(run, model, examples)

        monkeypatch.setattr(trainer.run.task, "measure", unmeasurable)

    def on_batch(progress: Progress, samples: int) -> None:
        if len(seen) != at + 1:
            return
        weight = trainer.model.norm.weight
        if where == "weight":
            torch.nn.init.constant_(weight, float("inf"))
        if where == "optimiser":
            trainer.optimizer.state[weight]["exp_avg"].fill_(float("nan"))

    with pytest.raises(DivergedError, match="lower --lr") as raised:
        trainer.fit(on_batch)
    epoch, step = divmod(at, 8)
    if where in ("loss", "validation") or before:
        assert f"first in epoch {epoch + 1}, step {at + 1};" in str(raised.value)
        found = json.loads(trainer.folder.diverged.read_text())
        assert found["texts"] == seen[at].tolist()
        assert (found["epoch"], found["batch"], found["step"]) == (epoch + 1, step + 1, at)
        assert found["forward_seeds"] == [forward_seed(0, at)]
    last = trainer.folder.last
    if before:
        assert str(last) in str(raised.value)
        again = make_trainer(tmp_path, examples)
        # The epoch's last step was saved before it was measured.
        assert again.restore() and again.progress.step == at + (where == "validation")
        assert all(p.isfinite().all() for p in again.model.parameters())
    else:
        assert "no checkpoint had been written" in str(raised.value) and not last.exists()


def test_a_checkpoint_that_is_not_finite_is_not_gone_on_from(
    tmp_path: Path, examples: Examples
) -> None:
    """An earlier version may have written one."""
    trainer = make_trainer(tmp_path, examples, epochs=1)
    trainer.fit()
    state = load_state(trainer.folder.last)
    state["model"]["norm.weight"][3] = float("nan")
    torch.save(state, trainer.folder.last)
    with pytest.raises(CheckpointError, match=r"not finite, in norm\.weight.*--lr"):
        make_trainer(tmp_path, examples).restore()
    del state["model"]["norm.weight"]
    torch.save(state, trainer.folder.last)
    with pytest.raises(CheckpointError, match=r"does not fit the model: lacks norm\.weight$"):
        make_trainer(tmp_path, examples).restore()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)), "exp_avg of weight"),
        (lambda s: s["optimizer"]["state"][0].update(exp_avg_sq=None), "exp_avg_sq of weight 0"),
        (lambda s: s["optimizer"]["state"][0].update(step=torch.zeros(4)), "step of weight 0"),
        (lambda s: s["optimizer"]["state"].update({99: {}}), "weight 99; expected"),
        (lambda s: s["optimizer"]["param_groups"].pop(), "other groups"),
        (lambda s: s["optimizer"]["param_groups"][0].pop("lr"), "other settings"),
        (lambda s: s["progress"].update(step=-1), "step is -1"),
        (lambda s: s["progress"].update(epoch="two"), "epoch is 'two'"),
        (lambda s: s["progress"].update(poem=""), "poem"),
        (lambda s: s.update(model=None), "NoneType"),
        (lambda s: s.pop("scaler"), "scaler"),
    ],
)  # fmt: skip
def test_a_state_of_other_shapes_is_refused(
    tmp_path: Path, examples: Examples, change, message: str
) -> None:
    trainer = make_trainer(tmp_path, examples, epochs=1)
    trainer.fit()
    state = load_state(trainer.folder.last)
    change(state)
    torch.save(state, trainer.folder.last)
    with pytest.raises(CheckpointError, match=rf"last\.ckpt does not fit this run: .*{message}"):
        make_trainer(tmp_path, examples).restore()


@pytest.mark.parametrize("how", ["gone", "cut", "flipped"])
def test_damaged_metrics_are_written_anew(
    tmp_path: Path, examples: Examples, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    make_trainer(tmp_path, examples, epochs=1).fit()
    metrics, epochs = tmp_path / "metrics.jsonl", [r for r in lines(tmp_path) if "val_loss" in r]
    content = bytearray(metrics.read_bytes())
    content[5] ^= 1
    if how == "gone":
        metrics.unlink()
    else:
        metrics.write_bytes(bytes(content) if how == "flipped" else metrics.read_bytes()[:-9])
    trainer = make_trainer(tmp_path, examples, epochs=2)
    trainer.restore()
    trainer.fit()
    assert "was damaged" in caplog.text
    assert lines(tmp_path)[0] == epochs[0]
    assert [r["epoch"] for r in lines(tmp_path) if r["kind"] == "epoch"] == [1, 2]


def test_restore_refuses_a_foreign_checkpoint(tmp_path: Path, examples: Examples) -> None:
    trainer = make_trainer(tmp_path, examples)
    torch.save({"model": {}}, trainer.folder.last)
    with pytest.raises(CheckpointError, match=r"last\.ckpt"):
        trainer.restore()
    trainer.folder.last.write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match=r"last\.ckpt"):
        trainer.restore()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_trains(tmp_path: Path, examples: Examples, precision: str) -> None:
    trainer = make_trainer(tmp_path, examples, epochs=1, precision=precision)
    start = trainer.model.embedding.detach().clone()
    progress = trainer.fit()
    assert math.isfinite(progress.history[0]["train_loss"])
    assert not torch.equal(start, trainer.model.embedding)
    assert trainer.model.embedding.dtype == torch.float32
    assert make_trainer(tmp_path, examples, epochs=1, precision=precision).restore()


def test_evaluation_order_and_accuracy(examples: Examples) -> None:
    """Batches are sorted by length inside; what comes out is in the order of what went in."""
    model = TransformerClassifier.from_config(MODEL).eval()
    logits = inference.predict_logits(model, examples.ids, torch.device("cpu"), batch_size=7)
    for i in (0, 17, 149):
        batch = pack(examples.ids.select(np.array([i])))
        torch.testing.assert_close(logits[i : i + 1], model(**batch.model_inputs()).detach())


def test_it_learns(tmp_path: Path, examples: Examples) -> None:
    trainer = make_trainer(tmp_path, examples, epochs=30, lr=3e-3)
    history = trainer.fit().history
    assert history[-1]["train_loss"] < 0.5 * history[0]["train_loss"]
    assert trainer.progress.best["val_accuracy"] > 0.95


# ------------------------------------------------------------------------- what MPS asks of a run


def test_rounding_batches_up_changes_no_result(tmp_path, examples, monkeypatch):
    """Masks count from a text's own beginning and its own row, so a dead tail moves none."""
    settings = {"epochs": 1, "batch_size": 16, "model": replace(MODEL, attn_backend="reference")}
    plain = make_trainer(tmp_path / "plain", examples, **settings)
    plain.fit()
    shapes = set()
    monkeypatch.setattr("fasttx.device.token_multiple", lambda device, precision: 64)
    rounded = make_trainer(tmp_path / "rounded", examples, **settings)
    rounded.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.add(len(kwargs["input_ids"])), with_kwargs=True
    )
    rounded.fit()
    assert all(rows % 64 == 0 for rows in shapes)
    mine, theirs = (trainer.progress.history[0] for trainer in (rounded, plain))
    assert mine["train_loss"] == pytest.approx(theirs["train_loss"], abs=1e-5)
    assert mine["val_loss"] == pytest.approx(theirs["val_loss"], abs=1e-5)


def test_bf16_on_a_cpu_meets_few_shapes(tmp_path, examples):
    """Training and measuring alike: torch keeps a product for every shape that it meets."""
    trainer = make_trainer(tmp_path / "run", examples, epochs=1, batch_size=16, precision="bf16")
    shapes = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append((module.training, len(kwargs["input_ids"]))),
        with_kwargs=True,
    )
    trainer.fit()
    assert {training for training, _ in shapes} == {True, False}
    assert all(rows % 128 == 0 for _, rows in shapes)


def test_uploads_are_kept_until_the_host_has_waited(tmp_path, examples, monkeypatch):
    """A batch and a seed each step; a log line, every third step, waits for the device."""
    kept: list[object] = []
    most = 0

    class Keeping(Uploads):
        """As on MPS, to the CPU."""

        def __call__(self, x):
            nonlocal most
            kept.append(x)
            most = max(most, len(kept))
            return x

        def waited(self):
            kept.clear()

    monkeypatch.setattr("fasttx.device.Uploads", Keeping)
    make_trainer(tmp_path / "run", examples, epochs=1, batch_size=16, log_every=3).fit()
    assert most == 6
    assert kept == []


@pytest.mark.parametrize(("kind", "kept"), [("mps", 1), ("cuda", 0), ("cpu", 0)])
def test_where_uploads_are_kept(kind, kept):
    class Sent:
        def to(self, device, non_blocking):
            assert device == torch.device(kind) and non_blocking
            return "there"

    upload = Uploads(torch.device(kind))
    assert upload(Sent()) == "there"
    assert len(upload.kept) == kept


@pytest.mark.parametrize(("precision", "heeds", "fused"), [
    ("fp16", True, True), ("fp16", False, False), ("fp32", False, True), ("bf16", False, True),
])  # fmt: skip
def test_no_fused_step_that_ignores_an_overflow(monkeypatch, precision, heeds, fused):
    monkeypatch.setattr("fasttx.device.fused_steps_heed_overflow", lambda device: heeds)
    model = TransformerClassifier.from_config(MODEL)
    optimizer = make_optimizer(model, TrainConfig(precision=precision))
    assert optimizer.defaults["fused"] is fused


def test_fused_steps_are_tried(monkeypatch):
    from fasttx import device

    cpu = torch.device("cpu")
    assert device.fused_steps_heed_overflow.__wrapped__(cpu)
    step = torch.optim.SGD.step

    def careless(self):
        del self.found_inf
        return step(self)

    monkeypatch.setattr(torch.optim.SGD, "step", careless)
    assert not device.fused_steps_heed_overflow.__wrapped__(cpu)


def test_progress_lines_tell_the_rate_and_the_time_left(monkeypatch, caplog) -> None:
    """10 reviews a second, an epoch of 100, from the middle of its first one on."""
    progress = Progress(samples=50)
    monkeypatch.setattr("fasttx.training.progress.time.perf_counter", lambda: progress.samples / 10)
    display = ProgressDisplay(2, 100, seconds=3.0)
    row = {"train_loss": 0.5, "train_accuracy": 0.8, "val_loss": 0.4, "val_accuracy": 0.9,
           "seconds": 10.0, "samples_per_second": 10.0}  # fmt: skip
    with caplog.at_level("INFO", "fasttx"):
        while progress.epoch < 2:
            for _ in range((100 * (progress.epoch + 1) - progress.samples) // 10):
                progress.samples += 10
                display.on_batch(progress, 10)
            display.on_epoch({**row, "epoch": progress.epoch + 1})
            progress.epoch += 1
    rates = [line for line in caplog.messages if "samples/s" in line and "left" in line]
    assert rates == [
        "epoch 1/2  90 of 100 reviews  10.0 samples/s  0:11 left",
        "epoch 2/2  40 of 100 reviews  10.0 samples/s  0:06 left",
        "epoch 2/2  70 of 100 reviews  10.0 samples/s  0:03 left",
        "epoch 2/2  100 of 100 reviews  10.0 samples/s  0:00 left",
    ]
    assert [line.split()[0] for line in caplog.messages if line not in rates] == ["epoch", "1", "2"]
