"""Runs Metal kernels on tensors of the CPU: the same calls as torch.mps.compile_shader takes.

The very source that ships is translated by a few regular expressions (address spaces go, pointers
to buffers become checked ones), compiled by g++ against `metal_stdlib.h`, and run with one fiber a
GPU thread, in a chosen order. Found: reads and writes past a tensor, threads that wait at different
barriers or at none, lanes of a simdgroup that part ways, and, in another order, missing barriers.
Not covered: Apple's compiler, registers, speed, memory ordering, rounding of fast math.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
COMPILER = shutil.which("g++") or shutil.which("c++")
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-w")
MISSING = None if COMPILER else "no C++ compiler: the Metal emulator needs g++"

FORWARD, REVERSE, SHUFFLED = range(3)  # the order in which threads take turns

THREAD = "emulator::thread_index()"
ATTRIBUTES = {
    "thread_position_in_grid": "uint3(group.x * n.x + t % n.x, group.y * n.y + t / n.x % n.y, "
    "group.z * n.z + t / (n.x * n.y))",
    "thread_position_in_threadgroup": "uint3(t % n.x, t / n.x % n.y, t / (n.x * n.y))",
    "threadgroup_position_in_grid": "uint3(group.x, group.y, group.z)",
    "thread_index_in_threadgroup": "t",
    "thread_index_in_simdgroup": "t % 32",
    "simdgroup_index_in_threadgroup": "t / 32",
    "threads_per_simdgroup": "32",
}
DTYPES = {"float": torch.float32, "half": torch.float16, "bfloat": torch.bfloat16,
          "int": torch.int32, "long": torch.int64, "uchar": torch.uint8}  # fmt: skip


class EmulatorError(RuntimeError):
    """A kernel did what it must not; the message says what, where and which thread."""


@dataclass(frozen=True)
class Kernel:
    """A kernel's C++ name, and the declared type of each of its buffers by number."""

    name: str
    buffers: dict[int, str]
    parameters: tuple[str, ...]  # the C++ expression of each parameter


def translate(source: str, checked: bool = True) -> str:
    """Metal to C++. Unchecked, pointers lose their address space and know no end."""
    source = re.sub(r"#include\s*<metal_\w+>|using namespace metal;", "", source)
    source = re.sub(r"_Pragma\(\"clang[^\"\n]*\"\)|#pragma\s+(METAL|clang)[^\n]*", "", source)
    # shared arrays become static ones, pointers to them plain pointers
    source = re.sub(r"\bthreadgroup\s+(\w+)\s+(\w+)\s*\[", r"static \1 \2[", source)
    source = re.sub(r"\bthreadgroup\b(?!_)", "", source)
    if checked:
        source = re.sub(r"\bconstant\s+(\w+)\s*\*", r"const device \1*", source)
        pointer = r"\b(const\s+)?device\s+(\w+)\s*\*"
        source = re.sub(pointer, r"emulator::checked<\1\2>", source)
    return re.sub(r"\bdevice\b", "", source)


def _parameter(text: str, checked: bool) -> tuple[str, int | None, str]:
    """The expression that fills a parameter, and for a buffer its number and declared type."""
    declaration, attribute = re.fullmatch(r"(.*?)\[\[(.*?)\]\]", text.strip(), re.S).groups()
    number = re.fullmatch(r"buffer\((\d+)\)", attribute.strip())
    words = re.sub(r"\b(const|constant|device)\b|[*&]", " ", declaration).split()
    if number is None:
        scalar = words[0] == "uint" and ATTRIBUTES[attribute].startswith("uint3")
        return f"({ATTRIBUTES[attribute]})" + (".x" if scalar else ""), None, ""
    constant = "const " if "const" in declaration else ""  # `constant` too
    buffer = f"buffers[{number[1]}]"
    if "&" in declaration:
        expression = f"*({words[0]}*){buffer}.begin"
    elif checked:
        expression = f"emulator::as_checked<{constant}{words[0]}>({buffer})"
    else:
        expression = f"({words[0]}*){buffer}.begin"
    return expression, int(number[1]), words[0]


def kernels(source: str, checked: bool = True) -> list[Kernel]:
    """What a source declares as `kernel void name(...)`."""
    source = re.sub(r"//[^\n]*", "", source)
    found = []
    for name, declared in re.findall(
        r"\bkernel\s+void\s+(\w+)\s*\((.*?\]\])\s*\)\s*\{", source, re.S
    ):
        texts = [text + "]]" for text in declared.split("]]") if text.strip(" ,\n")]
        filled = [_parameter(text.lstrip(" ,\n"), checked) for text in texts]
        buffers = {number: kind for _, number, kind in filled if number is not None}
        found.append(Kernel(name, buffers, tuple(expression for expression, _, _ in filled)))
    return found


LAUNCHER = """
static void body_{name}(void* arguments, emulator::Id group, emulator::Id n, uint t) {{
  auto* buffers = (emulator::Buffer*)arguments;
  {name}({parameters});
}}
extern "C" __attribute__((visibility("default")))
const char* launch_{name}(emulator::Buffer* buffers, const uint* groups, const uint* threads,
                          int order) {{
  return emulator_run(body_{name}, buffers, {{groups[0], groups[1], groups[2]}},
                      {{threads[0], threads[1], threads[2]}}, order);
}}
"""


