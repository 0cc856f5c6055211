"""All that a machine at hand for ten minutes should tell: python benchmarks/device_report.py

Verifies every backend that runs on the device (errors against float64 beside those of plain torch;
on CUDA what the tests' PTX machine computes on the CPU beside what the GPU does; the equivalence
suite where pytest is there, compute-sanitizer where that is) and times attention and training steps
beside the peers, each verified before it is timed. At most 60 lines, under 8 minutes. Needs torch
and numpy; no network, no datasets. pytest-xdist, if there, compiles the suite's kernels in
parallel. What fails is reported and does not keep the rest from running.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import attention_level
import model_level
import operation_level
import side_by_side
import torch
from contest import Contest, Contestant, Unavailable
from figures import Result, environment, limit_line, table
from workload import Setting

from fasttx import device as devices
from fasttx.ops.registry import BACKENDS, Backend
from fasttx.testing import AttentionCase, Case, dropout_of, measure, quick_cases

# With it each tensor is an allocation of its own, and whoever reads past its end is seen.
UNCACHED = "PYTORCH_NO_CUDA_MEMORY_CACHING=1"
ROOT = Path(__file__).resolve().parents[1]
LINES = 60
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Every kind of attention kernel there is: single-pass and online, causal, padded and large heads.
# The rows that belong to no sequence hold NaN.
ATTENTION = tuple(
    AttentionCase(name, lens, rows=sum(lens) + 7, dead=math.nan, head_dim=head_dim, causal=causal)
    for name, lens, head_dim, causal in (
        ("odd", (17, 1, 0, 31, 2, 7), 20, True),
        ("long", (255, 256, 300), 32, False),
        ("long", (300, 33), 32, True),
        ("heads of 64", (127, 128, 65), 64, False),
        ("heads of 128", (65, 17), 128, False),
    )
)


class Report:
    """Lines, at most LINES of them, and a clock that says for what there is time left."""

    def __init__(self, seconds: float) -> None:
        self.lines: list[str] = []
        self.figures: list[dict[str, Any]] = []
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()

    def say(self, line: str) -> None:
        if len(self.lines) < LINES:
            self.lines.append(line)
            print(line, flush=True)

    def part(self, name: str, seconds: float, work: Callable[[], None]) -> None:
        """One part of the report, if there is time for it; its failure is a line."""
        if self.left() < seconds:
            self.say(f"{name}: left out, {max(0, self.left()):.0f} s are not enough for it")
            return
        try:
            work()
        except Exception as error:
            traceback.print_exc()
            self.say(f"{name}: FAILED: {type(error).__name__}: {' '.join(str(error).split())}")


# ------------------------------------------------------------------------------------- correctness


def suite_command(device: torch.device) -> list[str]:
    """The tests that hold every backend to the specification, those on this device."""
    workers = min(8, os.cpu_count() or 1)
    return [
        sys.executable, "-m", "pytest", "-q", "--maxfail=5", "--tb=line", "-p", "no:cacheprovider",
        *(["-n", str(workers)] if importlib.util.find_spec("xdist") else []),
        *(f"tests/ops/test_{name}.py" for name in ("attention", *operation_level.TIMED, "triton")),
        "-k", device.type,
    ]  # fmt: skip


def equivalence_suite(report: Report, device: torch.device) -> None:
    if not importlib.util.find_spec("pytest"):
        report.say("equivalence suite: left out, pytest is not installed (pip install pytest)")
        return
    try:
        done = subprocess.run(
            suite_command(device), cwd=ROOT, capture_output=True, text=True,
            timeout=min(240, report.left() / 1.5),
        )  # fmt: skip
    except subprocess.TimeoutExpired as slow:
        report.say(f"equivalence suite: not done after {slow.timeout:.0f} s; without the limit: "
                   f"python {shlex.join(suite_command(device)[1:])}")  # fmt: skip
        return
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-120:]]
    report.say(f"equivalence suite on {device.type}: {lines[-1].strip('= ')}")
    if done.returncode:
        found = [line for line in lines if line.startswith(("FAILED", "ERROR", "E "))]
        report.say("  " + " | ".join(found[:3]))


def machine(report: Report, device: torch.device) -> None:
    """The PTX machine of the tests beside this GPU: the same kernels, the same inputs."""
    if device.type != "cuda":
        report.say(f"PTX machine: left out, it is compared with cuda and this is {device.type}")
        return
    done = subprocess.run(
        [sys.executable, "-m", "tests.ptx.hardware"], cwd=ROOT, capture_output=True, text=True,
        timeout=max(10, min(150, report.left())),
    )  # fmt: skip
    said = (done.stdout.strip() or done.stderr.strip()).splitlines() or [
        f"status {done.returncode}"
    ]
    report.say(f"PTX machine beside the GPU: {said[-1]}")


def sanitizer_command(tool: str, name: str) -> list[str]:
    return [tool, "--error-exitcode", "9", sys.executable, __file__, "--once", name]


def sanitizer(report: Report, device: torch.device) -> None:
    """compute-sanitizer (memcheck) over one pass of each backend that is ours."""
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if device.type != "cuda":
        report.say(f"compute-sanitizer: left out, it is for cuda and this is {device.type}")
        return
    if not tool:
        by_hand = shlex.join(["python", *sanitizer_command("", "triton")[4:]])
        report.say("compute-sanitizer: left out, it is not here; where the CUDA toolkit is: "
                   f"{UNCACHED} compute-sanitizer {by_hand}")  # fmt: skip
        return
    for backend in BACKENDS.values():
        if "cuda" in backend.devices and not backend.unavailable_reasons(device, torch.float32, 32):
            variable, value = UNCACHED.split("=")
            done = subprocess.run(
                sanitizer_command(tool, backend.name), env=os.environ | {variable: value},
                capture_output=True, text=True, timeout=max(10, min(120, report.left())),
            )  # fmt: skip
            summary = re.findall(r"ERROR SUMMARY: .*", done.stdout + done.stderr)
            report.say(f"compute-sanitizer, {backend.name}: {(summary or [done.stderr[-90:]])[0]}")


def once(name: str) -> None:
    """One small pass of all operations of a backend, in each dtype, for the sanitizer."""
    device, backend = devices.pick(), BACKENDS[name]
    dropout = dropout_of(0.1, device)
    online = AttentionCase("online", (300, 5), head_dim=32, causal=True)
    for dtype in backend.dtypes:
        for case in (online, *quick_cases(head_dim=32)):
            case.run(backend.operations, device, dtype, dropout)
    devices.synchronize(device)


def errors(report: Report, backend: Backend, cases: Iterable[Case], device: torch.device) -> None:
    """How many times plain torch's own error in that dtype, against float64, output / gradient.

    The largest over the cases, and which of them is beyond what `fasttx.testing` allows. With
    dropout where the masks are shared.
    """
    p = 0.1 if backend.dropout == "shared" else 0.0
    dropout, words, wrong = dropout_of(p, device), [], []
    for dtype in DTYPES:
        short = str(dtype).removeprefix("torch.")
        worst = {True: 0.0, False: 0.0}  # of gradients, of outputs
        for case in cases:
            head_dim = getattr(case, "head_dim", 32)
            if reasons := backend.unavailable_reasons(device, dtype, head_dim):
                wrong.append(f"{short}: {'; '.join(reasons)}")
                break
            judge = measure(case, dtype, p)
            found = case.run(backend.operations, device, dtype, dropout)
            for failure in judge.compare(f"{case}:", found).failures:
                wrong.append(f"TOO FAR: {short} {failure}")
            for name, x in found.items():
                if judge.own[name]:
                    times, gradient = judge.error(name, x) / judge.own[name], name[0] == "d"
                    worst[gradient] = max(worst[gradient], times)
        else:
            words.append(f"{short} {worst[False]:.1f}x / {worst[True]:.1f}x")
    report.say(f"errors of {backend.name}, p = {p:g}: " + ", ".join(words + wrong[:3]))


# -------------------------------------------------------------------------------------------- time


def race(report: Report, contest: Contest, lines: int, seconds: float) -> None:
    """A contest's table: fasttx's backends and the fastest peers, `lines` in all."""
    entered: dict[str, Contestant] = {}
    for name in contest.entrants:
        try:
            entered[name] = contest.enter(name)
        except Unavailable:
            continue
        except Exception as error:  # one that fails must not take the others' time
            report.say(f"{name}: FAILED: {' '.join(str(error).split())[:110]}")
    found = side_by_side.take_turns(contest, entered, seconds=seconds)
    report.figures.append({"title": contest.title, **contest.facts,
                           "rows": [result.record() for result in found]})  # fmt: skip
    report.say(f"{contest.title} (n = {found[0].rounds}; {limit_line(contest.limit)})")
    for line in table(fastest(found, lines)).splitlines():
        report.say("  " + line)
    if verdict := lead(found):
        report.say("  " + verdict)


def lead(found: list[Result]) -> str:
    """How fasttx's fastest stands beside the fastest peer that computes the same function, by the
    kernels' own times where they were measured; "" where one of the two is missing."""

    def time(result: Result) -> float:
        return result.ms if math.isnan(result.kernel_ms) else result.kernel_ms

    ours = [result for result in found if result.contestant.startswith("fasttx-")]
    peers = [result for result in found if result not in ours and not result.note]
    if not ours or not peers:
        return ""
    mine, theirs = min(ours, key=time), min(peers, key=time)
    return (
        f"{mine.contestant} is {time(theirs) / time(mine):.2f}x as fast as the fastest peer, "
        f"{theirs.contestant}, at {100 * mine.limit_share:.0f} % of the limit"
    )


