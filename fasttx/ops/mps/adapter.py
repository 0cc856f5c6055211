"""Backend `mps`, for Apple GPUs: Metal kernels or plain tensor algebra, as `choice` has it.

Both compute the same function, dropout mask included.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from fasttx.ops.contract import Adapter, Attend, Operations
from fasttx.ops.mps import lean
from fasttx.ops.mps.choice import MODES, choices, choose, mode


@torch.compiler.assume_constant_result
def _by_metal(part: str, device: str, dtype: torch.dtype, head_dim: int) -> bool:
    return choose(part, device, dtype, head_dim).path == "metal"


def _chosen(part: str, x: Tensor, head_dim: int = 0) -> Operations:
    if _by_metal(part, x.device.type, x.dtype, head_dim):
        from fasttx.ops.mps import metal  # torch need not have a compiler for Metal

        return metal.operations
    return lean.adapter.operations


def _chosen_attention(x: Tensor, how: Attend) -> tuple[Operations, Attend]:
    operations = _chosen("attention", x, x.shape[-1])
    if operations is lean.adapter.operations:
        # torch keeps a program for every shape on MPS: the L x L matrices come in few sizes.
        longest = -(-how.spans.max_seqlen // 64) * 64
        how = how._replace(spans=how.spans._replace(max_seqlen=longest))
    return operations, how


class ChosenOperations(Operations):
    """Each call goes the way that was chosen for its part, dtype and head_dim."""

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, how: Attend) -> Tensor:
        operations, how = _chosen_attention(q, how)
        return operations._attend(q, k, v, how)

    def _attend_packed(self, qkv: Tensor, how: Attend) -> Tensor:
        operations, how = _chosen_attention(qkv, how)
        return operations._attend_packed(qkv, how)

    def _embed(self, ids: Tensor, position_ids: Tensor, table: Tensor, *rest: Any) -> Tensor:
        return _chosen("rowops", table)._embed(ids, position_ids, table, *rest)

    def _add_norm(self, h: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        return _chosen("rowops", y)._add_norm(h, y, *rest)

    def _bias_act(self, u: Tensor, *rest: Any) -> Tensor:
        return _chosen("rowops", u)._bias_act(u, *rest)


class Mps(Adapter):
    operations = ChosenOperations()

    def unavailable_reasons(
        self, device: torch.device, dtype: torch.dtype, head_dim: int
    ) -> list[str]:
        if (wanted := mode()) not in MODES:
            return [f"FASTTX_MPS is {wanted!r}: takes {', '.join(MODES)}"]
        if device.type == "mps" and not torch.backends.mps.is_available():
            return ["no Apple GPU: torch sees none; needs macOS 14 on Apple silicon"]
        return []

    def description(self) -> dict[str, Any]:
        """Every choice of this process so far, by part, dtype and head_dim."""
        return {
            f"{part} {str(dtype).removeprefix('torch.')}" + f" head_dim {d}" * (d > 0): asdict(made)
            for (part, _, dtype, d), made in choices.items()
        }


adapter: Adapter = Mps()
