"""fasttx's backends and its peers side by side: python benchmarks/side_by_side.py [--level step]

Every contestant is first verified on timed inputs. Then each does one step in turn, round after
round, on the same input, so that a busy machine slows all alike. The table has medians, and ratios
within one run; the machine's limit is measured between the turns.
Real review lengths come from $FASTTX_DATA (or --data); without it, lengths like IMDB's are drawn.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import attention_level
import latency_level
import model_level
import operation_level
import pretrained_level
import text_level
import torch
from contest import Contest, Contestant, Unavailable
from figures import Result, add_allocator, environment, report, results, take_allocator
from workload import DTYPES, SIZES, Setting

from fasttx import device as devices
from fasttx.config import ModelConfig
from fasttx.errors import FasttxError


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


def kernel_ms(contest: Contest, contestant: Contestant) -> float:
    """Of one operation: the median of triton.testing.do_bench, on CUDA's events; NaN elsewhere."""
    one_operation = contest.facts.get("level") in ("attention", *operation_level.TIMED)
    if contest.device.type != "cuda" or not one_operation:
        return math.nan
    try:
        from triton.testing import do_bench
    except ImportError:
        return math.nan
    return do_bench(lambda: contestant.step(0), return_mode="median")


def _resident_mb() -> float:
    with open("/proc/self/statm", encoding="ascii") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def available_mb(device: torch.device) -> float:
    """Memory that is free for a step, MiB; infinite where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2**20
    try:
        with open("/proc/meminfo", encoding="ascii") as f:
            sizes = dict(line.split(":") for line in f)
        return int(sizes["MemAvailable"].split()[0]) / 1024
    except (OSError, KeyError):  # not Linux
        return math.inf


def take_turns(
    contest: Contest,
    contestants: dict[str, Contestant],
    *,
    rounds: int | None = None,
    seconds: float = 100.0,
) -> list[Result]:
    """The contest's table.

    rounds: by default as many as fit into `seconds`, but at least 3, and at most 30 or the number
    of inputs if that is larger.
    """
    device, limit = contest.device, contest.limit
    memory = {}
    for name, contestant in contestants.items():
        for i in range(contest.warmup - 1):
            contestant.step(i % contest.inputs)
        last = (contest.warmup - 1) % contest.inputs
        memory[name] = peak_memory_mb(lambda c=contestant, i=last: c.step(i), device)
    if limit:
        limit.seconds(0), limit.seconds(contest.inputs - 1)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    kernels = {name: kernel_ms(contest, c) for name, c in contestants.items()}
    ideal: list[float] = []
    end = time.perf_counter() + seconds
    for r in range(rounds or max(30, contest.inputs)):
        if not rounds and r >= 3 and time.perf_counter() > end:
            break
        i = r % contest.inputs
        for name, contestant in contestants.items():
            times[name].append(timed(contestant.step, i, device))
        ideal.append(limit.seconds(i) if limit else math.nan)
    return results(contest, times, ideal, memory, kernels)


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


PRETRAINED = ("finetune", "classify")
LEVELS = (
    "step", "attention", "inference", "text", *PRETRAINED, *latency_level.NAMES,
    *operation_level.TIMED,
)  # fmt: skip


def contests(
    level: str, setting: Setting, batch_size: int, pretrained: str | None
) -> Iterable[Contest]:
    """The contests of a level, one after another."""
    if level == "step":
        yield model_level.training(setting, batch_size)
    elif level == "inference":
        yield model_level.bulk(setting, batch_size)
    elif level == "text":
        yield text_level.bulk(setting, batch_size)
    elif pretrained is not None:
        yield pretrained_level.contest(level, setting, pretrained, batch_size)
    elif level == "attention":
        for p in (0.1, 0.0):
            yield attention_level.on_reviews(setting, batch_size, p=p)
    else:
        for timed in operation_level.TIMED[level]:
            yield operation_level.operation(timed, setting, batch_size)


class UnknownContestants(Exception):
    """Names that nobody has."""


def check_names(names: list[str], known: Iterable[str]) -> None:
    if unknown := set(names) - set(known):
        known = ", ".join(known)
        raise UnknownContestants(f"--contestants {', '.join(unknown)}; expected some of {known}")


def in_turn(setting: Setting, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Time and print the contests of a level; what a file of them holds."""
    records = []
    for contest in contests(arguments.level, setting, arguments.batch_size, arguments.pretrained):
        check_names(arguments.contestants, contest.entrants)
        entered = enter_all(contest, arguments.contestants)
        if not entered:
            continue
        where = environment(setting.device)
        found = take_turns(contest, entered, rounds=arguments.rounds, seconds=arguments.seconds)
        print("\n" + report(contest, found, where, arguments.markdown), flush=True)
        records.append({"title": contest.title, **contest.facts, "environment": where,
                        "rows": [row.record() for row in found]})  # fmt: skip
    return records


