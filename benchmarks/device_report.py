"""All that a machine at hand for ten minutes should tell: python benchmarks/device_report.py

Verifies every backend that runs on the device (errors against float64 beside those of plain torch;
the equivalence suite where pytest is there, compute-sanitizer where that is) and times attention
and training steps beside the peers, each verified before it is timed. At most 60 lines, under 8
minutes. Needs torch and numpy; no network, no datasets. pytest-xdist, if there, compiles the
suite's kernels in parallel. What fails is reported and does not keep the rest from running.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
from fasttx.ops import reference
from fasttx.ops.registry import BACKENDS, Backend
from fasttx.text.packing import RaggedIds

# With it each tensor is an allocation of its own, and whoever reads past its end is seen.
UNCACHED = "PYTORCH_NO_CUDA_MEMORY_CACHING=1"
ROOT = Path(__file__).resolve().parents[1]
LINES = 60
# How many times the reference's own error, output and gradient, and how many roundings of the
# largest value beside: as tests/equivalence.py has it.
ALLOWED = {torch.float32: (4, 4), torch.float16: (2, 3), torch.bfloat16: (2, 3)}
ROUNDINGS = {torch.float32: 8, torch.float16: 1, torch.bfloat16: 1}


@dataclass(frozen=True)
class Shape:
    """Lengths of sequences and a head size; None: those of the reviews at hand."""

    name: str
    lengths: tuple[int, ...] | None
    head_dim: int = 32
    causal: bool = False


# Every kind of kernel there is: single-pass and online, causal, padded heads, large heads.
SHAPES = (
    Shape("reviews", None),
    Shape("odd", (17, 1, 0, 31, 2, 7), head_dim=20, causal=True),
    Shape("long", (255, 256, 300)),
    Shape("long causal", (300, 33), causal=True),
    Shape("64", (127, 128, 65), head_dim=64),
    Shape("128", (65, 17), head_dim=128),
)


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


def suite_command(device: torch.device) -> list[str]:
    """The tests that hold every backend to the specification, those on this device."""
    workers = min(8, os.cpu_count() or 1)
    return [
        sys.executable, "-m", "pytest", "-q", "--maxfail=5", "--tb=line", "-p", "no:cacheprovider",
        *(["-n", str(workers)] if importlib.util.find_spec("xdist") else []),
        "tests/ops/test_attention.py", "tests/ops/test_rowops.py", "tests/ops/test_triton.py",
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
    """One small pass of all that a backend has, in each dtype, for the sanitizer."""
    device, adapter = devices.pick(), BACKENDS[name].adapter()
    for dtype in BACKENDS[name].dtypes:
        for shape in (Shape("whole rows", (33, 1, 0, 17)), Shape("online", (300, 5), causal=True)):
            outcome(adapter.attention, shape, device, dtype, 0.1)
        h, y, bias = (torch.randn(n, device=device, dtype=dtype, requires_grad=True)
                      for n in ((37, 72), (37, 72), (72,)))  # fmt: skip
        ids, seed = torch.arange(37, device=device) % 11, torch.tensor(7, device=device)
        rows = adapter.rowops
        total = rows.embed(ids, ids.int(), h, y.detach(), 0.1, seed).sum()
        total = total + sum(x.sum() for x in rows.add_norm(h, y, bias, bias, bias, 0.1, seed))
        (total + rows.bias_act(y, bias, 0.1, seed).sum()).backward()
    devices.synchronize(device)


def outcome(
    attention: Any, shape: Shape, device: torch.device, dtype: torch.dtype, p: float,
    rounded: torch.dtype | None = None,
) -> list[Tensor]:  # fmt: skip
    """Output and gradient of qkv for the same drawn inputs, which `rounded` rounds first. The last
    seven rows belong to no sequence, and hold NaN."""
    generator = torch.Generator().manual_seed(0)
    tokens, heads = sum(shape.lengths), FULL.config.num_heads
    qkv = torch.randn(tokens + 7, 3, heads, shape.head_dim, generator=generator)
    grad = torch.randn(tokens + 7, heads, shape.head_dim, generator=generator)
    qkv[tokens:], grad[tokens:] = math.nan, math.nan
    qkv, grad = (x.to(device, rounded or dtype).to(dtype) for x in (qkv, grad))
    qkv.requires_grad_()
    lens = torch.tensor(shape.lengths, dtype=torch.int32, device=device)
    starts = (lens.cumsum(0) - lens).int()
    out = attention(
        qkv, starts, lens, max_seqlen=max(shape.lengths), dropout_p=p,
        seed=torch.tensor(7, device=device), causal=shape.causal,
    )  # fmt: skip
    return [out.detach(), *torch.autograd.grad(out, qkv, grad)]


def errors(
    report: Report, backend: Backend, reviews: list[int], device: torch.device,
    shapes: Sequence[Shape] = SHAPES,
) -> None:  # fmt: skip
    """How many times the reference's own error in that dtype, against float64, output / gradient:
    the largest over the shapes. With dropout where the masks are shared.
    """
    p = 0.1 if backend.dropout == "shared" else 0.0
    if device.type == "mps":
        report.say(f"errors of {backend.name}: left out, mps has no float64")
        return
    words, wrong = [], []
    for dtype, most in ALLOWED.items():
        short = str(dtype).removeprefix("torch.")
        worst = [0.0, 0.0]
        for shape in shapes:
            shape = replace(shape, lengths=shape.lengths or tuple(reviews))
            if reasons := backend.unavailable_reasons(device, dtype, shape.head_dim):
                wrong.append(f"{short}: {'; '.join(reasons)}")
                break
            exact = outcome(reference.attention, shape, device, torch.float64, p, rounded=dtype)
            plain = outcome(reference.attention, shape, device, dtype, p)
            mine = outcome(backend.adapter().attention, shape, device, dtype, p)
            for i, (x, y, e) in enumerate(zip(mine, plain, exact, strict=True)):
                off, own = _largest(x, e), _largest(y, e)
                rounding = ROUNDINGS[dtype] * torch.finfo(dtype).eps * float(e.abs().max())
                if not off <= most[i] * own + rounding:  # NaN is too far too
                    what = ("output", "gradient")[i]
                    wrong.append(
                        f"TOO FAR: {short} {shape.name} {what}, {off:.1e} against {own:.1e}"
                    )
                worst[i] = max(worst[i], off / max(own, 1e-30))
        else:
            words.append(f"{short} {worst[0]:.1f}x / {worst[1]:.1f}x")
    report.say(f"errors of {backend.name}, p = {p:g}: " + ", ".join(words + wrong))


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
    if verdict := lead(found):
        report.say("  " + verdict)


def lead(found: list[Row]) -> str:
    """How fasttx's fastest stands beside the fastest peer that computes the same function, by the
    kernels' own times where they were measured; "" where one of the two is missing."""

    def time(row: Row) -> float:
        return row.ms if math.isnan(row.kernel_ms) else row.kernel_ms

    ours = [row for row in found if row.contestant.startswith("fasttx-")]
    peers = [row for row in found if row not in ours and not row.note]
    if not ours or not peers:
        return ""
    mine, theirs = min(ours, key=time), min(peers, key=time)
    return (
        f"{mine.contestant} is {time(theirs) / time(mine):.2f}x as fast as the fastest peer, "
        f"{theirs.contestant}, at {100 * mine.limit_share:.0f} % of the limit"
    )


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
    lengths, shapes = ids.lengths[:16].tolist(), SHAPES[: 2 if arguments.small else None]
    for backend in BACKENDS.values():
        if not backend.unavailable_reasons(device, torch.float32, 32):
            report.part(f"errors of {backend.name}", 10,
                        lambda b=backend: errors(report, b, lengths, device, shapes))  # fmt: skip
    measure(report, ids, what, device, scale)
    report.part("equivalence suite", 30, lambda: equivalence_suite(report, device))
    report.part("compute-sanitizer", 20, lambda: sanitizer(report, device))
    if arguments.json:
        record = {"environment": where, "lines": report.lines, "contests": report.figures}
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
