"""The table of tasks, config.json of old and foreign runs, and a task that nobody foresaw."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fasttx.config import RECIPES, ModelConfig, PretrainConfig, TrainConfig
from fasttx.errors import CheckpointError
from fasttx.ops import registry
from fasttx.ops.registry import BACKENDS
from fasttx.tasks import TASKS, TaskEntry, classification, read_config
from fasttx.text import splits as data
from fasttx.text.packing import PackedBatch, RaggedIds, pack
from fasttx.training import run as runs
from fasttx.training.checkpoint import Progress, RunConfig
from fasttx.training.distributed import Processes
from fasttx.training.folder import RunFolder
from fasttx.training.results import common
from fasttx.training.task import Examples, Run, Splits, Task, TaskData


@pytest.mark.parametrize("name", TASKS)
def test_an_entry_leads_to_its_task(name: str) -> None:
    assert TASKS[name].name == TASKS[name].load().name == name


@pytest.mark.parametrize("name", TASKS)
def test_config_json_comes_back_as_it_was(tmp_path: Path, name: str) -> None:
    train = TASKS[name].settings(seed=7, model=RECIPES["demo"].model)
    saved = RunConfig(train, "cpu", "cpu", ("a", "b"), {"fingerprint": "0"}, "demo", name)
    keep(RunFolder(tmp_path), saved.to_dict())
    assert read_config(tmp_path / "config.json", name) == saved


def keep(folder: RunFolder, config: dict[str, Any]) -> Path:
    folder.write_json(folder.config, config)
    folder.seal()
    return folder.config


def rewritten(folder: Path, **changes: object) -> Path:
    saved = RunConfig(TrainConfig(), "cpu", "cpu", (), {}, None, "classification")
    values = saved.to_dict() | changes
    return keep(RunFolder(folder), {k: v for k, v in values.items() if v != "gone"})


def test_a_config_from_before_there_were_tasks_is_a_classification(tmp_path: Path) -> None:
    assert read_config(rewritten(tmp_path, task="gone"), "classification").task == "classification"


@pytest.mark.skipif(
    bool(BACKENDS["cpu"].unavailable_reasons("cpu", torch.float32, 8)), reason="needs a compiler"
)
@pytest.mark.parametrize("before", ["torch", "own", None])
def test_a_resumed_run_multiplies_as_it_began(tmp_path, monkeypatch, before) -> None:
    """Whatever would be chosen now. None: a run of the time before there was a choice."""
    monkeypatch.setenv("FASTTX_PRODUCTS", before or "own")
    task, folder = TASKS["classification"].load(), RunFolder(tmp_path / "run")
    config = replace(
        RECIPES["demo"], dataset="demo", device="cpu", train_samples=64, test_samples=16,
        model=ModelConfig(
            60, d_model=16, num_heads=2, num_layers=1, d_ff=32, max_len=16, attn_backend="cpu"
        ),
    )  # fmt: skip
    source = data.resolve("demo")
    runs.create(task, config, source, "demo", folder.path, Processes()).folder.close()
    if before is None:
        values = json.loads(folder.config.read_text())
        assert values.pop("choices") == {"float32": "own", "bfloat16": "own"}
        keep(folder, values)
    now = {None: "own", "own": "torch", "torch": "own"}[before]
    monkeypatch.setenv("FASTTX_PRODUCTS", now)
    registry.choose("cpu", registry.choices("cpu"))
    assert multiplies() == now
    run = runs.resume(task, folder, read_config(folder.config, task.name), Processes())
    try:
        assert multiplies() == (before or "torch")
    finally:
        run.folder.close()
        registry.choose("cpu", dict.fromkeys(("float32", "bfloat16"), "own"))


def multiplies() -> str:
    described = registry.descriptions("cpu")["cpu"]
    (who,) = {described[f"products {name}"]["path"] for name in ("float32", "bfloat16")}
    return who


@pytest.mark.parametrize(
    ("changes", "expected", "message"),
    [
        ({"task": "poetry"}, (), "a run of poetry; expected classification or .* another version"),
        ({"task": "poetry"}, ("pretraining",), "poetry; expected pretraining. It is from another"),
        ({}, ("pretraining",), r"Go on with it: python train.py --resume \S+"),
        ({"task": "the LSTM baseline"}, ("classification",), "fasttx baseline lstm --resume"),
        ({"format": "other"}, (), "is not the config.json of a fasttx run"),
        ({"attn_backend": "gone"}, (), "is damaged or from another version: 'attn_backend'"),
        ({"train": {"lr": "fast"}}, (), "is damaged or from another version: lr is 'fast'"),
        ({"train": {"mask_share": 0.2}}, (), "unknown TrainConfig settings: mask_share"),
    ],
)
def test_a_config_that_cannot_be_used_is_named(
    tmp_path: Path, changes: dict[str, object], expected: tuple[str, ...], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_config(rewritten(tmp_path, **changes), *expected)


def test_settings_are_of_the_task_s_class(tmp_path: Path) -> None:
    path = rewritten(tmp_path, task="pretraining", train={"mask_share": 0.3})
    assert read_config(path).train == PretrainConfig(mask_share=0.3)


# --- one file and one line ------------------------------------------------------------------------


class WordCount(nn.Module):
    """A weight for each word, and their sum."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, input_ids: Tensor, cu_seqlens: Tensor, **_: object) -> Tensor:
        weights = self.weight[input_ids].split(cu_seqlens.diff().tolist())
        return torch.stack([w.sum() for w in weights])


