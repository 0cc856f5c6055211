"""Backend `cpu`: the C++ of `kernels/cpu`, for x86-64 and arm64.

The kernels compute in float32. What linear layers take and give (qkv, out, y, n, u), and its
gradient, they read and write as float32 or bfloat16; the residual stream, vectors and tables are
float32. So nothing is copied under autocast to bfloat16.
"""

from __future__ import annotations

import functools

import torch

from fasttx.ops.contract import Adapter
from fasttx.ops.fused import FusedOperations, Launchers

MAX_HEAD_DIM = 128


class Cpu(Adapter):
    def unavailable_reasons(
        self, device: torch.device, dtype: torch.dtype, head_dim: int
    ) -> list[str]:
        from fasttx.kernels.cpu import library

        reasons = []
        if head_dim > MAX_HEAD_DIM:
            reasons.append(
                f"head_dim {head_dim}: the kernels go up to {MAX_HEAD_DIM}; use more heads"
            )
        if library.library_path() is None:
            reasons.append(
                "its C++ library was not built: install a C++ compiler (Debian: apt install g++; "
                "macOS: xcode-select --install), then pip install --force-reinstall --no-deps "
                "fasttx, or in a checkout pip install -e ."
            )
            return reasons
        try:
            library.library()
        except OSError as error:
            reasons.append(f"its C++ library does not load ({error}): install fasttx again")
        return reasons

    @functools.cached_property
    def operations(self) -> FusedOperations:
        from fasttx.kernels.cpu import add_norm, attention, bias_act, embed, linear

        stored, stream = (torch.float32, torch.bfloat16), (torch.float32,)
        launchers = Launchers(
            attention, embed, add_norm, bias_act, stored, stream, ("CPU",), True, linear
        )
        return FusedOperations("cpu", launchers)


adapter: Adapter = Cpu()
