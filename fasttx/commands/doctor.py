"""`fasttx doctor`: what this machine is, which backends run here, whether they are right, how fast.

Every backend that runs is compared with the reference on the CPU, forward and backward, and timed
at the size of a batch of IMDB. The outcome is what a bug report should hold.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch

from fasttx import device as devices
from fasttx.ops.registry import BACKENDS, Backend, resolve_name
from fasttx.testing.selfcheck import (
    TOLERANCES,
    Outcome,
    Shape,
    attention_cases,
    attention_step,
    milliseconds,
    row_cases,
)

HEAD_DIM = 32
SHAPE = Shape()
WARM_UP, RUNS = 1, 3


def _dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    return (torch.float32,) if device.type == "cpu" else (torch.float32, torch.float16)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check(backend: Backend, device: str, dtype: torch.dtype) -> Outcome:
    """Against the reference on the CPU. Where the masks are torch's own, without dropout."""
    outcome = Outcome()
    mine, reference = backend.adapter(), BACKENDS["reference"].adapter()
    p = 0.1 if backend.dropout == "shared" else 0.0
    tolerance = TOLERANCES[dtype]
    try:
        here, on_cpu = (attention_cases(d, dtype, HEAD_DIM, p) for d in (device, "cpu"))
        for (what, run), (_, judge) in zip(here, on_cpu, strict=True):
            outcome.compare(f"attention, {what}", run(mine), judge(reference), tolerance)
        here, on_cpu = (row_cases(d, dtype, HEAD_DIM, p) for d in (device, "cpu"))
        for (what, run), (_, judge) in zip(here, on_cpu, strict=True):
            outcome.compare(what, run(mine.rowops), judge(reference.rowops), tolerance)
    except Exception as error:  # a report says so; it does not end there
        text = " ".join(str(error).split())[:500]
        outcome.failures.append(f"{type(error).__name__}: {text}")
    return outcome


def _examine(backend: Backend, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    row: dict[str, Any] = {"backend": backend.name, "device": str(device), "dtype": _short(dtype)}
    row["unavailable"] = backend.unavailable_reasons(device, dtype, HEAD_DIM)
    if row["unavailable"]:
        return row
    outcome = _check(backend, str(device), dtype)
    row["failures"] = outcome.failures
    row["errors"] = outcome.errors
    row["largest_error"] = max(outcome.errors.values(), default=None)
    if not outcome.failures:  # no speed of what has not just been verified
        attention = backend.adapter().attention
        step = attention_step(attention, str(device), dtype, HEAD_DIM, SHAPE)
        row["milliseconds"] = milliseconds(step, device.type, WARM_UP, RUNS)
    return row


def _gpu(device: torch.device) -> dict[str, Any]:
    """What torch says of an accelerator; a question that it does not know is left out."""
    found: dict[str, Any] = {}
    if device.type == "mps":
        with contextlib.suppress(AttributeError, RuntimeError):
            found["recommended_max_memory"] = torch.mps.recommended_max_memory()
        found["compile_shader"] = hasattr(torch.mps, "compile_shader")
    return found


def examine(device: torch.device, dtypes: Iterable[torch.dtype] | None = None) -> dict[str, Any]:
    """Everything, as a dictionary of plain values.

    keys: versions, hardware, device, auto, timed (what `milliseconds` are of), backends (a row a
    backend and dtype: unavailable, failures, errors, largest_error, milliseconds), mps (the choices
    of that backend: path, reason, errors, milliseconds), sound.
    """
    rows = [
        _examine(backend, device, dtype)
        for backend in BACKENDS.values()
        for dtype in dtypes or _dtypes(device)
    ]
    choices: dict[str, Any] = {}
    if device.type == "mps":
        from fasttx.ops.mps import adapter as mps

        choices = mps.choices()
    return {
        "versions": devices.versions(),
        "hardware": devices.hardware(device) | _gpu(device),
        "device": str(device),
        "auto": resolve_name("auto", device, torch.float32, HEAD_DIM),
        "timed": f"attention of one layer, forward and backward, dropout 0.1: {len(SHAPE.lens)} "
        f"texts, {sum(SHAPE.lens)} tokens, {SHAPE.heads} heads of {HEAD_DIM}; median of {RUNS} "
        f"after {WARM_UP} to warm up",
        "backends": rows,
        "mps": choices,
        "sound": not any(row.get("failures") for row in rows)
        and not any("failed" in choice["reason"] for choice in choices.values()),
    }


def _state(row: dict[str, Any]) -> tuple[str, str]:
    if row["unavailable"]:
        return "", "not here: " + "; ".join(row["unavailable"])
    if row["failures"]:
        return "", "WRONG: " + "; ".join(row["failures"][:3])
    return f"{row['milliseconds']:.2f}", f"right: largest error {row['largest_error']:.1e}"


def text(found: dict[str, Any]) -> str:
    """`examine`'s outcome for people, to be pasted as it is."""
    lines = [", ".join(f"{name} {version}" for name, version in found["versions"].items())]
    lines += [f"{name}: {value}" for name, value in found["hardware"].items()]
    lines += ["", f"milliseconds: {found['timed']}", ""]
    rows = [("backend", "dtype", "ms", "compared with the reference")]
    rows += [(row["backend"], row["dtype"], *_state(row)) for row in found["backends"]]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for name, dtype, ms, state in rows:
        cells = (name.ljust(widths[0]), dtype.ljust(widths[1]), ms.rjust(widths[2]), state)
        lines.append("  ".join(cells).rstrip())
    lines += ["", f"auto on {found['device']}: {found['auto']}"]
    lines += [f"mps: {part}: {c['path']} ({c['reason']})" for part, c in found["mps"].items()]
    lines.append("" if found["sound"] else "\nSomething is wrong here: please report this output.")
    return "\n".join(lines).rstrip()