class Counting(Task):
    """Regression: how many words a text has."""

    name = "counting"
    command = "count"

    def load(self, config: TrainConfig) -> TaskData:
        texts = [" ".join(["word"] * (1 + i % 5)) for i in range(60)]

        def examples(config: TrainConfig, tokenizer: Any) -> Splits:
            ids = RaggedIds.from_lists([[2] * (1 + i % 5) for i in range(60)])
            given = Examples(ids, ids.lengths.astype(np.float32))
            return Splits(given, given)

        return TaskData(texts, (), {"fingerprint": "5", "name": "words"}, ["a note"], examples)

    def backend(self, config: TrainConfig, device: torch.device) -> str:
        return "none"

    def model(self, config: ModelConfig) -> nn.Module:
        return WordCount(config)

    def heading(self, run: Run, model: nn.Module) -> list[str]:
        return ["counting words"]

    def batch(
        self, run: Run, examples: Examples, indices: np.ndarray, stream: tuple[int, ...]
    ) -> PackedBatch:
        return pack(examples.ids.select(indices), examples.labels[indices])

    def loss(
        self, run: Run, model: Any, batch: PackedBatch, seed: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        error = model(batch.input_ids, batch.cu_seqlens) - batch.labels
        return error.square().sum(), (error.detach().abs() < 0.5).sum()

    def measure(self, run: Run, model: nn.Module, examples: Examples) -> tuple[float, float]:
        everything = np.arange(len(examples))
        loss, right = self.loss(run, model, self.batch(run, examples, everything, ()))
        return loss.item() / len(examples), right.item() / len(examples)

    def results(self, run: Run, model: nn.Module, progress: Progress) -> dict[str, Any]:
        return {"mse": progress.history[-1]["val_loss"], **common(run, model, progress)}

    def closing(self, run: Run, results: dict[str, Any]) -> str:
        return f"mean squared error {results['mse']:.3f}"


TASK = Counting()


def test_a_new_task_is_one_module_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "counting", sys.modules[__name__])
    monkeypatch.setitem(TASKS, "counting", TaskEntry("counting", "counting", TrainConfig))
    task, folder = TASKS["counting"].load(), RunFolder(tmp_path / "run")
    config = TrainConfig(epochs=9, batch_size=4, optimizer="sgd", lr=0.05, device="cpu")
    with caplog.at_level("INFO", "fasttx"):
        run = runs.create(task, config, data.Source("demo"), "any", folder.path, Processes())
        results = runs.train(run)
    assert results["mse"] < 0.01
    assert results == json.loads(folder.results.read_text())
    for line in ("a note", "counting words", f"mean squared error {results['mse']:.3f}"):
        assert line in caplog.messages
    saved = read_config(folder.config, "counting")
    assert runs.resume(task, folder, saved, Processes()) is None  # it is finished
    with pytest.raises(CheckpointError, match=r"Go on with it: count --resume \S+run"):
        read_config(folder.config, "classification")


# --- the suggestion at the end --------------------------------------------------------------------


class Says(nn.Module):
    """Class 1 for words of even numbers, the surer the larger they are."""

    def forward(self, input_ids: Tensor, cu_seqlens: Tensor, **_: object) -> Tensor:
        first = input_ids[cu_seqlens[:-1]].double()
        return torch.stack([first, -first], 1) * (2 * (input_ids[cu_seqlens[:-1]] % 2) - 1)[:, None]


@pytest.mark.parametrize("windows", [False, True])
def test_the_example_is_a_text_that_is_right_and_harmless(windows: bool) -> None:
    texts = ["wrong", "it's $HOME; `x`", "esc \x1b[2J", "two\nlines", "-dash", "x" * 999, "also"]
    ids = RaggedIds.from_lists([[9], [4], [8], [8], [8], [8], [2]])
    labels, owner = np.array([1, 1, 1, 1, 1, 1, 1]), np.arange(7) if windows else None
    here = torch.device("cpu")
    config = RunConfig(TrainConfig(), "cpu", "cpu", ("a", "b"), {}, None, "classification")
    given = Examples(ids, labels, owner)
    task = TASKS["classification"].load()
    run = Run(task, config, RunFolder(Path("r s")), here, Processes(), Splits(given, given), texts)
    assert classification.example(run, Says()) == texts[1]
    of_results = {
        "dataset": {"name": "d", "test_samples": 1}, "test_accuracy": 1, "best_epoch": 1,
        "val_accuracy": 1, "samples_per_second": 1, "seconds": 1, "peak_memory_mb": 1,
        "warning": None, "example": texts[1],
    }  # fmt: skip
    closing = task.closing(run, of_results)
    assert shlex.split(closing.rsplit("try: ", 1)[1]) == ["fasttx", "predict", "r s", texts[1]]
    assert task.closing(run, of_results | {"example": None}).endswith("fasttx evaluate 'r s'")
    nobody = Run(task, config, RunFolder(Path("r")), here, Processes(), Splits(given, given))
    assert classification.example(nobody, Says()) is None
