"""Backend `cpu`: the C++ of `kernels/cpu`, for x86-64 and arm64.

The kernels compute in float32. What linear layers take and give (qkv, out, y, n, u), and its
gradient, they read and write as float32 or bfloat16; the residual stream, vectors and tables are
float32. So nothing is copied under autocast to bfloat16.
"""

from __future__ import annotations

import functools
from typing import Any

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

    def choices(self) -> dict[str, str]:
        from fasttx.ops import products

        return products.choices()

    def choose(self, choices: dict[str, str]) -> None:
        from fasttx.ops.products import DTYPES, OWN

        own = (dtype for name, dtype in DTYPES.items() if choices.get(name) == OWN)
        self.operations.own_products = frozenset(own)

    def description(self) -> dict[str, Any]:
        from fasttx.kernels.cpu import library
        from fasttx.ops import products

        used = library.instruction_set()
        why = f"of {', '.join(library.instruction_sets())}"
        kernels = {"instruction set": {"path": used, "reason": why}}
        return kernels | products.described(self.operations.own_products)

    @functools.cached_property
    def operations(self) -> FusedOperations:
        from fasttx.kernels.cpu import add_norm, attention, bias_act, embed, feed_forward, linear

        stored, stream = (torch.float32, torch.bfloat16), (torch.float32,)
        launchers = Launchers(
            attention, embed, add_norm, bias_act, stored, stream, ("CPU",), True, linear,
            feed_forward,
        )  # fmt: skip
        operations = FusedOperations("cpu", launchers)
        vars(self)["operations"] = operations  # for `choose`
        self.choose(self.choices())
        return operations


adapter: Adapter = Cpu()
