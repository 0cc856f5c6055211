"""What times say: results, their tables, and what they were measured on."""

from __future__ import annotations

import argparse
import math
import os
import re
import statistics
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contest import Contest
from limit import Limit

from fasttx import device as devices

SLICE_MS = 8.0  # what the scheduler gives a busy core's next thread on Linux
TUNED = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592"


@dataclass(frozen=True)
class Result:
    """One contestant's figures, from medians over `rounds` rounds."""

    contestant: str
    samples_per_second: float
    ratio: float  # times as fast as the first peer that ran
    ms: float
    quartiles_ms: tuple[float, float]
    ideal_ms: float  # what the limit allows
    limit_share: float  # ideal time over measured time
    peak_memory_mb: float  # how far memory rises during a step
    kernel_ms: float  # by triton.testing.do_bench, on CUDA, for attention alone
    rounds: int
    note: str
    artefact: bool  # time slices, not work: not to be quoted

    def record(self) -> dict[str, Any]:
        """For JSON, which has no NaN."""
        return {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in asdict(self).items()
        }


def results(
    contest: Contest, times: Mapping[str, list[float]], ideal: list[float],
    memory: Mapping[str, float], kernels: Mapping[str, float],
) -> list[Result]:  # fmt: skip
    """From seconds by contestant and ideal seconds, one of each a round."""
    first = next((name for name in times if not name.startswith("fasttx-")), None)
    base = statistics.median(times[first]) if first else math.nan
    best = statistics.median(ideal)
    found = []
    for name, seconds in times.items():
        entrant = contest.entrants[name]
        # The limit is not that of who computes in another precision.
        limited = getattr(entrant, "precision", None) in (None, contest.facts.get("precision"))
        median = statistics.median(seconds)
        low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
        found.append(
            Result(
                contestant=name,
                samples_per_second=contest.samples / median,
                ratio=base / median,
                ms=1e3 * median,
                quartiles_ms=(1e3 * low, 1e3 * high),
                ideal_ms=1e3 * best,
                limit_share=best / median if limited else math.nan,
                peak_memory_mb=memory[name],
                kernel_ms=kernels[name],
                rounds=len(seconds),
                note=entrant.note,
                artefact=scheduler_artefact(seconds, load_average()),
            )
        )
    return found


def scheduler_artefact(seconds: list[float], load: float) -> bool:
    """Whether short times stand at multiples of 8 ms on a busy machine: time slices, not work.

    Two threads that spin for one another's results wait a slice for every region they share.
    """
    slices = [1e3 * s / SLICE_MS for s in seconds]
    at_multiples = sum(round(n) >= 1 and abs(n - round(n)) < 0.02 for n in slices)
    busy = load > (os.cpu_count() or 1) / 2
    short = statistics.median(slices) < 16  # beyond, a multiple is always near
    return busy and short and len(slices) >= 3 and 2 * at_multiples > len(slices)


def load_average() -> float:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan


# ----------------------------------------------------------------------------------------- tables

HEADINGS = ("contestant", "samples/s", "ratio", "ms (quartiles)", "limit", "MB", "do_bench ms", "")


def _number(x: float, form: str, unit: str = "") -> str:
    return "-" if math.isnan(x) else format(x, form) + unit


def _cells(result: Result) -> tuple[str, ...]:
    memory, kernel = _number(result.peak_memory_mb, ",.0f"), _number(result.kernel_ms, ".3f")
    if result.artefact:
        note = (
            f"{result.ms:.1f} ms is a multiple of {SLICE_MS:g} ms under load: scheduling, not work"
        )
        return (result.contestant, *"----", memory, kernel, note)
    digits = next((d for d, least in enumerate((1000, 100, 10, 1)) if result.ms >= least), 3)
    low, high = result.quartiles_ms
    return (
        result.contestant,
        f"{result.samples_per_second:,.1f}",
        _number(result.ratio, ".2f", "x"),
        f"{result.ms:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})",
        _number(100 * result.limit_share, ".1f" if result.limit_share < 0.1 else ".0f", " %"),
        memory,
        kernel,
        result.note,
    )


def table(found: Iterable[Result], markdown: bool = False) -> str:
    """The results as text, or as a table that a README takes."""
    lines = [HEADINGS, *map(_cells, found)]
    kept = [i for i, column in enumerate(zip(*lines, strict=True)) if {*column[1:]} - {"-", ""}]
    return align([tuple(line[i] for i in kept) for line in lines], markdown)


def align(lines: list[tuple[str, ...]], markdown: bool) -> str:
    """Columns below the headings in the first line; one without a heading, the last, is a note."""
    if markdown:
        lines = [lines[0], ("---",) * len(lines[0]), *lines[1:]]
        return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for line in lines:
        cells = [c.rjust(w) for c, w in zip(line, widths, strict=True)]
        cells[0] = line[0].ljust(widths[0])
        if not lines[0][-1]:
            cells[-1] = line[-1]
        text.append("  ".join(cells).rstrip())
    return "\n".join(text)


def environment(device: torch.device) -> dict[str, Any]:
    """What a figure depends on besides the code."""
    return {
        **devices.hardware(device),
        **{f"{name} version": version for name, version in devices.versions().items()},
        "load": round(load_average(), 2),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "unset"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "unset"),
        "allocator": "tuned" if os.environ.get("GLIBC_TUNABLES") == TUNED else "default",
    }


def add_allocator(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--allocator", choices=("default", "tuned"), default="default",
                        help="tuned: glibc keeps freed memory (starts anew)")  # fmt: skip


def take_allocator(name: str) -> None:
    """Start this program anew where it needs another allocator."""
    if name == "tuned" and os.environ.get("GLIBC_TUNABLES") != TUNED:
        os.execve(
            sys.executable, [sys.executable, *sys.argv], os.environ | {"GLIBC_TUNABLES": TUNED}
        )


def saved_runs_folder() -> Path:
    """Where pytest-benchmark saves this machine's figures, whatever folder it is started from."""
    found = devices.hardware(devices.pick())
    name = f"{found.get('gpu') or found['cpu']} {found['threads']} threads"
    folder = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")
    return Path(__file__).resolve().parents[1] / ".benchmarks" / folder


def caption(where: dict[str, Any]) -> str:
    """One line: hardware, versions, and what else could explain a figure."""
    return (
        f"{where.get('gpu') or where['cpu']}, {where['threads']} threads, "
        f"torch {where['torch version']}, Python {where['python version']}, "
        f"load {where['load']}, OMP_WAIT_POLICY {where['OMP_WAIT_POLICY']}, "
        f"{where['allocator']} allocator"
    )


def limit_line(limit: Limit | None) -> str:
    """What the column `limit` is a share of."""
    if limit is None or not limit.rates:
        return "no limit is reckoned for this"
    rate = np.median(limit.rates) / 1e9
    line = f"limit: products at the model's shapes, {rate:,.0f} GFLOP/s ({limit.fastest})"
    return line + (f", {limit.bandwidth / 1e9:,.0f} GB/s" if limit.bandwidth else "")


def report(
    contest: Contest, found: list[Result], where: dict[str, Any], markdown: bool = False
) -> str:
    """The question, what it was measured on, and the table."""
    rounds = found[0].rounds if found else 0
    lines = [contest.title, f"{caption(where)}, n = {rounds}", limit_line(contest.limit), ""]
    return "\n".join([*lines, table(found, markdown)])
