"""The command line of train.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fasttx.commands import flags
from fasttx.config import RECIPES, SINGLE_LABEL, ModelConfig, TrainConfig
from fasttx.tasks.origin import find_origin, is_pretrained
from fasttx.version import __version__


@dataclass(frozen=True)
class TrainOptions:
    """What train.py was asked: a run to resume, or a recipe and the settings that change it;
    and the flags that it accepts beside them."""

    resume: Path | None
    recipe: str | None
    out: Path | None
    settings: dict[str, Any]
    model_settings: dict[str, Any]
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


def options(argv: Sequence[str] | None = None) -> TrainOptions:
    parser = flags.Parser(
        "train.py",
        description="Train a Transformer text classifier; the defaults are those of the recipe.",
        epilog="recipes:\n" + "\n".join(_recipe_line(name, c) for name, c in RECIPES.items()),
        formatter_class=flags.RawEpilog,
    )
    parser.add_argument("--version", action="version", version=f"fasttx {__version__}")
    run = parser.add_argument_group("recipe and run folder")
    run.add_argument(
        "--recipe",
        choices=RECIPES,
        help="settings to start from (default: full; finetune from a run, finetune-bert from a "
        "pretrained encoder; demo on demo)",
    )
    flags.add_out(run)
    flags.add_resume(run)
    flags.add_log_to(run)
    for cls in (TrainConfig, ModelConfig):
        flags.add_settings(parser, cls)
    values = vars(parser.parse_args(argv))
    resume, accepts = values.pop("resume"), values.pop("accepts")
    log_to = tuple(values.pop("log_to"))
    flags.refuse_beside_resume(parser, resume, values)
    recipe, out = values.pop("recipe"), values.pop("out")
    accepts = frozenset() if resume else accepts
    return TrainOptions(resume, recipe, out, *flags.split(values), accepts, log_to)


def _recipe_line(name: str, c: TrainConfig) -> str:
    size = f"{c.train_samples:,} reviews" if c.train_samples else "all reviews"
    return (
        f"  {name:13} {size}, {c.epochs} epochs of batches of {c.batch_size}, {c.optimizer} at "
        f"{c.lr:g} ({c.schedule}), dropout {c.model.dropout_text}"
    )
