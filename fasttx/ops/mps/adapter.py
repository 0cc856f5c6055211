"""Attention and row operations on Apple GPUs: Metal kernels where they prove right and faster,
plain tensor algebra where not. Both compute the same function, dropout mask included.

The first use of each (part, dtype, head_dim) decides, once a process; the times are measured once
a machine. FASTTX_MPS = auto (the default) | metal (or an error) | lean.
T rows, B sequences, H heads, D head_dim.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import platform
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from fasttx import device as devices
from fasttx.errors import MetalError
from fasttx.files import atomic_write, cache_folder
from fasttx.ops.mps import lean
from fasttx.ops.mps.check import check, timings
from fasttx.ops.rows import RowOps, specification
from fasttx.testing.selfcheck import Shape

log = logging.getLogger("fasttx")

MODES = ("auto", "metal", "lean")
REAL_SHAPE = Shape()


def unavailable_reasons(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    if (mode := _mode()) not in MODES:
        return [f"FASTTX_MPS is {mode!r}: takes {', '.join(MODES)}"]
    if device.type == "mps" and not torch.backends.mps.is_available():
        return ["no Apple GPU: torch sees none; needs macOS 14 on Apple silicon"]
    return []


def _mode() -> str:
    return os.environ.get("FASTTX_MPS", "auto")


@dataclass(frozen=True)
class Choice:
    """Which path a part takes ("metal", "lean"), why, and what was found on the way there."""

    path: str
    reason: str
    errors: dict[str, float] = field(default_factory=dict)
    milliseconds: dict[str, float] = field(default_factory=dict)


_choices: dict[tuple[str, str, torch.dtype, int], Choice] = {}


def choices() -> dict[str, dict[str, Any]]:
    """Every choice of this process so far, by part, dtype and head_dim: what a run records."""
    return {
        f"{part} {str(dtype).removeprefix('torch.')}" + f" head_dim {d}" * (d > 0): asdict(choice)
        for (part, _, dtype, d), choice in _choices.items()
    }


def choose(part: str, device: str, dtype: torch.dtype, head_dim: int = 0) -> Choice:
    """The choice for a part ("attention", "rowops"); made at the first call, then kept.

    Raises MetalError where FASTTX_MPS=metal and the kernels fail.
    """
    key = (part, device, dtype, head_dim)
    if key not in _choices:
        # The first call may stand under any mode of the caller's.
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device, enabled=False),
        ):
            _choices[key] = _decide(*key)
    return _choices[key]


def _decide(part: str, device: str, dtype: torch.dtype, head_dim: int) -> Choice:
    mode = _mode()
    if mode not in MODES:
        raise ValueError(f"FASTTX_MPS is {mode!r}; expected {', '.join(MODES)}")
    if mode == "lean":
        return Choice("lean", "FASTTX_MPS=lean")
    if dtype == torch.float64:
        return Choice("lean", "Metal has no float64")
    log.info("mps: checking the Metal kernels for %s in %s, once a process", part, dtype)
    found = check(part, device, dtype, head_dim)
    if found.failures:
        why = "; ".join(found.failures)
        if mode == "metal":
            raise MetalError(
                f"FASTTX_MPS=metal, but the Metal kernels for {part} fail their check: {why}. "
                "Unset it to use plain tensor algebra; please send the output of `fasttx doctor`"
            )
        log.warning(
            "mps: %s goes by plain tensor algebra, the Metal kernels failed their check: %s "
            "(please send the output of `fasttx doctor`)", part, why,
        )  # fmt: skip
        return Choice("lean", f"the Metal kernels failed their check: {why}", found.errors)
    if mode == "metal":
        return Choice("metal", "FASTTX_MPS=metal", found.errors)
    times = _times(part, device, dtype, head_dim)
    path = min(times, key=lambda name: times[name])
    log.info("mps: %s in %s by %s: %s", part, dtype, path, _shown(times))
    return Choice(path, f"the faster: {_shown(times)}", found.errors, times)


def _shown(times: dict[str, float]) -> str:
    return ", ".join(f"{name} {ms:.2f} ms" for name, ms in times.items())


# ------------------------------------------------------------------------ times, kept on the disk


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
        with atomic_write(path) as f:
            f.write(json.dumps(times, indent=1).encode())


def _times(part: str, device: str, dtype: torch.dtype, head_dim: int) -> dict[str, float]:
    """Milliseconds by path: those of an earlier process, else measured now and kept."""
    key = f"{_machine()} | {part} {dtype} {head_dim} on {device}"
    kept = _kept()
    found = kept.get(key)
    if isinstance(found, dict) and set(found) == {"metal", "lean"}:
        return found
    times = timings(part, device, dtype, head_dim or 32, REAL_SHAPE)
    _keep({**kept, key: times})
    return times


# ------------------------------------------------------------------------------------ the adapter


@torch.compiler.assume_constant_result
def _metal(part: str, device: str, dtype: torch.dtype, head_dim: int = 0) -> bool:
    return choose(part, device, dtype, head_dim).path == "metal"


def _attention_of(x: Tensor) -> Any:
    if _metal("attention", x.device.type, x.dtype, x.shape[-1]):
        from fasttx.ops.mps import metal

        return metal
    return lean


def _length(adapter: Any, max_seqlen: int) -> int:
    """torch keeps a program for every shape on MPS: the lean path's matrices come in few sizes."""
    return -(-max_seqlen // 64) * 64 if adapter is lean else max_seqlen


def _rows_of(x: Tensor) -> RowOps:
    if _metal("rowops", x.device.type, x.dtype):
        from fasttx.ops.mps import metal

        return metal.rowops
    return specification


def attention_qkv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_starts: Tensor,
    seq_lens: Tensor,
    *,
    max_seqlen: int,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Attention inside each sequence. q, k, v (T, H, D), seq_starts and seq_lens (B,) -> (T, H, D).

    Rows outside every sequence come out 0, and so do their gradients, whatever they hold.
    seed: () int64 tensor, needed where dropout_p > 0.
    """
    adapter = _attention_of(q)
    return adapter.attention_qkv(
        q, k, v, seq_starts, seq_lens, max_seqlen=_length(adapter, max_seqlen),
        dropout_p=dropout_p, seed=seed, causal=causal, scale=scale,
    )  # fmt: skip


def attention(
    qkv: Tensor, seq_starts: Tensor, seq_lens: Tensor, *, max_seqlen: int, **options: Any
) -> Tensor:
    """`attention_qkv` of packed projections qkv (T, 3, H, D)."""
    adapter = _attention_of(qkv)
    length = _length(adapter, max_seqlen)
    return adapter.attention(qkv, seq_starts, seq_lens, max_seqlen=length, **options)


def _embed(
    ids: Tensor, position_ids: Tensor, table: Tensor, pe: Tensor, p: float, seed: Tensor | None
) -> Tensor:
    return _rows_of(table).embed(ids, position_ids, table, pe, p, seed)


def _add_norm(
    h: Tensor, y: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, p: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _rows_of(y).add_norm(h, y, bias, gamma, beta, p, seed)


def _bias_act(
    u: Tensor, bias: Tensor, p: float, seed: Tensor | None, activation: str = "relu"
) -> Tensor:
    return _rows_of(u).bias_act(u, bias, p, seed, activation)


rowops = RowOps(_embed, _add_norm, _bias_act)