def fastest(found: list[Result], count: int) -> list[Result]:
    """fasttx's results and the best others, `count` in all, fastest first."""
    ours = [result for result in found if result.contestant.startswith("fasttx-")]
    others = sorted(
        (result for result in found if result not in ours), key=lambda result: result.ms
    )
    return sorted([*ours, *others[: max(1, count - len(ours))]], key=lambda result: result.ms)


def measure_times(report: Report, setting: Setting) -> None:
    """The timings, those first that say most."""
    gpu, small = setting.device.type != "cpu", setting.divisor > 1
    seconds = 1 if small else 12

    def attention(p: float, lines: int, precision: str) -> None:
        contest = attention_level.on_reviews(replace(setting, precision=precision), 32, p=p)
        race(report, contest, lines, seconds)

    def step(size: int) -> None:
        precise = replace(setting, precision="bf16" if gpu else "fp32")
        race(report, model_level.training(precise, size, inputs=2), 6, seconds)

    half = "bf16" if gpu else "fp32"
    for p, lines, precision in ((0.1, 8, half), (0.0, 7, half), *([(0.1, 5, "fp32")] * gpu)):
        needed = 5 if small else 60
        report.part(f"attention, p = {p:g}", needed, partial(attention, p, lines, precision))
    for size in (32, 256):
        needed = 5 if small else 60 if gpu else 4 * size
        report.part(f"training step, batch {size}", needed, partial(step, size))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", default=os.environ.get("FASTTX_DATA"),
                        help="parquet file of reviews, or its folder (default: drawn)")  # fmt: skip
    parser.add_argument("--device", default="auto")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--small", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--json", type=Path, help="all figures, those not printed too")
    parser.add_argument("--once", metavar="BACKEND", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.once:
        once(arguments.once)
        return
    device = devices.pick(arguments.device)
    report = Report(60 * arguments.minutes - 15)
    setting = Setting.small(device) if arguments.small else Setting(device, arguments.data)
    where = environment(device)
    report.say(", ".join(f"{k} {v}" for k, v in where.items() if k not in ("device", "platform")))
    if device.type == "cuda":
        triton = importlib.util.find_spec("triton") and __import__("triton").__version__
        major, minor = torch.cuda.get_device_capability(device)
        report.say(f"cuda {torch.version.cuda}, triton {triton}, sm_{major}{minor}")
    lengths = tuple(setting.texts(16)[0].lengths.tolist())
    cases = [AttentionCase("reviews", lengths, heads=8, head_dim=32), *quick_cases(head_dim=32)]
    cases += ATTENTION[: 1 if arguments.small else None]
    for backend in BACKENDS.values():
        if reasons := backend.unavailable_reasons(device, torch.float32, 32):
            report.say(f"{backend.name} does not run: {'; '.join(reasons)}")
        else:
            work = partial(errors, report, backend, cases, device)
            report.part(f"errors of {backend.name}", 10, work)
    report.part("PTX machine", 60, lambda: machine(report, device))
    measure_times(report, setting)
    report.part("equivalence suite", 30, lambda: equivalence_suite(report, device))
    report.part("compute-sanitizer", 20, lambda: sanitizer(report, device))
    if arguments.json:
        record = {"environment": where, "lines": report.lines, "contests": report.figures}
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
