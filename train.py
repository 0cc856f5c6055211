"""Train a text classifier:  python train.py --attn-backend sdpa  (all flags: --help)."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fasttx.commands import cli
from fasttx.errors import FasttxError
from fasttx.files import write_json_atomic
from fasttx.models.classifier import TransformerClassifier
from fasttx.text import splits as data
from fasttx.training import distributed
from fasttx.training import progress as report
from fasttx.training import run as runs
from fasttx.training.checkpoint import CLASSIFICATION, RunConfig, RunFolder, load_encoder
from fasttx.training.trainer import Interrupted

log = logging.getLogger("fasttx")


def open_run(options: cli.TrainOptions, processes: distributed.Processes) -> runs.Run | None:
    """A new run in a new folder, or the one to resume; None if that one is finished."""
    if options.resume:
        folder = RunFolder(options.resume)
        saved = RunConfig.load(folder.config, CLASSIFICATION)
        if folder.results.exists():
            log.info("%s is finished: its results are in %s", folder.path, folder.results)
            return None
        return runs.resume(folder, saved, processes)

    source = data.resolve(options.settings.get("dataset", "auto"))
    recipe = options.recipe_for(source.name)
    config = replace(options.config(recipe), dataset=source.name)
    dataset = data.load(config)
    for note in (*source.notes, *dataset.notes):
        log.info("%s", note)
    folder = runs.new_folder(options.out, recipe, processes)
    return runs.create(config, recipe, folder, dataset, processes)


def main(argv: Sequence[str] | None = None) -> int:
    options = cli.train_options(argv)
    processes = distributed.start()
    try:
        with report.console(logging.INFO if processes.main else logging.ERROR):
            run = open_run(options, processes)
            if run is None:
                return 0
            with report.log_file(run.folder.log, processes.main):
                return train(run, processes)
    except FasttxError as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    finally:
        distributed.stop(processes)


def train(run: runs.Run, processes: distributed.Processes) -> int:
    config, counts = run.config.train, run.config.dataset["label_counts"]
    log.info("%s", report.heading(run.config, run.folder, run.device))
    log.info("%s", report.label_table(counts))
    if warning := report.single_class_warning(counts):
        log.info("%s", warning)

    torch.manual_seed(config.seed)
    model = TransformerClassifier.from_config(
        replace(config.model, attn_backend=run.config.attn_backend)
    ).to(run.device)
    if config.init_from and not run.folder.last.exists():
        log.info("encoder    starts from %s", config.init_from)
        load_encoder(model, RunFolder(Path(config.init_from)).best_model)
    try:
        results = runs.train_and_test(run, model, processes)
    except Interrupted:
        log.info("stopped and saved; go on with: python train.py --resume %s", run.folder.path)
        return 130
    if processes.main:
        write_json_atomic(run.folder.results, results)
        log.info("\n%s", report.closing(results, run.folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
