"""All that a machine at hand for ten minutes should tell: python benchmarks/device_report.py

Verifies every backend that runs on the device (the equivalence suite where pytest is there, errors
against float64, compute-sanitizer where it is there), then times attention and training steps
beside the peers. At most 60 lines, under 8 minutes. Needs torch and numpy; no network, no datasets.
What fails is reported and does not keep the rest from running.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import attention_level
import model_level
import side_by_side
import torch
from contest import Contest, Contestant, Unavailable
from figures import Row, environment, limit_line, table
from torch import Tensor
from workload import FULL, SMALL, review_ids

from fasttx import device as devices
from fasttx.attention import reference
from fasttx.attention.registry import BACKENDS, Backend
from fasttx.packing import RaggedIds

ROOT = Path(__file__).resolve().parents[1]
LINES = 60
# How many times the reference's own error, output and gradient: as tests/equivalence.py has it.
ALLOWED = {torch.float32: (4, 4), torch.float16: (2, 3), torch.bfloat16: (2, 3)}


class Report:
    """Lines, at most LINES of them, and a clock that says what there is still time for."""

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


def equivalence_suite(report: Report, device: torch.device) -> None:
    """The tests that hold every backend to the specification, on this device."""
    if not importlib.util.find_spec("pytest"):
        report.say("equivalence suite: left out, pytest is not installed")
        return
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=line", "-p", "no:cacheprovider",
               "tests/test_attention.py", "tests/test_rowops.py", "-k", device.type]  # fmt: skip
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=min(180, report.left() / 2)
        )
    except subprocess.TimeoutExpired as slow:
        report.say(f"equivalence suite: not done after {slow.timeout:.0f} s")
        return
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-120:]]
    report.say(f"equivalence suite on {device.type}: {lines[-1].strip('= ')}")
    if done.returncode:
        found = [line for line in lines if line.startswith(("FAILED", "ERROR", "E "))]
        report.say("  " + " | ".join(found[:3]))


def sanitizer(report: Report, device: torch.device) -> None:
    """compute-sanitizer over one pass of each backend that is ours."""
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if device.type != "cuda" or not tool:
        report.say("compute-sanitizer: left out, it is not here")
        return
    for backend in BACKENDS.values():
        if backend.devices and not backend.unavailable_reasons(device, torch.float32, 32):
            done = subprocess.run(
                [tool, "--error-exitcode", "9", sys.executable, __file__, "--once", backend.name],
                capture_output=True, text=True, timeout=max(10, min(90, report.left())),
            )  # fmt: skip
            summary = re.findall(r"ERROR SUMMARY: .*", done.stdout + done.stderr)
            report.say(f"compute-sanitizer, {backend.name}: {(summary or [done.stderr[-90:]])[0]}")


def once(name: str) -> None:
    """One small pass of a backend in each dtype, for the sanitizer."""
    device = devices.pick()
    for dtype in BACKENDS[name].dtypes:
        outcome(BACKENDS[name].adapter().attention, [33, 1, 0, 17], device, dtype, 0.1)
    devices.synchronize(device)


def outcome(
    attention: Any, lengths: list[int], device: torch.device, dtype: torch.dtype, p: float,
    rounded: torch.dtype | None = None,
) -> list[Tensor]:  # fmt: skip
    """Output and gradient of qkv for the same drawn inputs, which `rounded` rounds first."""
    generator = torch.Generator().manual_seed(0)
    tokens, heads = sum(lengths), FULL.config.num_heads
    qkv = torch.randn(tokens, 3, heads, 32, generator=generator)
    grad = torch.randn(tokens, heads, 32, generator=generator)
    qkv, grad = (x.to(device, rounded or dtype).to(dtype) for x in (qkv, grad))
    qkv.requires_grad_()
    lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    starts = (lens.cumsum(0) - lens).int()
    seed = torch.tensor(7, device=device)
    out = attention(qkv, starts, lens, max_seqlen=max(lengths), dropout_p=p, seed=seed)
    return [out.detach(), *torch.autograd.grad(out, qkv, grad)]


def errors(report: Report, backend: Backend, lengths: list[int], device: torch.device) -> None:
    """Largest errors of output / gradient against float64, and how many times the reference's own
    in that dtype. With dropout where the masks are shared.
    """
    p = 0.1 if backend.dropout == "shared" else 0.0
    if device.type == "mps":
        report.say(f"errors of {backend.name}: left out, mps has no float64")
        return
    words = []
    for dtype, most in ALLOWED.items():
        short = str(dtype).removeprefix("torch.")
        if reasons := backend.unavailable_reasons(device, dtype, 32):
            words.append(f"{short} -: {'; '.join(reasons)}")
            continue
        exact = outcome(reference.attention, lengths, device, torch.float64, p, rounded=dtype)
        plain = outcome(reference.attention, lengths, device, dtype, p)
        mine = outcome(backend.adapter().attention, lengths, device, dtype, p)
        off, own = ([_largest(x, e) for x, e in zip(y, exact, strict=True)]
                        for y in (mine, plain))  # fmt: skip
        ratios = [a / max(b, 1e-30) for a, b in zip(off, own, strict=True)]
        verdict = " TOO FAR" if any(r > m for r, m in zip(ratios, most, strict=True)) else ""
        words.append(
            f"{short} {off[0]:.0e} / {off[1]:.0e} ({ratios[0]:.1f}x / {ratios[1]:.1f}x){verdict}"
        )
    report.say(f"errors of {backend.name}, p = {p:g}: " + ", ".join(words))


def _largest(mine: Tensor, exact: Tensor) -> float:
    return float((mine.double() - exact).abs().max())


# -------------------------------------------------------------------------------------------- time


def race(report: Report, contest: Contest, rows: int, seconds: float) -> None:
    """A contest's table, fasttx's backends and the fastest peers, `rows` of them."""
    entered: dict[str, Contestant] = {}
    for name in contest.entrants:
        try:
            entered[name] = contest.enter(name)
        except Unavailable:
            continue
        except Exception as error:  # one that fails must not take the others' time
            report.say(f"{name}: FAILED: {' '.join(str(error).split())[:110]}")
    found = side_by_side.run(contest, entered, seconds=seconds)
    report.figures.append({"title": contest.title, **contest.facts,
                           "rows": [row.record() for row in found]})  # fmt: skip
    report.say(f"{contest.title} (n = {found[0].rounds}; {limit_line(contest.limit)})")
    for line in table(fastest(found, rows)).splitlines():
        report.say("  " + line)


def fastest(found: list[Row], rows: int) -> list[Row]:
    """fasttx's rows and the fastest others, fastest first."""
    ours = [row for row in found if row.contestant.startswith("fasttx-")]
    others = sorted((row for row in found if row not in ours), key=lambda row: row.ms)
    return sorted([*ours, *others[: max(1, rows - len(ours))]], key=lambda row: row.ms)


