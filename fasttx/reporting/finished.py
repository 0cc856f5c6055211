"""A finished run for its report: results, history, model, predictions and texts."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fasttx import terminal
from fasttx.errors import CheckpointError, DataError
from fasttx.load import TextClassifier, load
from fasttx.reporting.findings import shown
from fasttx.tasks import read_config
from fasttx.text.splits import TextDataset
from fasttx.text.targets import TARGETS
from fasttx.text.token_cache import encode_cached
from fasttx.training import run as runs
from fasttx.training.checkpoint import RunConfig, read_json
from fasttx.training.folder import RunFolder, verified
from fasttx.training.measures import ACCURACY, Measure
from fasttx.training.predictions import Predictions
from fasttx.training.problems import PROBLEMS


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """What a report is made from.

    `texts` and `lengths` (in words) are None if the dataset is no longer available. `predictions`
    is None if, besides, the run saved none. `notes` say why.
    """

    folder: RunFolder
    config: RunConfig
    results: dict[str, Any]
    rows: list[dict[str, Any]]  # of metrics.jsonl
    model: TextClassifier
    predictions: Predictions | None
    texts: list[str] | None
    lengths: np.ndarray | None
    notes: list[str]

    @property
    def names(self) -> tuple[str, ...]:
        return self.config.label_names

    @property
    def metrics(self) -> Any:
        """The metrics of the test split, from results.json: `problems.AnyMetrics`."""
        return PROBLEMS[self.config.train.problem_type].metrics_of(self.results["test"])

    @property
    def measure(self) -> Measure:
        return PROBLEMS[self.config.train.problem_type].measure

    @property
    def samples_per_step(self) -> int:
        return self.config.train.batch_size * self.config.train.grad_accumulation

    @property
    def samples_per_epoch(self) -> int:
        """The labelled texts, and those with pseudo-labels."""
        data = self.config.dataset
        return int(data["train_samples"]) + int(data.get("pseudo_labels", {}).get("texts", 0))

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.samples_per_epoch // self.samples_per_step)


def open_run(path: Path, device: str = "auto") -> FinishedRun:
    """Read a run. Raises CheckpointError if it is not finished: its test split is untouched."""
    model = load(path, device=device, attn_backend="sdpa")  # sdpa runs everywhere
    folder = RunFolder(path)
    config = read_config(folder.config)
    if not folder.results.exists():
        raise CheckpointError(
            f"{folder.results} does not exist: the run is not finished, and its test split is "
            f"measured once, at the end. Go on with it: python train.py --resume {path}"
        )
    results, notes = read_json(folder.results), []
    _check_results(folder.results, results, config)
    dataset: TextDataset | None = None
    try:
        dataset = runs.load_dataset(folder, config)
    except (DataError, CheckpointError) as error:
        notes.append(
            f"The texts of this run cannot be had any more, so what needs them is missing: {error}"
        )
    predictions = _predictions(folder, config, model, dataset)
    measure = PROBLEMS[config.train.problem_type].measure
    recorded = results[f"test_{measure.chosen}"]
    again = getattr(predictions.metrics, measure.chosen) if predictions else recorded
    if again != recorded:
        notes.append(
            f"{folder.test_predictions.name} has {measure.chosen_title} {shown(measure, again)}, "
            f"results.json {shown(measure, recorded)}: it was computed again, on another device or "
            "in another precision."
        )
    rows = results["history"]
    if folder.metrics.exists():
        rows = _rows(folder.metrics, measure)
    else:
        notes.append(f"{folder.metrics.name} is gone, so the curves have one point an epoch.")
    texts = dataset.test.texts if dataset else None
    lengths = encode_cached(model.tokenizer, texts).lengths if texts is not None else None
    return FinishedRun(folder, config, results, rows, model, predictions, texts, lengths, notes)


def _predictions(
    folder: RunFolder, config: RunConfig, model: TextClassifier, dataset: TextDataset | None
) -> Predictions | None:
    """The saved predictions; an older run has none, so they are computed and saved now."""
    if folder.test_predictions.exists():
        kind = config.train.problem_type
        found = Predictions.load(folder.test_predictions, len(config.label_names), kind)
        if len(found) != config.dataset["test_samples"] or (
            dataset is not None and not np.array_equal(found.labels, dataset.test.labels)
        ):
            raise CheckpointError(
                f"{folder.test_predictions} does not belong to the {len(found):,} labels of this "
                "run's test split. Delete it: `fasttx report` makes it again"
            )
        return found
    if dataset is None:
        return None
    terminal.say(f"predicting the {len(dataset.test.texts):,} test texts once more ...", flush=True)
    logits = model.logits(dataset.test.texts).numpy()
    found = Predictions(logits, dataset.test.labels, config.train.problem_type)
    found.save(folder)
    return found


# --- what a hand, or another version, may have changed --------------------------------------------

_NUMBER, _COUNT = (int, float), (int,)
_RESULTS: dict[str, tuple[type, ...]] = {
    "best_epoch": _COUNT, "seconds": _NUMBER,
    "samples_per_second": _NUMBER, "peak_memory_mb": (int, float, type(None)),
    "parameters": _COUNT, "attn_backend": (str,), "device": (str,), "precision": (str,),
    "history": (list,), "test": (dict,), "versions": (dict,), "hardware": (dict,),
}  # fmt: skip
_EPOCH: dict[str, tuple[type, ...]] = {
    "epoch": _COUNT, "train_loss": _NUMBER, "val_loss": _NUMBER, "seconds": _NUMBER,
    "samples_per_second": _NUMBER,
}  # fmt: skip
_STEP: dict[str, tuple[type, ...]] = {
    "epoch": _COUNT, "step": _COUNT, "loss": _NUMBER, "samples_per_second": _NUMBER,
}  # fmt: skip
_UNDEFINED = ("average_precision",)  # of some labels


def _epoch(measure: Measure) -> dict[str, tuple[type, ...]]:
    return {**_EPOCH, f"train_{measure.trained}": _NUMBER, f"val_{measure.chosen}": _NUMBER}


def _check_results(path: Path, results: dict[str, Any], config: RunConfig) -> None:
    """Raise CheckpointError for results of a run that a report cannot be made from."""
    problem = PROBLEMS[config.train.problem_type]
    measured = {f"{part}_{problem.measure.chosen}": _NUMBER for part in ("test", "val")}
    _check(path, "", results, {**measured, **_RESULTS})
    for row in results["history"]:
        _check(path, " in history", row, _epoch(problem.measure))
    if results["best_epoch"] not in [row["epoch"] for row in results["history"]]:
        raise CheckpointError(
            f"{path}: best_epoch is {results['best_epoch']}, which is none of its history"
        )
    test, classes = results["test"], len(config.label_names)
    wanted = {f.name: str(f.type) for f in dataclasses.fields(problem.metrics_class)}
    if unknown := test.keys() ^ wanted.keys():
        raise CheckpointError(
            f"{path}: its test has other names than this version of fasttx writes: "
            f"{', '.join(sorted(map(str, unknown))[:5])}. Use the version that wrote it"
        )
    for name, kind in wanted.items():
        if test[name] is None and "None" in kind:
            continue
        shape = {"confusion_matrix": (classes, classes)}.get(name, (classes,))
        try:
            value = np.array(test[name], dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: {name} of test is {str(test[name])[:60]!r}") from error
        finite = np.isfinite(value) | (np.isnan(value) & (name in _UNDEFINED))
        if value.shape != (shape if kind == "np.ndarray" else ()) or not finite.all():
            raise CheckpointError(
                f"{path}: {name} of test has the shape {value.shape}, or numbers that are not "
                f"finite; expected those of {classes} labels"
            )
    if not TARGETS[config.train.problem_type].is_described(config.dataset, config.label_names):
        raise CheckpointError(
            f"{path.parent}/config.json: its dataset has no label_counts (or label_range) of "
            "train, validation and test for each label; expected those of this run"
        )
    _check(path.parent / "config.json", " in dataset", config.dataset, _DATASET)


_DATASET: dict[str, tuple[type, ...]] = {
    "name": (str,), "train_samples": _COUNT, "test_samples": _COUNT,
}  # fmt: skip


def _check(path: Path, where: str, values: Any, wanted: dict[str, tuple[type, ...]]) -> None:
    """Raise CheckpointError for a missing value, or one of another type; a bool is no number."""
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}{where}: {str(values)[:60]!r}; expected names and values")
    for name, types in wanted.items():
        value = values.get(name)
        wrong = not isinstance(value, types) or isinstance(value, bool)
        if wrong or (isinstance(value, float) and not math.isfinite(value)):
            expected = "a finite number" if float in types else types[0].__name__
            raise CheckpointError(
                f"{path}: {name}{where} is {str(value)[:60]!r}; expected {expected}. It was "
                "changed, or written by another version of fasttx"
            )


def _rows(path: Path, measure: Measure = ACCURACY) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in verified(path).splitlines()]
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as lines of JSON: {error}") from error
    for row in rows:
        kind = row.get("kind") if isinstance(row, dict) else None
        kinds = {"train": {**_STEP, measure.trained: _NUMBER}, "epoch": _epoch(measure)}
        _check(path, " in a line", row, kinds.get(str(kind), {}))
    return [row for row in rows if row.get("kind") in ("train", "epoch")]
