"""`fasttx doctor`: what this machine is, which backends run here, whether they are right, how fast.

Every backend that runs is compared with the reference on the CPU, forward and backward, and timed
at the size of a batch of IMDB. The outcome is what a bug report should hold.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterable
from typing import Any

import torch

from fasttx import device as devices
from fasttx import terminal
from fasttx.commands import flags
from fasttx.ops.registry import BACKENDS, Backend, descriptions, resolve_name
from fasttx.testing import (
    Outcome,
    Shape,
    attention_step,
    check,
    describe,
    milliseconds,
    quick_cases,
)

HEAD_DIM = 32
SHAPE = Shape()
WARM_UP, RUNS = 1, 3


def _dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    return (torch.float32,) if device.type == "cpu" else (torch.float32, torch.float16)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check(backend: Backend, device: torch.device, dtype: torch.dtype) -> Outcome:
    """Against float64. Where the masks are torch's own, without dropout."""
    p = 0.1 if backend.dropout == "shared" else 0.0
    try:
        operations = backend.operations
    except Exception as error:  # a report says so; it does not end there
        return Outcome([describe(error)])
    return check(operations, quick_cases(HEAD_DIM), device, dtype, p)


def _examine(backend: Backend, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    row: dict[str, Any] = {"backend": backend.name, "device": str(device), "dtype": _short(dtype)}
    try:
        row["unavailable"] = backend.unavailable_reasons(device, dtype, HEAD_DIM)
    except Exception as error:  # it cannot even say why it cannot run
        return row | {"unavailable": [], "failures": [describe(error)], "errors": {}}
    if row["unavailable"]:
        return row
    outcome = _check(backend, device, dtype)
    row["failures"] = outcome.failures
    row["errors"] = outcome.errors
    row["largest_error"] = max(outcome.errors.values(), default=None)
    if not outcome.failures:  # no speed of what has not just been verified
        try:
            step = attention_step(backend.operations, device, dtype, HEAD_DIM, SHAPE)
            row["milliseconds"] = milliseconds(step, device, WARM_UP, RUNS)
        except Exception as error:  # at the size of a real batch it fails after all
            row["failures"] = [describe(error)]
    return row


def _auto(device: torch.device) -> tuple[str | None, dict[str, dict[str, Any]]]:
    """What `auto` is here, and what it says of itself; None where a backend is broken."""
    try:
        chosen = resolve_name("auto", device, torch.float32, HEAD_DIM)
        return chosen, descriptions(chosen)
    except Exception:  # the row of that backend has the reason
        return None, {}


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
    backend and dtype: unavailable, failures, errors, largest_error, milliseconds), sound, and
    under the name of a backend that describes itself what it chose (path, reason, errors,
    milliseconds).
    """
    rows = [
        _examine(backend, device, dtype)
        for backend in BACKENDS.values()
        for dtype in dtypes or _dtypes(device)
    ]
    chosen, described = _auto(device)
    choices = [choice for parts in described.values() for choice in parts.values()]
    return {
        "versions": devices.versions(),
        "hardware": devices.hardware(device) | _gpu(device),
        "device": str(device),
        "auto": chosen,
        "timed": f"attention of one layer, forward and backward, dropout 0.1: {len(SHAPE.lens)} "
        f"texts, {sum(SHAPE.lens)} tokens, {SHAPE.heads} heads of {HEAD_DIM}; median of {RUNS} "
        f"after {WARM_UP} to warm up",
        "backends": rows,
        **described,
        "sound": chosen is not None
        and not any(row.get("failures") for row in rows)
        and not any("failed" in choice["reason"] for choice in choices),
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
    chosen = found["auto"] or "no backend can be chosen"
    lines += ["", f"auto on {found['device']}: {chosen}"]
    for name in BACKENDS:
        parts = found.get(name, {}).items()
        lines += [f"{name}: {part}: {c['path']} ({c['reason']})" for part, c in parts]
    lines.append("" if found["sound"] else "\nSomething is wrong here: please report this output.")
    return "\n".join(lines).rstrip()


def _doctor(args: argparse.Namespace) -> int:
    found = examine(devices.pick(args.device))
    if args.json:
        terminal.say_json(found)
    else:
        terminal.say(text(found))
    return 0 if found["sound"] else 1


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor", help="check and time every backend here; what a bug report should hold"
    )
    flags.add_device(parser)
    flags.add_json(parser)
    parser.set_defaults(run_command=_doctor)
