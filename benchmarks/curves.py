"""Learning curves of finished runs in one figure: python benchmarks/curves.py NAME=RUN ...

Written to docs/ as learning-curves.svg and .png, with hardware and versions below.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from plots import ROOT, save

from fasttx.reporting.plots import STYLE

COLOURS = ("#0b6e99", "#d9730d", "#0f7b6c", "#ad1a72", "#6940a5", "#5f5e5b")


def finished(argument: str) -> tuple[str, dict[str, Any]]:
    """NAME=RUN -> the name, and the run's results.json."""
    name, _, path = argument.rpartition("=")
    try:
        found = json.loads((Path(path) / "results.json").read_text(encoding="utf-8"))
        found["history"], found["test_accuracy"], found["val_accuracy"]
    except (OSError, ValueError, KeyError) as error:
        raise argparse.ArgumentTypeError(
            f"{path} is no finished run of train.py: {error}"
        ) from None
    return name or Path(path).name, found


def draw(runs: list[tuple[str, dict[str, Any]]], folder: Path) -> None:
    figure, (loss, accuracy) = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
    for (name, found), colour in zip(runs, COLOURS * len(runs), strict=False):
        history = found["history"]
        # An epoch's reviews: texts with pseudo-labels are among them.
        reviews, seen = [], 0.0
        for epoch in history:
            seen += epoch["seconds"] * epoch["samples_per_second"] / 1000
            reviews.append(seen)
        for axes, key in ((loss, "loss"), (accuracy, "accuracy")):
            scale = 100 if key == "accuracy" else 1
            for split, line in (("train", ":"), ("val", "-")):
                values = [scale * epoch[f"{split}_{key}"] for epoch in history]
                label = name if split == "val" else None
                axes.plot(reviews, values, line, color=colour, marker="o", ms=3.5, label=label)
        best = reviews[found["best_epoch"] - 1]
        accuracy.plot(best, 100 * found["test_accuracy"], "*", color=colour, ms=11, zorder=3)
    for axes, title in (
        (loss, "loss (training's with label smoothing)"),
        (accuracy, "accuracy, %"),
    ):
        axes.set_title(title)
        axes.set_xlabel("reviews read, thousands")
        axes.set_xlim(left=0)
    accuracy.legend(loc="lower right")
    seeds = sorted({found["seed"] for _, found in runs})
    where, versions = runs[0][1]["hardware"], runs[0][1]["versions"]
    hardware = where.get("gpu") or f"{where['cpu']}, {where['threads']} threads"
    text = (
        "solid: validation, dotted: training (words dropped), star: test, at the epoch that "
        f"validation chose; seed {', '.join(map(str, seeds))}\n"
        f"{hardware}, torch {versions['torch']}; python benchmarks/curves.py NAME=RUN ..."
    )
    save(figure, folder / "learning-curves", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", nargs="+", type=finished, metavar="NAME=RUN")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs")
    arguments = parser.parse_args()
    mpl.rcParams.update(STYLE)
    draw(arguments.run, arguments.folder)
    print(f"{arguments.folder / 'learning-curves.svg'} and .png")


if __name__ == "__main__":
    main()
