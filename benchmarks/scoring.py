"""A file scored beside the same texts in memory: python benchmarks/scoring.py RUN

`fasttx predict --file` reads a csv file, cuts it into parts, writes each to the disk and joins them
to a parquet file. Beside it, in turn, `TextClassifier.predict` on a list of the same texts: the
bulk rate of the model, tokenizing included. Both have the same model, one after another.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from figures import caption, environment
from pyarrow import parquet
from workload import reviews

from fasttx.scoring import job
from fasttx.scoring.scorer import Scorer

T = TypeVar("T")


def write_csv(path: Path, texts: list[str]) -> None:
    with path.open("w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(["text"])
        writer.writerows([text] for text in texts)


def labels_of(path: Path) -> list[str]:
    return parquet.read_table(path)["predicted_label"].to_pylist()


def timed(work: Callable[[], T]) -> tuple[float, T]:
    begin = time.perf_counter()
    result = work()
    return time.perf_counter() - begin, result


def compare(scorer: Scorer, groups: list[list[str]], folder: Path) -> list[tuple[float, float]]:
    """Seconds in memory and of the file, by group; who is first changes. Raises AssertionError for
    other labels."""
    classifier, found = scorer.classifier, []
    for number, texts in enumerate(groups):
        source, out = folder / f"{number}.csv", folder / f"{number}.parquet"
        write_csv(source, texts)
        in_memory = partial(classifier.predict, texts, batch_size=scorer.batch_size)
        of_the_file = partial(job.run, job.Job(source, out, scorer))
        if number % 2:
            file_seconds, _ = timed(of_the_file)
            seconds, answers = timed(in_memory)
        else:
            seconds, answers = timed(in_memory)
            file_seconds, _ = timed(of_the_file)
        assert labels_of(out) == [a.label for a in answers], "the file has other labels"
        found.append((seconds, file_seconds))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--data", default=os.environ.get("FASTTX_DATA"), help="of the reviews")
    parser.add_argument("--texts", type=int, default=1000, help="of a file (default: 1000)")
    parser.add_argument("--rounds", type=int, default=7, help="files (default: 7)")
    parser.add_argument("--precision", default="fp32")
    arguments = parser.parse_args()
    if not arguments.data:
        parser.error("the reviews are missing: pass --data or set $FASTTX_DATA")
    count, rounds = arguments.texts, arguments.rounds
    texts = reviews(arguments.data, count * (rounds + 1))
    if min(count, rounds) < 1 or len(texts) < count * (rounds + 1):
        parser.error(
            f"--texts {count} and --rounds {rounds}: expected at least one each, and "
            f"{rounds} + 1 times {count} reviews; there are {len(texts):,}"
        )
    groups = [texts[i : i + count] for i in range(0, len(texts), count)]
    scorer = Scorer(arguments.run, precision=arguments.precision, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        compare(scorer, groups[-1:], Path(folder))  # a first time is slower
        where = environment(torch.device("cpu"))
        found = compare(scorer, groups[:-1], Path(folder))
    print(caption(where))
    print(f"{count} reviews a file, n = {rounds}, {arguments.precision}")
    for name, seconds in zip(("in memory", "file"), zip(*found, strict=True), strict=True):
        print(f"{name:10s} {count / statistics.median(seconds):8.1f} samples/s")
    ratios = sorted(memory / file for memory, file in found)
    print(f"the file's rate is {100 * statistics.median(ratios):.1f} % of the one in memory "
          f"({100 * ratios[0]:.1f} to {100 * ratios[-1]:.1f} %)")  # fmt: skip


if __name__ == "__main__":
    main()
