"""`fasttx evaluate`: a trained run, measured on labelled texts."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from fasttx import terminal
from fasttx.commands import flags
from fasttx.config import TrainConfig
from fasttx.load import load
from fasttx.tasks import read_config
from fasttx.text import splits as data
from fasttx.training import run as runs
from fasttx.training.folder import RunFolder


def _evaluate(args: argparse.Namespace) -> None:
    classifier = load(
        args.run, device=args.device, attn_backend=args.attn_backend, precision=args.precision
    )
    cut = "cut" if args.truncation else None  # where it says what to keep, it is cut
    reading = {"truncation": args.truncation, "long_texts": args.long_texts or cut}
    classifier = dataclasses.replace(classifier, **{k: v for k, v in reading.items() if v})
    folder = RunFolder(args.run)
    config = read_config(folder.config)
    if args.dataset is None:
        split = runs.load_dataset(folder, config).validation
    else:
        split = data.load_for_evaluation(
            args.dataset,
            classifier.label_names,
            label_numbers=config.dataset.get("label_numbers"),
            text_column=args.text_column,
            label_column=args.label_column,
            problem_type=classifier.problem_type,
        )
    logits = classifier.logits(split.texts, batch_size=args.batch_size)
    metrics = classifier.problem.metrics(logits.numpy(), split.labels)
    if args.json:
        where = args.dataset or f"validation split of {args.run}"
        found = {"dataset": where, "notes": split.notes, **metrics.to_dict()}
        terminal.say_json(found)
    else:
        if split.notes:
            terminal.say("\n".join([*split.notes, ""]))
        terminal.say(classifier.problem.format(metrics, classifier.label_names))


def add_command(commands: Any) -> None:
    parser = commands.add_parser("evaluate", help="measure a trained run on labelled texts")
    flags.add_run(parser)
    flags.add_inference(parser)
    flags.add_precision(parser)
    parser.add_argument(
        "--dataset",
        help="imdb, demo, or a path, for its test split (default: the run's own validation split)",
    )
    for name in ("truncation", "long_texts"):
        choice = TrainConfig.__dataclass_fields__[name].metadata
        parser.add_argument(
            "--" + name.replace("_", "-"),
            choices=choice["choices"],
            help=f"instead of the run's own choice: {choice['help']}",
        )
    parser.add_argument("--text-column", help="name of the text column (default: found)")
    parser.add_argument("--label-column", help="name of the label column (default: found)")
    parser.set_defaults(run_command=_evaluate)
