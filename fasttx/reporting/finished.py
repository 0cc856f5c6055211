"""A finished run for its report: results, history, model, predictions and texts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fasttx.errors import CheckpointError, DataError
from fasttx.load import TextClassifier, load
from fasttx.reporting.findings import percent
from fasttx.tasks import read_config
from fasttx.text.splits import TextDataset
from fasttx.text.token_cache import encode_cached
from fasttx.training import run as runs
from fasttx.training.checkpoint import RunConfig, read_json
from fasttx.training.folder import RunFolder, verified
from fasttx.training.metrics import Metrics
from fasttx.training.predictions import Predictions


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
    def metrics(self) -> Metrics:
        """The metrics of the test split, from results.json."""
        values: dict[str, Any] = {
            k: np.array(v) if isinstance(v, list) else v for k, v in self.results["test"].items()
        }
        return Metrics(**values)

    @property
    def samples_per_step(self) -> int:
        return self.config.train.batch_size * self.config.train.grad_accumulation

    @property
    def steps_per_epoch(self) -> int:
        data = self.config.dataset
        more = data.get("pseudo_labels", {}).get("texts", 0)
        return -(-(int(data["train_samples"]) + more) // self.samples_per_step)


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
    dataset: TextDataset | None = None
    try:
        dataset = runs.load_dataset(folder, config)
    except (DataError, CheckpointError) as error:
        notes.append(
            f"The texts of this run cannot be had any more, so what needs them is missing: {error}"
        )
    predictions = _predictions(folder, config, model, dataset)
    if predictions and predictions.metrics.accuracy != results["test_accuracy"]:
        notes.append(
            f"{folder.test_predictions.name} has an accuracy of "
            f"{percent(predictions.metrics.accuracy, 2)}, results.json of "
            f"{percent(results['test_accuracy'], 2)}: it was computed again, on another device or "
            "in another precision."
        )
    rows = results["history"]
    if folder.metrics.exists():
        rows = _rows(folder.metrics)
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
        found = Predictions.load(folder.test_predictions, len(config.label_names))
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
    print(f"predicting the {len(dataset.test.texts):,} test texts once more ...", flush=True)
    found = Predictions(model.logits(dataset.test.texts).numpy(), dataset.test.labels)
    found.save(folder)
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        rows = [json.loads(line) for line in verified(path).splitlines()]
        return [row for row in rows if row["kind"] in ("train", "epoch")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read as lines of JSON: {error!r}") from error
