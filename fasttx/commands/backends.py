"""`fasttx backends`: which attention backends run here."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from fasttx import device as devices
from fasttx import terminal
from fasttx.commands import flags
from fasttx.ops.registry import BACKENDS, resolve_name
from fasttx.testing import describe


def backend_table(device: torch.device, head_dim: int = 32) -> str:
    """Name, available here, dtypes, dropout kind, and why not."""
    rows = [("backend", "here", "dtypes", "dropout", "what it is, or why not")]
    for b in BACKENDS.values():
        try:
            reasons = b.unavailable_reasons(device, torch.float32, head_dim)
        except Exception as error:  # of one broken backend: the others are still listed
            reasons = [f"it is broken: {describe(error)}"]
        dtypes = " ".join(str(d).removeprefix("torch.") for d in b.dtypes)
        kind = {"shared": "shared masks", "torch": "torch's own"}[b.dropout]
        here, why = ("no", "; ".join(reasons)) if reasons else ("yes", b.summary)
        rows.append((b.name, here, dtypes, kind, why))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]])
        for row in rows
    ]
    try:
        chosen = resolve_name("auto", device, torch.float32, head_dim)
    except Exception as error:  # the same, while `auto` asks each in turn
        chosen = f"none ({describe(error)})"
    return "\n".join([*lines, f"\nauto on {device} (float32, head_dim {head_dim}): {chosen}"])


def _backends(args: argparse.Namespace) -> None:
    terminal.say(backend_table(devices.pick(args.device)))


def add_command(commands: Any) -> None:
    parser = commands.add_parser("backends", help="which attention backends run here")
    flags.add_device(parser)
    parser.set_defaults(run_command=_backends)
