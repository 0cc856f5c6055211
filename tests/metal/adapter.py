"""The Metal kernels as an attention backend of the CPU, by emulation: for the equivalence tests."""

from __future__ import annotations

import torch
from fasttx.kernels.metal import shaders

from fasttx.ops.mps.metal import attention, attention_qkv, rowops  # noqa: F401
from tests.metal import emulator

shaders.COMPILERS["cpu"] = emulator.compile_shader


def unavailable_reasons(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[str]:
    return [emulator.MISSING] if emulator.MISSING else []