def latency(setting: Setting, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The same for a latency contest, whose contestants have processes of their own."""
    level, names = arguments.level, arguments.contestants
    check_names(names, latency_level.NAMES[level]())
    where = environment(setting.device)
    found = latency_level.measure(
        setting, level, names, arguments.threads,
        rounds=arguments.rounds, seconds=arguments.seconds,
    )  # fmt: skip
    if not found:
        return []
    text = latency_level.report(setting, level, found, where, arguments.markdown)
    print(f"\n{text}", flush=True)
    return [{"title": latency_level.title(setting, level), "level": level, "environment": where,
             "rows": latency_level.records(found)}]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--level", default="step", choices=LEVELS)
    parser.add_argument("--data", default=os.environ.get("FASTTX_DATA"))
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, help="default: as many as fit into --seconds")
    parser.add_argument("--seconds", type=float, default=100.0, help="time for a contest's rounds")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="fp32", choices=tuple(DTYPES))
    for name in SIZES:
        parser.add_argument(
            "--" + name.replace("_", "-"), type=int, metavar="N",
            default=getattr(ModelConfig(), name), help="of the models (default: %(default)s)",
        )  # fmt: skip
    parser.add_argument(
        "--pretrained",
        metavar="FOLDER",
        help="of Hugging Face's, for finetune and classify: sizes too",
    )
    parser.add_argument("--contestants", nargs="*", default=[], help="default: all that run here")
    parser.add_argument(
        "--words", action="store_true", help="count white-space words: shorter, no punctuation"
    )
    add_allocator(parser)
    parser.add_argument("--markdown", action="store_true", help="a table for a README")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    take_allocator(arguments.allocator)
    if (arguments.level in PRETRAINED) != (arguments.pretrained is not None):
        parser.error(f"--pretrained FOLDER belongs to --level {' and '.join(PRETRAINED)}")
    if arguments.rounds is not None and arguments.rounds < 2:
        parser.error(f"--rounds is {arguments.rounds}; expected at least 2, to have a spread")
    torch.set_num_threads(arguments.threads)
    try:
        device = devices.pick(arguments.device)
        devices.set_precision(device, arguments.precision)
        config = ModelConfig(**{name: getattr(arguments, name) for name in SIZES})
        if arguments.pretrained is not None:
            config = pretrained_level.config_of(arguments.pretrained, config.max_len)
    except FasttxError as error:
        parser.error(str(error))
    setting = Setting(
        device, arguments.data, config, arguments.precision, words=arguments.words
    )  # fmt: skip
    race = latency if arguments.level in latency_level.NAMES else in_turn
    try:
        records = race(setting, arguments)
    except UnknownContestants as error:
        parser.error(str(error))
    except AssertionError as refused:
        sys.exit(f"side_by_side.py: {refused}")
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=2) + "\n")


if __name__ == "__main__":
    main()
