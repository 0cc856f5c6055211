"""From the .metal files to launched kernels, compiled once a specialisation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
GROUP = 128  # threads of a threadgroup: four simdgroups

ELEMENTS = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat"}

# Device type -> what compiles for it. The emulator of the tests enters itself here.
COMPILERS: dict[str, Callable[[str], Any]] = {}


def compiler(device_type: str) -> Callable[[str], Any]:
    """Raises RuntimeError where nothing compiles Metal."""
    if device_type in COMPILERS:
        return COMPILERS[device_type]
    if device_type != "mps":
        raise RuntimeError(f"Metal kernels need tensors on mps, not on {device_type}")
    if not hasattr(torch.mps, "compile_shader"):
        raise RuntimeError(f"torch {torch.__version__} has no torch.mps.compile_shader: needs 2.7")
    return torch.mps.compile_shader


def source(*files: str, **defined: torch.dtype | int) -> str:
    """The text to compile: its specialisation (types by name, and numbers), and the files."""
    head = [
        "#include <metal_stdlib>",
        "#include <metal_simdgroup_matrix>",
        "using namespace metal;",
    ]
    for name, value in defined.items():
        if isinstance(value, int):
            head.append(f"#define {name} {value}")
        else:
            head.append(f"typedef {ELEMENTS[value]} {name};")
    texts = ((HERE / f"{file}.metal").read_text(encoding="ascii") for file in files)
    return "\n".join([*head, *texts])


@functools.cache
def library(device_type: str, *files: str, **defined: torch.dtype | int) -> Any:
    return compiler(device_type)(source(*files, **defined))


@functools.cache
def kernel(
    device_type: str, name: str, *files: str, **defined: torch.dtype | int
) -> Callable[..., None]:
    """The function that launches a kernel; kept, since each look-up in a library makes a new one.

    Raises SyntaxError with Metal's words where the source does not compile.
    """
    return getattr(library(device_type, *files, **defined), name)


def launch(
    name: str,
    files: Sequence[str],
    tensors: Sequence[Tensor],
    threshold: int,
    seed: Tensor | None,
    size: Sequence[int],
    factor: Sequence[float],
    grid: dict[str, tuple[int, ...]],
    **defined: torch.dtype | int,
) -> None:
    """Launches `name` of `files` on a grid.

    Every kernel takes its tensors, the seed, whole numbers `size`, the dropout threshold first, and
    `factor`, of which the first is what a kept element is multiplied by.
    """
    keep_scale = 65536 / (65536 - threshold) if threshold < 65536 else 0.0
    first = tensors[0]
    kernel(first.device.type, name, *files, DROPOUT=int(threshold > 0), **defined)(
        *tensors,
        first if seed is None else seed,  # not read without dropout, but something must be bound
        [threshold, *size],
        [keep_scale, *factor],
        **grid,
    )
