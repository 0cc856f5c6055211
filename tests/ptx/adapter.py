"""The Triton kernels as backends of the CPU, compiled for a GPU and executed by the machine."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch

from fasttx.ops.contract import Adapter
from fasttx.ops.fused import FusedOperations, Launchers
from tests.ptx import machine

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _On:
    """A module of launchers; each of its launches runs on the machine."""

    def __init__(self, module: Any, capability: int) -> None:
        self._module, self._capability = module, capability

    def forward(self, *arguments: Any) -> None:
        self._launch(self._module.forward, *arguments)

    def backward(self, *arguments: Any) -> None:
        self._launch(self._module.backward, *arguments)

    def _launch(self, launcher: Any, *arguments: Any) -> None:
        from tests.ptx import driver

        with driver.active(self._capability):
            launcher(*arguments)


class Executed(Adapter):
    """The adapter of `sm_80` or `sm_90`."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def unavailable_reasons(
        self, device: torch.device, dtype: torch.dtype, head_dim: int
    ) -> list[str]:
        from fasttx.ops.triton import adapter

        if importlib.util.find_spec("triton") is None:
            return ["Triton is not installed"]
        reasons = adapter.unavailable_reasons(device, dtype, head_dim)
        why = machine.missing()
        return [*reasons, *([why] if why else [])]

    @functools.cached_property
    def operations(self) -> FusedOperations:
        from fasttx.kernels.triton import add_norm, attention, bias_act, embed

        modules = (_On(x, self._capability) for x in (attention, embed, add_norm, bias_act))
        launchers = Launchers(*modules, DTYPES, DTYPES, ("CPU",))
        return FusedOperations(f"sm_{self._capability}", launchers)
