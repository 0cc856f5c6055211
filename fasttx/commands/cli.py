"""Command lines: the flags of train.py, made from the configuration, and the `fasttx` command."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fasttx import device as devices
from fasttx.commands import baseline as baselines
from fasttx.commands import ensemble, flags, pretrain
from fasttx.config import ENCODER_SHAPE, RECIPES, ModelConfig, TrainConfig
from fasttx.errors import DataError, FasttxError
from fasttx.ops.registry import BACKENDS, resolve_name
from fasttx.reporting import explain, html_report
from fasttx.training.checkpoint import RunConfig, RunFolder
from fasttx.version import __version__


def _recipe_lines() -> str:
    def line(name: str, c: TrainConfig) -> str:
        size = f"{c.train_samples:,} reviews" if c.train_samples else "all reviews"
        return (
            f"  {name:8} {size}, {c.epochs} epochs of batches of {c.batch_size}, {c.optimizer} at "
            f"{c.lr:g} ({c.schedule}), dropout {c.model.dropout_text}"
        )

    return "recipes:\n" + "\n".join(line(name, c) for name, c in RECIPES.items())


@dataclass(frozen=True)
class TrainOptions:
    """What train.py was asked: a run to resume, or a recipe and the settings that change it."""

    resume: Path | None
    recipe: str | None
    out: Path | None
    settings: dict[str, Any]
    model_settings: dict[str, Any]

    def recipe_for(self, dataset: str) -> str:
        """The recipe asked for, else the one that fits. A recipe for IMDB does not fit `demo`, so
        where `auto` had to fall back to that corpus, it falls back to its recipe too."""
        fell_back = dataset == "demo" and self.settings.get("dataset", "auto") == "auto"
        started = "finetune" if self.settings.get("init_from") else "full"
        fitting = "demo" if dataset == "demo" else started
        return fitting if fell_back or self.recipe is None else self.recipe

    def config(self, recipe: str) -> TrainConfig:
        """The settings given, over those of `recipe`; an encoder to start from has its own sizes.
        Raises ConfigError, CheckpointError."""
        base = RECIPES[recipe]
        model = base.model
        if source := self.settings.get("init_from"):
            theirs = RunConfig.load(RunFolder(Path(source)).config).train.model
            model = dataclasses.replace(model, **{k: getattr(theirs, k) for k in ENCODER_SHAPE})
        model = dataclasses.replace(model, **self.model_settings)
        return dataclasses.replace(base, model=model, **self.settings)


def train_options(argv: Sequence[str] | None = None) -> TrainOptions:
    parser = argparse.ArgumentParser(
        "train.py",
        description="Train a Transformer text classifier; the defaults are those of the recipe.",
        epilog=_recipe_lines(),
        formatter_class=lambda prog: flags.RawEpilog(prog),
    )
    parser.add_argument("--version", action="version", version=f"fasttx {__version__}")
    run = parser.add_argument_group("recipe and run folder")
    run.add_argument(
        "--recipe",
        choices=RECIPES,
        help="settings to start from (default: full; finetune with --init-from; demo on demo)",
    )
    run.add_argument("--out", type=Path, metavar="DIR", help="new run folder (default: runs/...)")
    run.add_argument(
        "--resume", type=Path, metavar="RUN", help="go on with this run; takes no other settings"
    )
    for cls in (TrainConfig, ModelConfig):
        flags.add_settings(parser, cls)
    values = vars(parser.parse_args(argv))
    flags.refuse_beside_resume(parser, values)
    resume, recipe, out = values.pop("resume"), values.pop("recipe"), values.pop("out")
    return TrainOptions(resume, recipe, out, *flags.split(values))


# --- the `fasttx` command -------------------------------------------------------------------------


def backend_table(device: torch.device, head_dim: int = 32) -> str:
    """Name, available here, dtypes, dropout kind, and why not."""
    rows = [("backend", "here", "dtypes", "dropout", "what it is, or why not")]
    for b in BACKENDS.values():
        reasons = b.unavailable_reasons(device, torch.float32, head_dim)
        dtypes = " ".join(str(d).removeprefix("torch.") for d in b.dtypes)
        kind = {"shared": "shared masks", "torch": "torch's own"}[b.dropout]
        here, why = ("no", "; ".join(reasons)) if reasons else ("yes", b.summary)
        rows.append((b.name, here, dtypes, kind, why))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]])
        for row in rows
    ]
    chosen = resolve_name("auto", device, torch.float32, head_dim)
    return "\n".join([*lines, f"\nauto on {device} (float32, head_dim {head_dim}): {chosen}"])


def _backends(args: argparse.Namespace) -> None:
    print(backend_table(devices.pick(args.device)))


def _doctor(args: argparse.Namespace) -> int:
    from fasttx.commands import doctor

    found = doctor.examine(devices.pick(args.device))
    print(json.dumps(found) if args.json else doctor.text(found))
    return 0 if found["sound"] else 1


def _read_texts(args: argparse.Namespace) -> list[str]:
    texts: list[str] = list(args.text)
    if args.file:
        try:
            lines = Path(args.file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{args.file} cannot be read as UTF-8 text: {error}") from error
        texts += [line for line in lines if line.strip()]
    if not texts and not args.file:
        if sys.stdin.isatty():
            raise DataError("no text: give texts, --file FILE, or lines on standard input")
        texts = [line.rstrip("\n") for line in sys.stdin if line.strip()]
    return texts


def _predict(args: argparse.Namespace) -> None:
    from fasttx.load import load

    classifier = load(args.run, device=args.device, attn_backend=args.attn_backend)
    texts = _read_texts(args)
    for text, p in zip(texts, classifier.predict(texts, batch_size=args.batch_size), strict=True):
        if args.json:
            row = {"text": text, **dataclasses.asdict(p)}
            print(json.dumps(row, ensure_ascii=False))
        else:
            shown = text if len(text) <= 80 else text[:77] + "..."
            print(f"{p.label}  {p.probability:7.2%}  {shown}")


def _evaluate(args: argparse.Namespace) -> None:
    from fasttx.load import load
    from fasttx.text import splits as data
    from fasttx.training import run as runs
    from fasttx.training.metrics import classification_metrics, format_metrics

    classifier = load(args.run, device=args.device, attn_backend=args.attn_backend)
    cut = "cut" if args.truncation else None  # where it says what to keep, it is cut
    reading = {"truncation": args.truncation, "long_texts": args.long_texts or cut}
    classifier = dataclasses.replace(classifier, **{k: v for k, v in reading.items() if v})
    if args.dataset is None:
        folder = RunFolder(Path(args.run))
        split = runs.load_dataset(folder, RunConfig.load(folder.config)).validation
    else:
        split = data.load_for_evaluation(
            args.dataset, classifier.label_names, text_column=args.text_column,
            label_column=args.label_column,
        )  # fmt: skip
    logits = classifier.logits(split.texts, batch_size=args.batch_size)
    metrics = classification_metrics(logits.numpy(), split.labels)
    if args.json:
        where = args.dataset or f"validation split of {args.run}"
        print(json.dumps({"dataset": where, **metrics.to_dict()}))
    else:
        print(format_metrics(metrics, list(classifier.label_names)))


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder that train.py wrote")
    parser.add_argument("--batch-size", type=int, default=64, help="texts at a time (default: 64)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--attn-backend", help="instead of the run's own choice")
    parser.add_argument("--json", action="store_true", help="JSON instead of text")


def command_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "fasttx", description="Fast Transformer text classifiers. Training: python train.py --help",
        formatter_class=flags.Formatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"fasttx {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    backends = commands.add_parser("backends", help="which attention backends run here")
    backends.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    backends.set_defaults(run_command=_backends)

    doctor = commands.add_parser(
        "doctor", help="check and time every backend here; what a bug report should hold"
    )
    doctor.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    doctor.add_argument("--json", action="store_true", help="JSON instead of text")
    doctor.set_defaults(run_command=_doctor)

    predict = commands.add_parser(
        "predict", help="label texts with a trained run", formatter_class=flags.Formatter
    )
    _add_run(predict)
    predict.add_argument("text", nargs="*", help="texts (default: lines of standard input)")
    predict.add_argument("--file", help="a UTF-8 file, one text a line")
    predict.set_defaults(run_command=_predict)

    pretrain.add_command(commands)

    evaluate = commands.add_parser(
        "evaluate", help="measure a trained run on labelled texts", formatter_class=flags.Formatter
    )
    _add_run(evaluate)
    evaluate.add_argument(
        "--dataset",
        help="imdb, demo, or a path, for its test split (default: the run's own validation split)",
    )
    for name in ("truncation", "long_texts"):
        field = TrainConfig.__dataclass_fields__[name]
        evaluate.add_argument(
            "--" + name.replace("_", "-"), choices=field.metadata["choices"],
            help=f"instead of the run's own choice: {field.metadata['help']}",
        )  # fmt: skip
    evaluate.add_argument("--text-column", help="name of the text column (default: found)")
    evaluate.add_argument("--label-column", help="name of the label column (default: found)")
    evaluate.set_defaults(run_command=_evaluate)

    html_report.add_command(commands)
    explain.add_command(commands)
    baselines.add_command(commands)
    ensemble.add_command(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = command_parser().parse_args(argv)
    try:
        return args.run_command(args) or 0
    except FasttxError as error:
        print(f"fasttx: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `fasttx predict ... | head`
        sys.stderr.close()
        return 1


if __name__ == "__main__":
    sys.exit(main())
