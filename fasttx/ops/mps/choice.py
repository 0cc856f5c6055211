"""Which path a part of `mps` takes: the Metal kernels where they prove right and faster, else the
lean one. The first use of each (part, dtype, head_dim) decides, once a process; times are measured
once a machine. FASTTX_MPS = auto (the default) | metal (or an error) | lean.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import platform
from dataclasses import dataclass, field
from typing import Any

import torch

from fasttx import device as devices
from fasttx.errors import ConfigError, MetalError
from fasttx.files import cache_folder, write_json_atomic
from fasttx.ops.mps.check import check, timings

log = logging.getLogger("fasttx")

MODES = ("auto", "metal", "lean")


def mode() -> str:
    return os.environ.get("FASTTX_MPS", "auto")


@dataclass(frozen=True)
class Choice:
    """Which path a part takes ("metal", "lean"), why, and what was found on the way there."""

    path: str
    reason: str
    errors: dict[str, float] = field(default_factory=dict)
    milliseconds: dict[str, float] = field(default_factory=dict)


choices: dict[tuple[str, str, torch.dtype, int], Choice] = {}


def choose(part: str, device: str, dtype: torch.dtype, head_dim: int = 0) -> Choice:
    """The choice for a part ("attention", "rowops"); made at the first call, then kept.

    Raises MetalError where FASTTX_MPS=metal and the kernels fail.
    """
    key = (part, device, dtype, head_dim)
    if key not in choices:
        # The first call may stand under any mode of the caller's.
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device, enabled=False),
        ):
            choices[key] = _decide(*key)
    return choices[key]


def _decide(part: str, device: str, dtype: torch.dtype, head_dim: int) -> Choice:
    wanted = mode()
    if wanted not in MODES:
        raise ConfigError(f"FASTTX_MPS is {wanted!r}; expected {', '.join(MODES)}")
    if wanted == "lean":
        return Choice("lean", "FASTTX_MPS=lean")
    if dtype == torch.float64:
        return Choice("lean", "Metal has no float64")
    log.info("mps: checking the Metal kernels for %s in %s, once a process", part, dtype)
    found = check(part, device, dtype, head_dim)
    if found.failures:
        why = "; ".join(found.failures)
        if wanted == "metal":
            raise MetalError(
                f"FASTTX_MPS=metal, but the Metal kernels for {part} fail their check: {why}. "
                "Unset it to use plain tensor algebra; please send the output of `fasttx doctor`"
            )
        log.warning(
            "mps: %s goes by plain tensor algebra, the Metal kernels failed their check: %s "
            "(please send the output of `fasttx doctor`)", part, why,
        )  # fmt: skip
        return Choice("lean", f"the Metal kernels failed their check: {why}", found.errors)
    if wanted == "metal":
        return Choice("metal", "FASTTX_MPS=metal", found.errors)
    times = _times(part, device, dtype, head_dim)
    path = min(times, key=lambda name: times[name])
    shown = ", ".join(f"{name} {ms:.2f} ms" for name, ms in times.items())
    log.info("mps: %s in %s by %s: %s", part, dtype, path, shown)
    return Choice(path, f"the faster: {shown}", found.errors, times)


@functools.cache
def _machine() -> str:
    """What a measured time depends on: chip, macOS, torch, and our own kernels."""
    from fasttx.kernels.metal import shaders

    digest = hashlib.sha256()
    for path in sorted(shaders.HERE.glob("*.metal")):
        digest.update(path.read_bytes())
    parts = (devices.chip(), platform.mac_ver()[0], torch.__version__, digest.hexdigest()[:12])
    return " | ".join(parts)


def _kept() -> dict[str, Any]:
    try:
        kept = json.loads((cache_folder() / "mps.json").read_text(encoding="utf-8"))
    except (OSError, RuntimeError, ValueError):  # none yet, no home folder, damaged
        return {}
    return kept if isinstance(kept, dict) else {}


def _keep(times: dict[str, Any]) -> None:
    # A cache that cannot be written is done without.
    with contextlib.suppress(OSError, RuntimeError):
        path = cache_folder() / "mps.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(path, times)


def _times(part: str, device: str, dtype: torch.dtype, head_dim: int) -> dict[str, float]:
    """Milliseconds by path: those of an earlier process, else measured now and kept."""
    key = f"{_machine()} | {part} {dtype} {head_dim} on {device}"
    kept = _kept()
    found = kept.get(key)
    if isinstance(found, dict) and set(found) == {"metal", "lean"}:
        return found
    times = timings(part, device, dtype, head_dim or 32)
    _keep({**kept, key: times})
    return times
