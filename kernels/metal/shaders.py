"""From the .metal files to functions that launch kernels, compiled once a specialisation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

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


def source(*files: str, **defined: str | int) -> str:
    """The text to compile: its specialisation (types by name, then numbers), and the files."""
    head = [
        "#include <metal_stdlib>",
        "#include <metal_simdgroup_matrix>",
        "using namespace metal;",
    ]
    for name, value in defined.items():
        kind = f"typedef {value} {name};" if isinstance(value, str) else f"#define {name} {value}"
        head.append(kind)
    texts = ((HERE / f"{file}.metal").read_text(encoding="ascii") for file in files)
    return "\n".join([*head, *texts])


@functools.cache
def library(device_type: str, *files: str, **defined: str | int) -> Any:
    return compiler(device_type)(source(*files, **defined))


@functools.cache
def kernel(device_type: str, name: str, *files: str, **defined: str | int) -> Callable[..., None]:
    """The function that launches a kernel; kept, since each look-up in a library makes a new one.

    Raises SyntaxError with Metal's words where the source does not compile.
    """
    return getattr(library(device_type, *files, **defined), name)


def whole_groups(threads: int) -> int:
    """The threads to launch so that there are only whole threadgroups."""
    return -(-threads // GROUP) * GROUP
