"""One process or several: what a trainer needs of torch.distributed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Processes:
    """This process among those that train together (started by torchrun, else alone)."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    control: Any = None  # a gloo group for small CPU messages beside the gradients

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
            dist.all_reduce(total, group=self.control)
        return total

    def least(self, value: int) -> int:
        """The least value of any process."""
        least = torch.tensor(value)
        if self.world > 1:
            dist.all_reduce(least, dist.ReduceOp.MIN, group=self.control)
        return int(least)

    def any(self, flag: bool) -> bool:
        """True everywhere if it is true anywhere."""
        return bool(self.sum(torch.tensor(int(flag))) > 0) if self.world > 1 else flag

    def from_main(self, value: Any) -> Any:
        """The main process's value."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier(group=self.control)


def start() -> Processes:
    """Join the processes torchrun started (its environment variables tell), or be alone."""
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        return Processes()
    dist.init_process_group()  # gloo for CPU tensors, NCCL for CUDA's
    control = dist.new_group(backend="gloo")
    return Processes(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]), control)


def stop(processes: Processes) -> None:
    if processes.world > 1:
        dist.destroy_process_group()
