"""One process or several: what a trainer needs of torch.distributed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fasttx.errors import ConfigError


@dataclass(frozen=True)
class Processes:
    """This process among those that train together (started by torchrun, else alone)."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def main(self) -> bool:
        return self.rank == 0

    def share(self, indices: np.ndarray) -> np.ndarray:
        """This process's part of `indices`; all parts together are the whole, in order."""
        return np.array_split(indices, self.world)[self.rank]

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        if self.world == 1:
            return model
        ids = [device.index] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, on the CPU."""
        total = tensor.detach().to("cpu", copy=True)
        if self.world > 1:
            dist.all_reduce(total)
        return total

    def least(self, value: int) -> int:
        """The least value of any process."""
        least = torch.tensor(value)
        if self.world > 1:
            dist.all_reduce(least, dist.ReduceOp.MIN)
        return int(least)

    def any(self, flag: bool) -> bool:
        """True everywhere if it is true anywhere."""
        return bool(self.sum(torch.tensor(int(flag))) > 0) if self.world > 1 else flag

    def from_main(self, value: Any) -> Any:
        """The main process's value."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        if self.world > 1:
            self.sum(torch.zeros(()))


# What torchrun sets beside WORLD_SIZE.
_COMPANIONS = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def start() -> Processes:
    """Join the processes torchrun started (its environment variables tell), or be alone.

    Raises ConfigError for variables that torchrun does not write, and where the others cannot be
    reached.
    """
    if "WORLD_SIZE" not in os.environ:
        return Processes()
    world = _count("WORLD_SIZE", 1, 2**31 - 1)
    if world == 1:
        return Processes()
    if missing := [name for name in _COMPANIONS if not os.environ.get(name)]:
        raise ConfigError(
            f"WORLD_SIZE is {world}, and {', '.join(missing)} not set; expected all that torchrun "
            f"sets. Start with torchrun --nproc-per-node {world}, or unset WORLD_SIZE"
        )
    _count("RANK", 0, world - 1)
    local_rank = _count("LOCAL_RANK", 0, world - 1)
    _count("MASTER_PORT", 0, 65535)
    try:
        # Gloo for CPU tensors, NCCL for CUDA's. Not a group more: after a restart by torchrun its
        # members look for one another where the former ones were (torch 2.13).
        dist.init_process_group()
    except (RuntimeError, ValueError) as error:  # torch's DistError and its kin among them
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ConfigError(
            f"the {world} processes that WORLD_SIZE promises do not meet at {where} (MASTER_ADDR, "
            f"MASTER_PORT): {str(error).strip().splitlines()[0]}. Start them with torchrun{_hint()}"
        ) from error
    return Processes(dist.get_rank(), dist.get_world_size(), local_rank)


def _hint() -> str:
    """Agents that restart share one store, whose keys bear each agent's own count of restarts: a
    process of one agent finds addresses of the last round there (torch 2.13)."""
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not shared or os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        return ""
    return ", on each host with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment"


def restarted() -> bool:
    """Whether torchrun has started this training again, after one of its processes died."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")


def _count(name: str, low: int, high: int) -> int:
    text = os.environ[name]
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and low <= int(text) <= high):
        raise ConfigError(
            f"the environment variable {name} is {text!r}; expected a number from {low} to {high}, "
            "as torchrun sets it. Start with torchrun, or unset WORLD_SIZE"
        )
    return int(text)


def stop(processes: Processes) -> None:
    if processes.world > 1:
        dist.destroy_process_group()