def _folder() -> Path:
    """Where builds are kept: of this user alone, since they are loaded."""
    folder = Path(tempfile.gettempdir()) / f"fasttx-metal-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o022:
        return Path(tempfile.mkdtemp(prefix="fasttx-metal-emulator-"))
    return folder


def _build(text: str, suffix: str, *arguments: str | Path) -> Path:
    """The compiler's output for a source, kept by the content of all that went in."""
    key = hashlib.sha256()
    for part in (text, *map(str, arguments), *FLAGS, *(p.read_text() for p in HERE.glob("*.h"))):
        key.update(part.encode())
    path = _folder() / f"{key.hexdigest()[:24]}{suffix}"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as room:
            source, built = Path(room) / "source.cpp", Path(room) / "built"
            source.write_text(text)
            done = subprocess.run(
                [COMPILER, *FLAGS, "-I", HERE, source, *arguments, "-o", built],
                capture_output=True, text=True,
            )  # fmt: skip
            if done.returncode:
                raise SyntaxError(done.stderr[:4000])
            built.replace(path)  # whole or not at all: other processes build the same
    return path


@functools.cache
def _runtime() -> Path:
    return _build((HERE / "fibers.cpp").read_text(), ".o", "-O2", "-c")


class ShaderLibrary:
    """As torch's: its kernels are attributes."""

    def __init__(self, source: str, checked: bool = True, prelude: str = "") -> None:
        if not source.isascii():
            raise SyntaxError("the source is not ASCII, which is what torch hands to Metal")
        self._kernels = {k.name: k for k in kernels(source, checked)}
        aliases = re.findall(r"typedef (\w+) (\w+);", source)
        self._types = DTYPES | {name: DTYPES[kind] for kind, name in aliases if kind in DTYPES}
        parts = ['#include "metal_stdlib.h"', prelude, "using namespace metal;"]
        parts += ['#line 1 "kernel.metal"', translate(source, checked)]
        parts += [
            LAUNCHER.format(name=k.name, parameters=", ".join(k.parameters))
            for k in self._kernels.values()
        ]
        shared = ("-shared",) if sys.platform != "darwin" else ("-dynamiclib",)
        library = _build("\n".join(parts), ".so", _runtime(), *shared)
        self._library = ctypes.CDLL(str(library))

    def __getattr__(self, name: str) -> Launch:
        try:
            return Launch(
                self._kernels[name], getattr(self._library, f"launch_{name}"), self._types
            )
        except KeyError:
            raise AttributeError(f"no kernel {name!r} in the source") from None


class Launch:
    """One kernel, called as torch's: tensors, numbers and lists in the order of the buffers."""

    order = FORWARD  # of every launch

    def __init__(self, kernel: Kernel, function: Any, types: dict[str, torch.dtype]) -> None:
        self.kernel, self.function, self.types = kernel, function, types
        self.function.restype = ctypes.c_char_p

    def __call__(self, *arguments: Any, threads: Sequence[int], group_size: Sequence[int]) -> None:
        if sorted(self.kernel.buffers) != list(range(len(arguments))):
            raise EmulatorError(
                f"{self.kernel.name} has buffers {sorted(self.kernel.buffers)}, not the "
                f"{len(arguments)} it was given"
            )
        if any(t % g for t, g in zip(threads, group_size, strict=True)) or min(threads) < 1:
            raise EmulatorError(f"threads {threads} are no whole threadgroups of {group_size}")
        if max(g for g in (1, *group_size)) > 1024:
            raise EmulatorError(f"a threadgroup of {group_size} is too large")
        groups = [t // g for t, g in zip(threads, group_size, strict=True)]
        kept = [self._memory(i, a) for i, a in enumerate(arguments)]
        buffers = (ctypes.c_void_p * (2 * len(kept)))(*(x for _, span in kept for x in span))
        sizes = [(ctypes.c_uint * 3)(*x, *[1] * (3 - len(x))) for x in (groups, group_size)]
        error = self.function(buffers, *sizes, self.order)
        if error:
            raise EmulatorError(f"{self.kernel.name}: {error.decode()}")

    def _memory(self, number: int, argument: Any) -> tuple[Any, tuple[int, int]]:
        """Something to keep alive, and the first and past-the-last byte of a buffer."""
        kind = self.kernel.buffers[number]
        if isinstance(argument, Tensor):
            wanted = self.types.get(kind)
            if wanted is not None and argument.dtype != wanted:
                raise EmulatorError(
                    f"{self.kernel.name}: buffer {number} is declared {kind}, the tensor holds "
                    f"{argument.dtype}"
                )
            begin = argument.data_ptr()
            extent = sum(
                (n - 1) * s for n, s in zip(argument.shape, argument.stride(), strict=True)
            )
            size = (extent + 1) * argument.element_size() if argument.numel() else 0
            return argument, (begin, begin + size)
        values = argument if isinstance(argument, list | tuple) else [argument]
        floats = isinstance(values[0], float)
        if kind != ("float" if floats else "long"):
            raise EmulatorError(
                f"{self.kernel.name}: buffer {number} is declared {kind}; Python's "
                f"{'floats arrive as float' if floats else 'ints arrive as long'}"
            )
        array = ((ctypes.c_float if floats else ctypes.c_int64) * len(values))(*values)
        begin = ctypes.addressof(array)
        return array, (begin, begin + ctypes.sizeof(array))


def compile_shader(source: str) -> ShaderLibrary:
    """In place of `torch.mps.compile_shader`."""
    return ShaderLibrary(source)
