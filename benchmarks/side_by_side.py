"""fasttx's backends and its peers side by side: python benchmarks/side_by_side.py [--level step]

Every contestant is verified against the reference on timed inputs first. One step of each in turn,
round after round, on the same input, so that a busy machine slows all alike; medians, and ratios
within one run. What the machine can do at best is measured between their turns.
Real review lengths come from $FASTTX_DATA (or --data); without it, lengths like IMDB's are drawn.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import levels
import numpy as np
import torch
from contest import Contest, Contestant, Unavailable
from limit import Limit
from workload import FULL, review_ids

from fasttx import device as devices

SLICE_MS = 8.0  # what the scheduler gives a busy core's next thread on Linux
TUNED = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592"


@dataclass(frozen=True)
class Row:
    """One contestant's figures. ratio: how many times as fast as the first peer that ran."""

    contestant: str
    samples_per_second: float
    ratio: float
    ms: float
    quartiles_ms: tuple[float, float]
    ideal_ms: float  # what the limit allows
    limit_share: float  # ideal time over measured time
    peak_memory_mb: float
    rounds: int
    note: str
    artefact: bool  # time slices, not work: not to be quoted


def timed(step: Callable[[int], object], i: int, device: torch.device) -> float:
    """Seconds of one step, waited for."""
    devices.synchronize(device)
    start = time.perf_counter()
    step(i)
    devices.synchronize(device)
    return time.perf_counter() - start


def peak_memory_mb(step: Callable[[], object], device: torch.device) -> float:
    """How far memory rises during a step, MiB: the device's on CUDA, the process's on Linux.

    What stands before it (weights, inputs, optimiser state) does not count; NaN where nobody says.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        devices.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    if device.type != "cpu" or not _reset_peak():
        step()
        return math.nan
    before = _resident_mb()
    step()
    return devices.peak_memory_mb(device) - before


def _reset_peak() -> bool:
    """Give free memory back and let the process's largest size begin anew: proc(5), clear_refs."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w", encoding="ascii") as f:
            f.write("5")
    except (OSError, AttributeError):  # not Linux, not glibc
        return False
    return True


def _resident_mb() -> float:
    with open("/proc/self/statm", encoding="ascii") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def scheduler_artefact(seconds: list[float], load: float) -> bool:
    """Times that stand at multiples of 8 ms on a busy machine are time slices, not work.

    Two threads that spin for one another's results wait a slice for every region they share.
    """
    slices = [1e3 * s / SLICE_MS for s in seconds]
    at_multiples = sum(round(n) >= 1 and abs(n - round(n)) < 0.02 for n in slices)
    busy = load > (os.cpu_count() or 1) / 2
    return busy and len(slices) >= 3 and statistics.median(slices) < 16 and (
        2 * at_multiples > len(slices)
    )  # fmt: skip


def run(contest: Contest, contestants: dict[str, Contestant], *, rounds: int | None = None,
        seconds: float = 100.0) -> list[Row]:  # fmt: skip
    """The contest's table. rounds: default as many as fit into `seconds`, at least 3, and at most
    30, or as many as there are inputs."""
    device, limit = contest.device, contest.limit
    memory, cycle = {}, 0.0
    for name, contestant in contestants.items():
        for i in range(contest.warmup - 1):
            contestant.step(i % contest.inputs)
        last = (contest.warmup - 1) % contest.inputs
        start = time.perf_counter()
        memory[name] = peak_memory_mb(lambda c=contestant, i=last: c.step(i), device)
        cycle += time.perf_counter() - start
    if limit:
        limit.seconds(0), limit.seconds(contest.inputs - 1)
    rounds = rounds or max(3, min(max(30, contest.inputs), int(seconds / cycle)))
    times: dict[str, list[float]] = {name: [] for name in contestants}
    ideal: list[float] = []
    for r in range(rounds):
        i = r % contest.inputs
        for name, contestant in contestants.items():
            times[name].append(timed(contestant.step, i, device))
        ideal.append(limit.seconds(i) if limit else math.nan)
    return rows(contest, contestants, times, statistics.median(ideal), memory, _load())


def rows(contest: Contest, contestants: dict[str, Contestant], times: dict[str, list[float]],
         ideal: float, memory: dict[str, float], load: float) -> list[Row]:  # fmt: skip
    first = next((name for name in times if not name.startswith("fasttx-")), None)
    base = statistics.median(times[first]) if first else math.nan
    found = []
    for name, seconds in times.items():
        median = statistics.median(seconds)
        low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
        found.append(
            Row(
                name, contest.samples / median, base / median, 1e3 * median,
                (1e3 * low, 1e3 * high), 1e3 * ideal, ideal / median, memory[name], len(seconds),
                contestants[name].note, scheduler_artefact(seconds, load),
            )
        )  # fmt: skip
    return found


def _load() -> float:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan


# ----------------------------------------------------------------------------------------- tables

HEADINGS = ("contestant", "samples/s", "ratio", "ms (quartiles)", "limit", "MB", "")


def _cells(row: Row) -> tuple[str, ...]:
    def number(x: float, form: str) -> str:
        return "-" if math.isnan(x) else format(x, form)

    if row.artefact:
        note = f"{row.ms:.1f} ms is a multiple of {SLICE_MS:g} ms under load: scheduling, not work"
        return (row.contestant, "-", "-", "-", "-", number(row.peak_memory_mb, ".0f"), note)
    digits = 0 if row.ms >= 1000 else 1 if row.ms >= 100 else 2
    low, high = row.quartiles_ms
    ms = f"{row.ms:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"
    share = number(100 * row.limit_share, ".1f" if row.limit_share < 0.1 else ".0f")
    return (
        row.contestant, f"{row.samples_per_second:,.1f}", number(row.ratio, ".2f") + "x", ms,
        share + (" %" if share != "-" else ""), number(row.peak_memory_mb, ".0f"), row.note,
    )  # fmt: skip


