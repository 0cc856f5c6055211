"""The device of a run: choosing it, waiting for it, describing it."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import subprocess
import sys
from typing import Any

import numpy as np
import torch

from fasttx.errors import DeviceError
from fasttx.version import __version__


def pick(name: str = "auto") -> torch.device:
    """The torch device of this name; `auto` is CUDA, else MPS, else the CPU. Raises DeviceError."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next((kind for kind, there in has.items() if there), "cpu"))
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError, TypeError) as error:
        raise DeviceError(f"device {name!r}; expected auto, cpu, cuda, cuda:N or mps") from error
    if not has.get(device.type, device.type == "cpu"):
        raise DeviceError(
            f"device {name!r} is not available to torch {torch.__version__} on this machine; "
            "use --device auto, or install a torch build that supports it"
        )
    there = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.index is not None and device.index >= there:
        raise DeviceError(
            f"device {name!r} does not exist: there {'is' if there == 1 else 'are'} {there} of "
            f"kind {device.type} here, counted from 0. Use --device {device.type}"
        )
    return device


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def token_multiple(device: torch.device, precision: str) -> int:
    """The number of rows of a batch is rounded up to a multiple of this.

    MPS caches one program for every shape and frees none; torch's bfloat16 products on a CPU
    (oneDNN) do the same, at 8 MB a shape. So there batches should come in few sizes.
    """
    if device.type == "mps":
        return 512
    return 128 if device.type == "cpu" and precision == "bf16" else 1


class Uploads:
    """Copies tensors and packed batches to a device without waiting for the copy.

    On MPS the GPU reads the source later, and torch before 2.13 does not keep it alive until then
    (pytorch #189690). So this object keeps the sources until `waited` is called.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.kept: list[Any] = []

    def __call__(self, x: Any) -> Any:
        if self.device.type == "mps":
            self.kept.append(x)
        return x.to(self.device, non_blocking=True)

    def waited(self) -> None:
        """Say so after the host has waited for the device."""
        self.kept.clear()


@functools.cache
def fused_steps_heed_overflow(device: torch.device) -> bool:
    """Whether torch's fused optimisers skip a step when the gradient scaler found an overflow.

    On MPS they once ignored it (pytorch #186360), so this tries it.
    """
    weight = torch.nn.Parameter(torch.ones(1, device=device))
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=True)
    optimizer.found_inf = torch.ones((), device=device)  # type: ignore[attr-defined]
    try:
        optimizer.step()
    except RuntimeError:
        return False
    return weight.item() == 1.0


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """The autocast context of a forward pass; precision as in TrainConfig."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


def set_precision(device: torch.device, precision: str) -> None:
    """Let torch compute float32 products in TF32, or exactly. Raises DeviceError for tf32 elsewhere
    than on CUDA."""
    if precision == "tf32" and device.type != "cuda":
        raise DeviceError(f"precision tf32 needs a CUDA device, this one is {device}; use fp32")
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory: on CUDA what torch allocated on the device, elsewhere the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # Linux counts this program alone here; getrusage starts at the size of the parent process.
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as f:
        for line in f:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    try:
        import resource
    except ImportError:  # Windows has no such counter
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def chip() -> str:
    """The name of the processor, which on Apple silicon is the name of the GPU too."""
    if sys.platform == "darwin":
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            asked = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(
                asked, capture_output=True, text=True, check=True, timeout=10
            ).stdout.strip()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            names = [line.split(":", 1)[1].strip() for line in f if line.startswith("model name")]
        return names[0] if names else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def hardware(device: torch.device) -> dict[str, Any]:
    """The hardware, as results.json records it."""
    found: dict[str, Any] = {
        "device": str(device),
        "cpu": chip(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def versions() -> dict[str, str]:
    return {
        "fasttx": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
