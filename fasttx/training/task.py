"""What one kind of run says for itself; everything else about a run is written once, in `run`.

The kinds are in `fasttx/tasks/`, a file and a line of its table each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fasttx.config import ModelConfig, TrainConfig
from fasttx.text.packing import PackedBatch, RaggedIds
from fasttx.text.pieces import AnyTokenizer
from fasttx.text.tokenizer import SpecialTokens, Tokenizer
from fasttx.training.checkpoint import Progress, RunConfig
from fasttx.training.distributed import Processes
from fasttx.training.folder import RunFolder
from fasttx.training.measures import ACCURACY, Measure


@dataclass(frozen=True)
class Examples:
    """One split, ready for the model: token ids, of at most max_len tokens, and labels (n,) int64,
    or (n, C) float32 (`fasttx.text.targets`); to train on, also the probability of each class.

    owner (sequences,) int64: which text each sequence is a window of; None: one sequence a text.
    """

    ids: RaggedIds
    labels: np.ndarray
    owner: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)


class Splits(NamedTuple):
    train: Examples
    validation: Examples
    test: Examples | None = None
    special: SpecialTokens = SpecialTokens()


@dataclass(frozen=True)
class TaskData:
    """The texts of a run, read and split.

    texts: what the tokenizer is made from; label_names: one for each output of the model;
    described: what config.json keeps of the data, with its `fingerprint`; notes: lines to show;
    validation: the texts of that split, for what is shown at the end.
    """

    texts: Sequence[str]
    label_names: tuple[str, ...]
    described: dict[str, Any]
    notes: Sequence[str]
    examples: Callable[[TrainConfig, AnyTokenizer], Splits]
    validation: Sequence[str] = ()


@dataclass(frozen=True, eq=False)
class Run:
    """An open run, about to be trained. validation: the texts of that split."""

    task: Task
    config: RunConfig
    folder: RunFolder
    device: torch.device
    processes: Processes
    splits: Splits
    validation: Sequence[str] = ()


class Task(ABC):
    """One kind of run. It has no state: what it needs to know of a run it is given."""

    name: ClassVar[str]  # "task" in config.json
    command: ClassVar[str]  # that takes --resume
    unit: ClassVar[str] = "reviews"  # what one of its examples is
    # Settings of `command` under which a training diverges less.
    tamer: ClassVar[str] = "a lower --lr, --grad-clip 1, or --precision fp32"

    # --- before training ---

    @abstractmethod
    def load(self, config: TrainConfig) -> TaskData:
        """The data of a run; the same for the same settings. Raises DataError."""

    def tokenizer(self, config: TrainConfig, texts: Sequence[str]) -> AnyTokenizer:
        return Tokenizer.train(texts, config.model.vocab_size)

    @abstractmethod
    def backend(self, config: TrainConfig, device: torch.device) -> str:
        """The attention backend that the model will use there.

        Raises BackendUnavailableError, DeviceError for what cannot run there.
        """

    def choices(self, backend: str) -> dict[str, str]:
        """What that backend would choose here where several ways give other bits."""
        return {}

    def choose(self, backend: str, choices: dict[str, str]) -> None:
        """It computes as `choices` says from now on."""
        return  # most choose nothing

    @abstractmethod
    def model(self, config: ModelConfig) -> nn.Module: ...

    def origin_sha256(self, config: TrainConfig) -> str | None:
        """Of the weights that `start` will read, after a look that they can be read: a damaged file
        should end no run later. None: the model starts anew."""
        return None

    def start(self, config: TrainConfig, model: nn.Module, sha256: str | None) -> None:
        """Give a new model the weights that it starts from; they have this SHA-256.

        Raises CheckpointError for other ones."""
        return  # most start anew

    @abstractmethod
    def heading(self, run: Run, model: nn.Module) -> list[str]:
        """What is about to be trained, in paragraphs to show."""

    def begin(self, run: Run, model: nn.Module) -> None:
        """A last touch to a new model, before its first step."""
        return  # most begin as they are made

    # --- in training ---

    def measures(self, config: TrainConfig) -> Measure:
        """What is measured beside the loss."""
        return ACCURACY

    @abstractmethod
    def batch(
        self, run: Run, examples: Examples, indices: np.ndarray, stream: tuple[int, ...]
    ) -> PackedBatch:
        """What the model is trained on; its random numbers are a pure function of `stream`."""

    @abstractmethod
    def loss(
        self, run: Run, model: Any, batch: PackedBatch, seed: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Of a batch on the device: the sums of its losses and of `measures`'s `trained`, such as
        how many labels are right.

        seed: () int64 on the device, of the dropout masks.
        """

    @abstractmethod
    def measure(self, run: Run, model: nn.Module, examples: Examples) -> tuple[float, float]:
        """Loss and `measures`'s `chosen` over all processes. The epoch of the best one, then of the
        lowest loss, is the best one."""

    # --- after training ---

    @abstractmethod
    def results(self, run: Run, model: nn.Module, progress: Progress) -> dict[str, Any]:
        """What results.json holds. `model` has the weights of the best epoch."""

    @abstractmethod
    def closing(self, run: Run, results: dict[str, Any]) -> str:
        """What came out, to show."""