def attention(
    ids: RaggedIds, what: str, device: torch.device, scale: Any, dtype: torch.dtype, p: float
) -> Contest:
    size = scale.of(32)
    lengths = ids.lengths[: 3 * size].reshape(3, size).tolist()
    return attention_level.attention(lengths, scale.config, device, dtype=dtype, p=p, what=what)


def training(
    ids: RaggedIds, what: str, device: torch.device, scale: Any, size: int, precision: str
) -> Contest:
    some = ids.truncate(scale.config.max_len)
    some = some.select(range(2 * scale.of(size)))
    return model_level.training(
        some, scale.of(size), scale.config, device, precision=precision, what=what
    )


def measure(report: Report, ids: RaggedIds, what: str, device: torch.device, scale: Any) -> None:
    """The timings, those first that say most."""
    gpu = device.type != "cpu"
    half = torch.bfloat16 if gpu else torch.float32
    small = scale is SMALL
    budget = 1 if small else 12
    attentions = [(0.1, 8, half), (0.0, 7, half), *([(0.1, 5, torch.float32)] if gpu else [])]
    for p, rows, dtype in attentions:
        report.part(
            f"attention, p = {p:g}", 5 if small else 60,
            lambda p=p, rows=rows, dtype=dtype: race(
                report, attention(ids, what, device, scale, dtype, p), rows, budget
            ),
        )  # fmt: skip
    precision = "bf16" if gpu else "fp32"
    for size in (32, 256):
        report.part(
            f"training step, batch {size}", 5 if small else 60 if gpu else 4 * size,
            lambda size=size: race(
                report, training(ids, what, device, scale, size, precision), 6, budget
            ),
        )  # fmt: skip


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
    scale = SMALL if arguments.small else FULL
    where = environment(device)
    report.say(", ".join(f"{k} {v}" for k, v in where.items() if k not in ("device", "platform")))
    if device.type == "cuda":
        triton = importlib.util.find_spec("triton") and __import__("triton").__version__
        major, minor = torch.cuda.get_device_capability(device)
        report.say(f"cuda {torch.version.cuda}, triton {triton}, sm_{major}{minor}")
    for backend in BACKENDS.values():
        if reasons := backend.unavailable_reasons(device, torch.float32, 32):
            report.say(f"{backend.name} does not run: {'; '.join(reasons)}")
    needed = 512 if scale is FULL else 64
    ids, what = review_ids(arguments.data, needed, scale.config)
    lengths = ids.lengths[:16].tolist()
    for backend in BACKENDS.values():
        if not backend.unavailable_reasons(device, torch.float32, 32):
            report.part(f"errors of {backend.name}", 10,
                        lambda b=backend: errors(report, b, lengths, device))  # fmt: skip
    measure(report, ids, what, device, scale)
    report.part("equivalence suite", 30, lambda: equivalence_suite(report, device))
    report.part("compute-sanitizer", 20, lambda: sanitizer(report, device))
    if arguments.json:
        record = {"environment": where, "lines": report.lines, "contests": report.figures}
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