def table(found: Iterable[Row], markdown: bool = False) -> str:
    """The figures as text, or as a table that a README takes. MB: see `peak_memory_mb`."""
    lines = [HEADINGS, *map(_cells, found)]
    if markdown:
        return "\n".join(
            [
                "| " + " | ".join(HEADINGS) + " |",
                "|" + "---|" * len(HEADINGS),
                *("| " + " | ".join(cells) + " |" for cells in lines[1:]),
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADINGS) - 1)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(line[1:-1], widths[1:], strict=True)]
            + [line[-1]]
        ).rstrip()
        for line in lines
    )


def environment(device: torch.device) -> dict[str, Any]:
    """What a figure depends on besides the code."""
    return {
        **devices.hardware(device),
        **{f"{name} version": version for name, version in devices.versions().items()},
        "load": round(_load(), 2),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "unset"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "unset"),
        "allocator": "tuned" if os.environ.get("GLIBC_TUNABLES") == TUNED else "default",
    }


def caption(where: dict[str, Any]) -> str:
    """One line: hardware, versions, and what else could explain a figure."""
    return (
        f"{where.get('gpu') or where['cpu']}, {where['threads']} threads, "
        f"torch {where['torch version']}, Python {where['python version']}, "
        f"load {where['load']}, OMP_WAIT_POLICY {where['OMP_WAIT_POLICY']}, "
        f"{where['allocator']} allocator"
    )


def limit_line(limit: Limit | None) -> str:
    """What the limit column is a share of."""
    if limit is None or not limit.rates:
        return "no limit is reckoned for this"
    line = f"limit: products at the model's shapes, {np.median(limit.rates) / 1e9:,.0f} GFLOP/s"
    return line + (f", {limit.bandwidth / 1e9:,.0f} GB/s" if limit.bandwidth else "")


def report(
    contest: Contest, found: list[Row], where: dict[str, Any], markdown: bool = False
) -> str:
    """The question, what it was measured on, and the table."""
    rounds = found[0].rounds if found else 0
    lines = [contest.title, f"{caption(where)}, n = {rounds}", limit_line(contest.limit), ""]
    return "\n".join([*lines, table(found, markdown)])


# ------------------------------------------------------------------------------------ command line


def enter_all(contest: Contest, names: list[str]) -> dict[str, Contestant]:
    """Those of `names` (empty: all) that can take part, verified; says why others cannot."""
    entered = {}
    for name in names or contest.entrants:
        try:
            entered[name] = contest.enter(name)
        except Unavailable as reasons:
            print(f"{name} does not run here: {reasons}")
    return entered


def contests(arguments: argparse.Namespace, device: torch.device) -> Iterable[Contest]:
    """The contests of a level, one after another."""
    config, size = FULL.config, arguments.batch_size

    def ids(count: int) -> tuple[Any, str]:
        return review_ids(arguments.data, count, config, arguments.words)

    if arguments.level == "attention":
        texts, what = ids(3 * size)
        lengths = texts.lengths.reshape(3, size).tolist()
        dtype = levels.DTYPES[arguments.precision]
        for p in (0.1, 0.0):
            yield levels.attention(lengths, config, device, dtype=dtype, p=p, what=what)
        return
    count = {"step": 4 * size, "inference": 4 * 4 * size, "latency": 64}[arguments.level]
    texts, what = ids(count)
    options = {"precision": arguments.precision, "what": what}
    if arguments.level == "step":
        yield levels.training(texts, size, config, device, **options)
    elif arguments.level == "inference":
        yield levels.bulk(texts, size, config, device, texts=4 * size, **options)
    else:
        yield levels.latency(texts, config, device, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--level", default="step",
                        choices=("step", "attention", "inference", "latency"))  # fmt: skip
    parser.add_argument("--data", default=os.environ.get("FASTTX_DATA"))
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, help="default: as many as fit into --seconds")
    parser.add_argument("--seconds", type=float, default=100.0, help="time for a contest's rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="fp32", choices=tuple(levels.DTYPES))
    parser.add_argument("--contestants", nargs="*", default=[], help="default: all that run here")
    parser.add_argument(
        "--words", action="store_true", help="count white-space words: shorter, no punctuation"
    )
    parser.add_argument("--allocator", choices=("default", "tuned"), default="default",
                        help="tuned: glibc keeps freed memory (starts anew)")  # fmt: skip
    parser.add_argument("--markdown", action="store_true", help="a table for a README")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    if arguments.allocator == "tuned" and os.environ.get("GLIBC_TUNABLES") != TUNED:
        os.execve(
            sys.executable, [sys.executable, *sys.argv], os.environ | {"GLIBC_TUNABLES": TUNED}
        )
    torch.set_num_threads(arguments.threads)
    device = devices.pick(arguments.device)
    records = []
    for contest in contests(arguments, device):
        entered = enter_all(contest, arguments.contestants)
        where = environment(device)
        found = run(contest, entered, rounds=arguments.rounds, seconds=arguments.seconds)
        print("\n" + report(contest, found, where, arguments.markdown), flush=True)
        records.append({"title": contest.title, **contest.facts, "environment": where,
                        "rows": [asdict(row) for row in found]})  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=2) + "\n")


if __name__ == "__main__":
    main()
