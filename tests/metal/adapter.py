"""The Metal kernels as a backend of the CPU, by emulation: for the equivalence tests."""

from __future__ import annotations

import torch
from fasttx.kernels.metal import shaders

from fasttx.ops.contract import Adapter
from fasttx.ops.mps import metal
from tests.metal import emulator

shaders.COMPILERS["cpu"] = emulator.compile_shader


class Emulated(Adapter):
    operations = metal.operations

    def unavailable_reasons(
        self, device: torch.device, dtype: torch.dtype, head_dim: int
    ) -> list[str]:
        return [emulator.MISSING] if emulator.MISSING else []


adapter: Adapter = Emulated()
