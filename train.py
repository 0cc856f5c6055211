"""Train a text classifier:  python train.py --attn-backend sdpa  (all flags: --help)."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fasttx.commands.ending import exit_status, quiet_start

if __name__ == "__main__":
    quiet_start("train.py")  # the other imports take seconds

from fasttx.commands.train import TrainOptions, options
from fasttx.tasks import TASKS, read_config
from fasttx.text import splits as data
from fasttx.training import run as runs
from fasttx.training import trackers
from fasttx.training.distributed import Processes
from fasttx.training.folder import RunFolder
from fasttx.training.task import Run


def open_run(asked: TrainOptions, processes: Processes) -> Run | None:
    """A new run in a new folder, or the one to resume; None if that one is finished."""
    task = TASKS["classification"].load()
    if resume := runs.to_resume(asked.resume, asked.out, processes):
        folder = RunFolder(resume)
        return runs.resume(task, folder, read_config(folder.config, task.name), processes)
    source = data.resolve(asked.dataset)
    recipe = asked.recipe_for(source.name)
    return runs.create(task, asked.config(recipe), source, recipe, asked.out, processes)


def train(asked: TrainOptions) -> None:
    """Open the run, train it, measure it once on the test split, and report."""
    trackers.check(asked.log_to)
    with runs.session() as processes:
        run = open_run(asked, processes)
        if run is not None:
            runs.train(run, log_to=asked.log_to)


def main(argv: Sequence[str] | None = None) -> int:
    accepts: set[str] = set()

    def command() -> None:
        asked = options(argv)
        accepts.update(asked.accepts)
        train(asked)

    return exit_status("train.py", command, accepts)


if __name__ == "__main__":
    sys.exit(main())
