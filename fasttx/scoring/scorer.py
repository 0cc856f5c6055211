"""A run as a function from a batch of columns to the same batch with its predictions.

dataset.map(Scorer("runs/full"), batched=True)                                # datasets
dataset.map_batches(Scorer, fn_constructor_args=("runs/full",), concurrency=2)  # Ray Data
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fasttx.errors import DataError
from fasttx.load import TextClassifier, load
from fasttx.terminal import decoded


class Scorer:
    """Adds `predicted_label` and `predicted_probability` to batches that have a column of texts; of
    a multi-label run `predicted_labels`, with bars between them, and of a regression
    `predicted_value`.

    The model is read at the first batch, in the process that has it: what travels to workers is the
    folder's name. A text that is missing (None, NaN) is read as an empty one. With
    `all_probabilities` there is a column `probability_<label>` for each label too.
    """

    def __init__(
        self,
        run: str | Path,
        column: str = "text",
        *,
        precision: str = "fp32",
        device: str = "auto",
        attn_backend: str | None = None,
        batch_size: int = 64,
        all_probabilities: bool = False,
        threads: int | None = None,
    ) -> None:
        self.run, self.column = os.path.abspath(os.path.expanduser(run)), column
        self.batch_size, self.all_probabilities = batch_size, all_probabilities
        self._options = {"precision": precision, "device": device, "attn_backend": attn_backend}
        self._threads = threads
        self._classifier: TextClassifier | None = None

    @property
    def classifier(self) -> TextClassifier:
        if self._classifier is None:
            if self._threads is not None:
                import torch

                torch.set_num_threads(self._threads)
            self._classifier = load(self.run, **self._options)  # type: ignore[arg-type]
        return self._classifier

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_classifier": None}

    @property
    def added(self) -> list[str]:
        """The columns that it adds."""
        return list(self._columns(np.empty((0, len(self.classifier.label_names)))))

    def _columns(self, scores: np.ndarray) -> dict[str, np.ndarray]:
        found = self.classifier
        return found.problem.columns(found.label_names, scores, self.all_probabilities)

    def score(self, texts: Sequence[Any]) -> dict[str, np.ndarray]:
        """The added columns, one row a text. Raises DataError for what is no text."""
        classifier = self.classifier
        given = [decoded(_text(x, i)) for i, x in enumerate(texts)]
        if not given:
            return self._columns(np.empty((0, len(classifier.label_names))))
        logits = classifier.logits(given, batch_size=self.batch_size)
        return self._columns(classifier.problem.scores(logits).numpy())

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch as `datasets` (lists) and Ray Data (NumPy arrays) hand it over."""
        if self.column not in batch:
            raise DataError(
                f"the batch has the columns {', '.join(batch)}; expected {self.column!r}, the "
                "column of texts: Scorer(run, column=...)"
            )
        return {**batch, **self.score(batch[self.column])}


def _text(x: Any, row: int) -> str:
    if isinstance(x, str):
        return x
    if x is None or (isinstance(x, float) and np.isnan(x)):
        return ""
    raise DataError(f"row {row + 1} of the batch is {type(x).__name__} {str(x)[:40]!r}, no text")
