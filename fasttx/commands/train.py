"""The command line of train.py."""

from __future__ import annotations

from collections.abc import Sequence

from fasttx.commands import flags
from fasttx.config import RECIPES, ModelConfig, TrainConfig
from fasttx.train import TrainOptions
from fasttx.version import __version__


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
