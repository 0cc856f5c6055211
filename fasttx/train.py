"""Training from Python, `fasttx.train(...)`; and what train.py does once its flags are read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from fasttx.config import RECIPES, SINGLE_LABEL, ModelConfig, TrainConfig
from fasttx.errors import ConfigError
from fasttx.load import TextClassifier, load
from fasttx.tasks import TASKS, read_config
from fasttx.tasks.origin import find_origin, is_pretrained
from fasttx.text import splits as data
from fasttx.text.corpora import holding
from fasttx.training import run as runs
from fasttx.training import trackers
from fasttx.training.distributed import Processes
from fasttx.training.folder import RunFolder
from fasttx.training.task import Run


@dataclass(frozen=True)
class TrainOptions:
    """What is asked for: a run to resume, or a recipe and the settings that change it; and the
    flags that a command line accepts beside them."""

    resume: Path | None = None
    recipe: str | None = None
    out: Path | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    model_settings: dict[str, Any] = field(default_factory=dict)
    accepts: frozenset[str] = frozenset()
    log_to: tuple[str, ...] = ()

    @property
    def dataset(self) -> str:
        return self.settings.get("dataset", "auto")

    def recipe_for(self, dataset: str) -> str:
        """The recipe asked for, else the one that fits. A recipe for IMDB does not fit `demo`, so
        where `auto` had to fall back to that corpus, it falls back to its recipe too."""
        fell_back = dataset == "demo" and self.dataset == "auto"
        source = self.settings.get("init_from")
        fitting = "full" if source is None else "finetune"
        if dataset == "demo":
            fitting = "demo"
        if source is not None and is_pretrained(source):
            fitting = "finetune-bert"  # at the rates of `demo` it would forget what it has learnt
        return fitting if fell_back or self.recipe is None else self.recipe

    def config(self, recipe: str) -> TrainConfig:
        """The settings given, over those of `recipe`; an encoder to start from has its own sizes.
        Raises ConfigError, CheckpointError."""
        base = RECIPES[recipe]
        if self.settings.get("problem_type", SINGLE_LABEL) != SINGLE_LABEL:
            base = replace(base, label_smoothing=0.0)  # which other problems have not
        model = base.model
        if source := self.settings.get("init_from"):
            model = find_origin(source).settings(model)
        return replace(base, model=replace(model, **self.model_settings), **self.settings)


def open_run(asked: TrainOptions, processes: Processes) -> Run | None:
    """A new run in a new folder, or the one to resume; None if that one is finished."""
    task = TASKS["classification"].load()
    if resume := runs.to_resume(asked.resume, asked.out, processes):
        folder = RunFolder(resume)
        return runs.resume(task, folder, read_config(folder.config, task.name), processes)
    source = data.resolve(asked.dataset)
    recipe = asked.recipe_for(source.name)
    return runs.create(task, asked.config(recipe), source, recipe, asked.out, processes)


def train_as_asked(asked: TrainOptions, *, quiet: bool = False) -> Path | None:
    """Open the run, train it, measure it once on the test split, and report. Its folder; None where
    the run to resume is finished."""
    trackers.check(asked.log_to)
    with runs.session(quiet=quiet) as processes:
        run = open_run(asked, processes)
        if run is None:
            return None
        runs.train(run, quiet=quiet, log_to=asked.log_to)
        return run.folder.path


# --- from Python ----------------------------------------------------------------------------------


def train(
    dataset: Any = None,
    *,
    recipe: str | None = None,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    log_to: Sequence[str] = (),
    quiet: bool = False,
    **settings: Any,
) -> TextClassifier:
    """Train a text classifier, as `python train.py` does. The finished run, as `fasttx.load`.

    dataset: what --dataset takes (`imdb`, `demo`, a path), or an object of Hugging Face `datasets`:
    a Dataset, whose splits are drawn, or a DatasetDict, or a dictionary, with train and, if it has
    them, validation and test. settings: the fields of `TrainConfig` and `ModelConfig`, such as
    problem_type, init_from, epochs or max_len, over those of the recipe. out: a new folder.
    resume: a run to go on with; it takes no settings, and needs the object that it was begun with.
    quiet: nothing is printed. Raises FasttxError as the command ends with; `errors.Interrupted`
    where Ctrl-C or SIGTERM stopped the run, which is saved then.
    """
    if resume is not None and (settings or recipe or out):
        given = [*settings, *(n for n, v in (("recipe", recipe), ("out", out)) if v)]
        raise ConfigError(
            f"resume takes its settings from {resume}/config.json; leave out {', '.join(given)}"
        )
    if recipe is not None and recipe not in RECIPES:
        raise ConfigError(f"recipe is {recipe!r}; expected one of {', '.join(RECIPES)}")
    of_run, of_model = _split(settings)
    with holding(dataset) as name:
        if name is not None and resume is None:
            of_run["dataset"] = name
        elif name is not None:
            _check_dataset(RunFolder(Path(os.path.expanduser(str(resume)))), name)
        asked = TrainOptions(
            _path(resume), recipe, _path(out), of_run, of_model, log_to=tuple(log_to)
        )
        folder = train_as_asked(asked, quiet=quiet) or asked.resume
    assert folder is not None
    return load(folder)


def _check_dataset(folder: RunFolder, name: str) -> None:
    """Raises ConfigError for a run to resume that was begun with something else."""
    begun = read_config(folder.config).train.dataset
    if begun != name:
        raise ConfigError(
            f"dataset is {name!r}, and {folder.path} was begun with {begun!r}; expected the same. "
            "Leave dataset out, unless it was an object in Python"
        )


def _path(given: str | Path | None) -> Path | None:
    return None if given is None else Path(os.path.expanduser(given))


def _split(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of the run, and those of its model. Raises ConfigError for unknown ones."""
    known = [
        {f.name for f in fields(cls) if "group" in f.metadata} for cls in (TrainConfig, ModelConfig)
    ]
    if unknown := [name for name in settings if name not in known[0] | known[1]]:
        raise ConfigError(
            f"unknown settings: {', '.join(unknown)}; expected fields of fasttx.TrainConfig or "
            "fasttx.ModelConfig (python train.py --help explains them)"
        )
    of_run, of_model = ({k: v for k, v in settings.items() if k in names} for names in known)
    paths = ("init_from", "pseudo_labels")
    return {k: os.fspath(v) if k in paths and v else v for k, v in of_run.items()}, of_model
