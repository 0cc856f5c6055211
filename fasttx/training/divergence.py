"""A training whose numbers are no longer finite: what it says, and what it leaves to look at."""

from __future__ import annotations

import contextlib

from fasttx.errors import DivergedError
from fasttx.ops.dropout import forward_seed
from fasttx.text.packing import shuffled_batches
from fasttx.training.task import Run


def recorded(run: Run, what: str, micro_step: int) -> DivergedError:
    """The error to raise, once diverged.json tells what is needed to see that step again.

    what: the number that is not finite. micro_step: the forward pass, counted from the start of the
    run, in which that showed first.
    """
    config, folder, count = run.config.train, run.folder, len(run.splits.train)
    per_epoch = -(-count // config.batch_size)
    epoch, batch = divmod(micro_step, per_epoch)
    steps_before = epoch * -(-per_epoch // config.grad_accumulation)
    step = steps_before + batch // config.grad_accumulation
    order = list(shuffled_batches(count, config.batch_size, seed=config.seed, epoch=epoch))
    found = {
        "what": what,
        "epoch": epoch + 1,
        "batch": batch + 1,
        "micro_step": micro_step,
        "step": step,
        "seed": config.seed,
        "forward_seeds": [
            forward_seed(config.seed, micro_step, rank) for rank in range(run.processes.world)
        ],
        # Numbers of training texts, counted from 0 in the order of the training split.
        "texts": order[batch].tolist(),
    }
    kept = "no checkpoint had been written before"
    if folder.last.exists():
        kept = f"{folder.last} holds the last state in which all numbers were finite"
    where = ""
    if run.processes.main:
        with contextlib.suppress(OSError):  # a full disk should not hide why training ended
            folder.write_json(folder.diverged, found)
            where = f"; {folder.diverged} names its texts and seeds"
    return DivergedError(
        f"{what}, first in epoch {epoch + 1}, step {step + 1}{where}. {kept}; going on from there "
        f"would repeat it. Start a new run with {run.task.tamer}"
    )
