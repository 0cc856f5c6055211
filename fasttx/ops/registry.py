"""The backends: one table, and how a name becomes the operations of a model."""

from __future__ import annotations

import functools
import importlib
import logging
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from fasttx.errors import BackendUnavailableError, ConfigError
from fasttx.ops.contract import Adapter, Operations

log = logging.getLogger("fasttx")


@dataclass(frozen=True)
class Backend:
    """One way to compute the operations.

    module: holds the `adapter`, and is imported when first asked for. summary: one line on what it
    is. devices: types (empty: any). dropout: whose masks it draws, "shared" (equal on every such
    backend) or "torch". describes: it has an `Adapter.description`.
    """

    name: str
    module: str
    summary: str
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    dropout: str
    describes: bool = False

    def adapter(self) -> Adapter:
        adapter: Adapter = importlib.import_module(self.module).adapter
        return adapter

    @property
    def operations(self) -> Operations:
        return self.adapter().operations

    def unavailable_reasons(
        self, device: torch.device | str, dtype: torch.dtype, head_dim: int
    ) -> list[str]:
        """Why it cannot run there; each reason says what to do. Empty: it can."""
        device = torch.device(device)
        reasons = []
        if self.devices and device.type not in self.devices:
            reasons.append(f"device {device.type}: needs {' or '.join(self.devices)}")
        if dtype not in self.dtypes:
            reasons.append(f"dtype {_short(dtype)}: takes {', '.join(map(_short, self.dtypes))}")
        return reasons or self.adapter().unavailable_reasons(device, dtype, head_dim)


_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Fastest first: `auto` takes the first that is available.
_HALVES = (torch.float32, torch.bfloat16, torch.float16)
_TABLE = (
    Backend(
        "cpu",
        "fasttx.ops.cpu",
        "fused C++ kernels for x86-64 and arm64, dropout included",
        ("cpu",),
        _HALVES,
        "shared",
        describes=True,
    ),
    Backend(
        "triton",
        "fasttx.ops.triton",
        "fused kernels for variable lengths, written in Triton",
        ("cuda",),
        _HALVES,
        "shared",
    ),
    Backend(
        "mps",
        "fasttx.ops.mps.adapter",
        "fused Metal kernels where their self-check passes, else plain tensor algebra",
        ("mps",),
        _HALVES,
        "shared",
        describes=True,
    ),
    Backend(
        "sdpa",
        "fasttx.ops.sdpa",
        "torch.nn.functional.scaled_dot_product_attention, without padded work on the CPU",
        (),
        _FLOATS,
        "torch",
    ),
    Backend(
        "reference",
        "fasttx.ops.reference",
        "plain tensor algebra: the specification",
        (),
        _FLOATS,
        "shared",
    ),
)
BACKENDS: dict[str, Backend] = {backend.name: backend for backend in _TABLE}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_name(name: Any) -> None:
    """Raises ConfigError, listing the known names, for one that is neither a backend nor `auto`."""
    if not isinstance(name, str) or (name != "auto" and name not in BACKENDS):
        raise ConfigError(
            f"unknown attention backend {name!r}; expected auto, {', '.join(BACKENDS)}"
        )


def resolve_name(name: str, device: torch.device | str, dtype: torch.dtype, head_dim: int) -> str:
    """The backend that `name` stands for there. An explicit name never falls back.

    Raises ConfigError for an unknown name, BackendUnavailableError for one that cannot run.
    """
    check_name(name)
    device = torch.device(device)
    if name == "auto":
        return _auto(device.type, dtype, head_dim)
    reasons = BACKENDS[name].unavailable_reasons(device, dtype, head_dim)
    if reasons:
        raise BackendUnavailableError(
            f"attention backend {name!r} cannot run on {device} with {_short(dtype)} and head_dim "
            f"{head_dim}:\n" + "\n".join(f"  - {r}" for r in reasons)
            + "\n`fasttx backends` shows what can; attn_backend='auto' chooses."
        )  # fmt: skip
    return name


@functools.cache  # once: the choice and its log line
def _auto(device_type: str, dtype: torch.dtype, head_dim: int) -> str:
    refused: list[str] = []
    for backend in BACKENDS.values():
        reasons = backend.unavailable_reasons(device_type, dtype, head_dim)
        if not reasons:
            why = f"; not {'; not '.join(refused)}" if refused else ": the fastest here"
            log.info("attention backend: auto -> %s on %s%s", backend.name, device_type, why)
            return backend.name
        refused.append(f"{backend.name} ({'; '.join(reasons)})")
    raise BackendUnavailableError(
        f"no attention backend can run on {device_type} with {_short(dtype)} and head_dim "
        f"{head_dim}:\n" + "\n".join(f"  - {reason}" for reason in refused)
    )


def resolve(name: str, device: torch.device | str, dtype: torch.dtype, head_dim: int) -> Operations:
    """The operations of the backend that `name` stands for there; raises as `resolve_name`."""
    return BACKENDS[resolve_name(name, device, dtype, head_dim)].operations


def resolve_later(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Operations:
    """As `resolve`, but what cannot run raises at its first call: the module may yet move."""
    try:
        return resolve(name, device, dtype, head_dim)
    except BackendUnavailableError as error:
        return _Refused(str(error))


class _Refused(Operations):
    """Operations that raise why they cannot run."""

    def __init__(self, message: str) -> None:
        self._message = message

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise BackendUnavailableError(self._message)

    _attend = _attend_packed = _embed = _add_norm = _bias_act = _refuse
    _linear = _feed_forward = _refuse


def choices(name: str) -> dict[str, str]:
    """What the backend would choose here where several ways give other bits; {} of none."""
    return BACKENDS[name].adapter().choices() if name in BACKENDS else {}


def choose(name: str, choices: dict[str, str]) -> None:
    """The backend computes as `choices` says from now on, in the whole process."""
    if name in BACKENDS:
        BACKENDS[name].adapter().choose(choices)


def descriptions(used: str) -> dict[str, dict[str, Any]]:
    """What each backend that describes itself chose in this process; {} where it was not `used`."""
    return {
        backend.name: backend.adapter().description() if backend.name == used else {}
        for backend in BACKENDS.values()
        if backend.describes
    }
