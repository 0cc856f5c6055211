"""The kinds of runs: one table, and how the name in config.json becomes a `Task`."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

from fasttx.config import PretrainConfig, TrainConfig
from fasttx.errors import CheckpointError, ConfigError
from fasttx.text import demo
from fasttx.training.checkpoint import FORMAT, RunConfig, read_json
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
    if values.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not the config.json of a fasttx run")
    found = values.get("task", "classification")  # the only one when the format was young
    entry = TASKS.get(found)
    if entry is None or found not in (tasks or TASKS):
        advice = "It is from another version"
        if entry is not None:
            advice = f"{entry.use}{entry.load().command} --resume {{run}}".format(run=path.parent)
        raise CheckpointError(
            f"{path.parent} is a run of {found}; expected {' or '.join(tasks or TASKS)}. {advice}"
        )
    try:
        settings = {**values["train"]}
        if settings.get("dataset") == "demo":  # its texts are those of that run's time
            settings["dataset"] = demo.name_of({**values["dataset"]}.get("grammar", 1))
        return RunConfig(
            entry.settings.from_dict(settings),
            values["attn_backend"],
            values["device"],
            tuple(values["label_names"]),
            values["dataset"],
            values["recipe"],
            found,
        )
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{path} is damaged or from another version: {error}") from error
