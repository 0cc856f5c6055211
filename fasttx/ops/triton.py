"""Backend `triton`: the kernels of `kernels/triton`, for NVIDIA GPUs (and AMD's, as Triton can).

The kernels compute in float32, and read and write float32, bfloat16 and float16, mixed as autocast
mixes them. Products of float32 are exact to float32 unless torch.set_float32_matmul_precision
allows TF32.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util

import torch

from fasttx.ops.contract import Adapter
from fasttx.ops.fused import FusedOperations, Launchers

OLDEST = (3, 4)  # of Triton: what torch 2.8 brings
MAX_HEAD_DIM = 128


class Triton(Adapter):
    def unavailable_reasons(
        self, device: torch.device, dtype: torch.dtype, head_dim: int
    ) -> list[str]:
        reasons = _of_triton()
        if device.type == "cuda" and not reasons:
            reasons = _of_device(device)
        if not 0 < head_dim <= MAX_HEAD_DIM:
            why = f"head_dim {head_dim}: takes 1 to {MAX_HEAD_DIM}; use more heads, or backend sdpa"
            reasons = [*reasons, why]
        return reasons

    @functools.cached_property
    def operations(self) -> FusedOperations:
        from fasttx.kernels.triton import add_norm, attention, bias_act, embed
        from fasttx.kernels.triton.launch import INTERPRETED

        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        keys = ("CUDA", "CPU") if INTERPRETED else ("CUDA",)
        return FusedOperations(
            "triton", Launchers(attention, embed, add_norm, bias_act, dtypes, dtypes, keys)
        )


@functools.cache
def _of_triton() -> list[str]:
    if importlib.util.find_spec("triton") is None:
        why = "Triton is not installed: on Linux torch's CUDA builds bring it; else "
        return [why + "pip install 'fasttx[triton]'"]
    version = importlib.metadata.version("triton")
    if tuple(int(n) for n in version.split(".")[:2]) < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        return [f"Triton {version} is too old: needs {wanted}; pip install -U torch triton"]
    return []


def _of_device(device: torch.device) -> list[str]:
    if not torch.cuda.is_available():
        why = "no CUDA device: torch sees none; on a machine with one, install a CUDA build of "
        return [why + "torch (https://pytorch.org/get-started)"]
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            has = "{} has compute capability {}.{}"
            why = has.format(torch.cuda.get_device_name(device), *capability)
            return [f"{why}: needs 8.0 (Ampere) or newer; use backend sdpa"]
    return []


adapter: Adapter = Triton()
