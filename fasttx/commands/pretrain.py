"""`fasttx pretrain`: a masked language model on texts alone, for train.py --init-from."""

from __future__ import annotations

import argparse
import functools
from dataclasses import replace
from typing import Any

from fasttx.commands import flags
from fasttx.config import PRETRAIN, ModelConfig, PretrainConfig
from fasttx.tasks import TASKS, read_config
from fasttx.tasks.origin import Origin, PretrainedOrigin, find_origin
from fasttx.text import splits as data
from fasttx.training import run as runs
from fasttx.training import trackers
from fasttx.training.folder import RunFolder

# Settings of a classifier's training that say nothing here.
WITHOUT = (
    "test_samples subset_order allow_single_class truncation long_texts label_smoothing "
    "word_dropout pseudo_labels split_seed"
).split()


def _pretrain(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    trackers.check(args.log_to)
    others = ("run_command", "resume", "accepts", "log_to")
    values = {k: v for k, v in vars(args).items() if k not in others}
    flags.refuse_beside_resume(parser, args.resume, values)
    out = values.pop("out")
    settings, model = flags.split(values)
    task = TASKS["pretraining"].load()
    with runs.session() as processes:
        if resume := runs.to_resume(args.resume, out, processes):
            folder = RunFolder(resume)
            run = runs.resume(task, folder, read_config(folder.config, task.name), processes)
        else:
            base = PRETRAIN
            if source_of := settings.get("init_from"):
                base = _continued(find_origin(source_of))
            config = replace(base, model=replace(base.model, **model), **settings)
            source = data.resolve(config.dataset)
            run = runs.create(task, config, source, "pretrain", out, processes)
        if run is not None:
            runs.train(run, log_to=args.log_to)


def _continued(origin: Origin) -> PretrainConfig:
    """The settings to go on from an encoder; from a pretrained one with its dropout, at a rate that
    does not undo what it has learnt."""
    if not isinstance(origin, PretrainedOrigin):
        return replace(PRETRAIN, model=origin.settings(PRETRAIN.model))
    model = origin.settings(replace(PRETRAIN.model, dropout=0.1))
    return replace(PRETRAIN, lr=5e-5, mask_share=0.15, warmup_steps=100, model=model)


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "pretrain",
        help="learn from texts without labels; for train.py --init-from",
        description="Train the encoder as a masked language model, on the texts of a dataset's "
        "training split and on its unlabelled texts (unsupervised.parquet, train/unsup, ...).",
    )
    folder = parser.add_argument_group("run folder")
    flags.add_out(folder)
    flags.add_resume(folder)
    flags.add_log_to(folder)
    flags.add_settings(parser, PretrainConfig, WITHOUT)
    flags.add_settings(parser, ModelConfig)
    parser.set_defaults(run_command=functools.partial(_pretrain, parser))
