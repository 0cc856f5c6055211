"""The kinds of runs: one table, and how the name in config.json becomes a `Task`."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasttx.config import PretrainConfig, TrainConfig
from fasttx.errors import CheckpointError, ConfigError
from fasttx.text import demo
from fasttx.training.checkpoint import FORMATS, RunConfig, read_json
from fasttx.training.folder import Manifest
from fasttx.training.task import Task


@dataclass(frozen=True)
class TaskEntry:
    """One kind of run: its name ("task" in config.json), the module whose TASK it is, the class of
    its settings, and what to do with such a run ({run}) where another kind is expected."""

    name: str
    module: str
    settings: type[TrainConfig]
    use: str = "Go on with it: "

    def load(self) -> Task:
        return importlib.import_module(self.module).TASK


_FOR_TRAINING = "Train from it: python train.py --init-from {run}; go on with it: "
TASKS = {
    entry.name: entry
    for entry in (
        TaskEntry("classification", "fasttx.tasks.classification", TrainConfig),
        TaskEntry("pretraining", "fasttx.tasks.masked_lm", PretrainConfig, _FOR_TRAINING),
        TaskEntry("the LSTM baseline", "fasttx.tasks.lstm", TrainConfig),
    )
}


def read_config(path: Path, *tasks: str) -> RunConfig:
    """config.json of a run; of one of these tasks, where some are named.

    Raises CheckpointError for a file that is missing, damaged, or of another task.
    """
    values = read_json(path)
    form = values.get("format")
    if form not in FORMATS:
        raise CheckpointError(
            f"{path} is not the config.json of a fasttx run that this version reads: its format is "
            f"{form!r}; expected {' or '.join(FORMATS)}. A newer fasttx may read it"
        )
    if form != FORMATS[0] and not Manifest(path.parent).exists():
        raise CheckpointError(
            f"{path.parent} has lost its manifest.json, so that its files cannot be checked. Bring "
            f"it back; or, if you trust them as they are: fasttx verify {path.parent} --accept"
        )
    found = values.get("task", "classification")  # the only one when the format was young
    entry = TASKS.get(found) if isinstance(found, str) else None
    if entry is None or found not in (tasks or TASKS):
        advice = "It is from another version"
        if entry is not None:
            advice = f"{entry.use}{entry.load().command} --resume {{run}}".format(run=path.parent)
        raise CheckpointError(
            f"{path.parent} is a run of {found}; expected {' or '.join(tasks or TASKS)}. {advice}"
        )
    try:
        _check_values(values)
        settings = dict(values["train"])
        if settings.get("dataset") == "demo":  # its texts are those of that run's time
            settings["dataset"] = demo.name_of(values["dataset"].get("grammar", 1))
        train = entry.settings.from_dict(settings)
        names = tuple(values["label_names"])
        classes = train.model.num_classes
        if names and len(names) != classes:
            raise ConfigError(f"it has {len(names)} label_names, and its model {classes} classes")
        return RunConfig(
            train,
            values["attn_backend"],
            values["device"],
            names,
            values["dataset"],
            values["recipe"],
            found,
            values.get("init_from_sha256"),
            values.get("choices"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or from another version: {error}") from error


# What config.json holds beside the settings, and what its `dataset` may hold.
_TYPES: dict[str, tuple[type, ...]] = {
    "attn_backend": (str,), "device": (str,), "label_names": (list,), "dataset": (dict,),
    "recipe": (str, type(None)), "train": (dict,),
}  # fmt: skip
_DATASET_TYPES: dict[str, tuple[type, ...]] = {
    "name": (str,), "fingerprint": (str,), "label_counts": (dict,), "train_samples": (int,),
    "val_samples": (int,), "test_samples": (int,), "grammar": (int,),
}  # fmt: skip


def _check_values(values: dict[str, Any]) -> None:
    """Raises ConfigError for values of other types than a run writes, as a hand may leave them, and
    KeyError for missing ones."""

    def check(name: str, value: Any, types: tuple[type, ...]) -> None:
        if not isinstance(value, types):
            raise ConfigError(f"{name} is {str(value)[:60]!r}; expected {types[0].__name__}")

    for name, types in _TYPES.items():
        check(name, values[name], types)
    check("choices", values.get("choices"), (dict, type(None)))
    for name, types in _DATASET_TYPES.items():
        if name in values["dataset"]:
            check(f"dataset's {name}", values["dataset"][name], types)
    names = values["label_names"]
    if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ConfigError(f"label_names are {str(names)[:60]}; expected texts, none of them twice")
