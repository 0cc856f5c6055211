"""`test_predictions.npz`: what a finished run answered on its test split, for whoever looks closer;
`pseudo_labels.npz`: what an ensemble says of texts without labels, for the next run to learn from.

Shapes: n texts, C classes.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fasttx.config import SINGLE_LABEL
from fasttx.errors import CheckpointError
from fasttx.training.folder import RunFolder, verified
from fasttx.training.metrics import log_softmax
from fasttx.training.problems import PROBLEMS


@dataclass(frozen=True, eq=False)
class Predictions:
    """logits (n, C) float32 and true labels, in the order of the split: (n,) int64, or (n, C)
    float32 where the problem is no single-label one.

    predicted, confidence and correct are of single-label problems.
    """

    logits: np.ndarray
    labels: np.ndarray
    problem_type: str = SINGLE_LABEL

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def metrics(self) -> Any:
        """Of the class that the problem has: `fasttx.training.problems.AnyMetrics`."""
        return PROBLEMS[self.problem_type].metrics(self.logits, self.labels)

    @cached_property
    def predicted(self) -> np.ndarray:
        """(n,) int64: the class with the highest logit, the first one among equals."""
        return self.logits.argmax(1)

    @cached_property
    def confidence(self) -> np.ndarray:
        """(n,) float64: the probability of the predicted class."""
        best: np.ndarray = np.exp(log_softmax(self.logits).max(1))
        return best

    @cached_property
    def correct(self) -> np.ndarray:
        """(n,) bool."""
        right: np.ndarray = self.predicted == self.labels
        return right

    def save(self, folder: RunFolder) -> None:
        with folder.writing(folder.test_predictions) as f:
            whole = np.issubdtype(self.labels.dtype, np.integer)
            labels = self.labels.astype(np.int64 if whole else np.float32)
            np.savez_compressed(f, logits=self.logits.astype(np.float32), labels=labels)

    @classmethod
    def load(cls, path: Path, classes: int, problem_type: str = SINGLE_LABEL) -> Predictions:
        """Raises CheckpointError for a file that is damaged, or no predictions of `classes`."""
        with _reading(path, "predictions", "Delete it: `fasttx report` makes it again"):
            with np.load(io.BytesIO(verified(path)), allow_pickle=False) as content:
                logits, labels = content["logits"], content["labels"]
            if logits.ndim == 2 and logits.shape[1] != classes:
                raise ValueError(f"its logits have {logits.shape[1]} classes, expected {classes}")
            found = cls(logits, labels, problem_type)
            _ = found.metrics  # checks shapes, types and values
        return found


@dataclass(frozen=True, eq=False)
class PseudoLabels:
    """probabilities (n, C) float32 of the classes `label_names`, one row a text; `texts` is the
    SHA-256 of these texts in their order (`data.texts_fingerprint`), `splits` that of the labelled
    splits whose training and validation labels they come from."""

    probabilities: np.ndarray
    label_names: tuple[str, ...]
    texts: str
    splits: str

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of texts and probabilities, by which a resumed run knows them."""
        rows = np.ascontiguousarray(self.probabilities, dtype="<f4").tobytes()
        return hashlib.sha256(self.texts.encode() + rows).hexdigest()

    def save(self, folder: RunFolder) -> None:
        with folder.writing(folder.pseudo_labels) as f:
            np.savez_compressed(
                f,
                probabilities=self.probabilities.astype(np.float32),
                label_names=np.array(self.label_names),
                texts=np.array(self.texts),
                splits=np.array(self.splits),
            )

    @classmethod
    def load(cls, path: Path) -> PseudoLabels:
        """Raises CheckpointError for a file that is missing, damaged, or no probabilities."""
        if not path.exists():
            raise CheckpointError(
                f"{path} does not exist. Make it: fasttx ensemble RUN ... --pseudo-labels --out "
                f"{path.parent}"
            )
        with _reading(path, "pseudo-labels", "Make it again: fasttx ensemble --pseudo-labels"):
            with np.load(io.BytesIO(verified(path)), allow_pickle=False) as found:
                rows = found["probabilities"]
                names = tuple(str(name) for name in found["label_names"].tolist())
                texts, splits = str(found["texts"]), str(found["splits"])
            if rows.dtype != np.float32 or rows.ndim != 2 or rows.shape[1] != len(names):
                raise ValueError(f"{rows.dtype} of shape {rows.shape} for {len(names)} classes")
            if not (rows >= 0).all() or not np.allclose(rows.sum(1), 1, atol=1e-4):
                raise ValueError("its rows are not probabilities")
        return cls(rows, names, texts, splits)


@contextmanager
def _reading(path: Path, what: str, remedy: str) -> Iterator[None]:
    """Whatever bad bytes make numpy raise, as one CheckpointError."""
    try:
        yield
    except (OSError, ValueError, KeyError, EOFError, TypeError, AttributeError,
            zipfile.BadZipFile) as error:  # fmt: skip
        raise CheckpointError(
            f"{path} holds no {what}, or is damaged or cut short ({error}). {remedy}"
        ) from error
