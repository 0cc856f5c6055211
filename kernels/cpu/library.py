"""The C++ kernels of the CPU: finds the library that setup.py built, and gives it torch's threads.

The library has a plain C interface and knows nothing of torch, so it fits every torch version. Its
functions take addresses; `fasttx.ops.cpu` calls them.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
INTERFACE = 4  # of library.cpp; another number means arguments that do not fit SIGNATURES
NO_MEMORY = -1  # what a function returns where scratch could not be had


class View(ctypes.Structure):
    """A (T, H, D) tensor: address, and strides of rows and heads in elements."""

    _fields_ = (("data", ctypes.c_void_p), ("row", ctypes.c_int64), ("head", ctypes.c_int64))


class Tensors(ctypes.Structure):
    """What attention reads and writes; a forward pass leaves the gradients empty."""

    _fields_ = tuple((name, View) for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv"))


_P, _I, _L, _F, _U = (
    ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_uint32
)  # fmt: skip
_SPANS = [ctypes.POINTER(Tensors), _P, _P, _P, _L, _L, _L, _L, _F, _I]
_DROPOUT = [_L, _U, _I]  # seed, threshold; and the number of threads
# The first argument of all but `embed`: are the tensors of linear layers bfloat16, or float32?
SIGNATURES: dict[str, list[Any]] = {
    "attention_forward": [_I, *_SPANS, *_DROPOUT],
    "attention_backward": [_I, *_SPANS, *_DROPOUT],
    "add_norm_forward": [_I, *[_P] * 9, _L, _L, _F, *_DROPOUT],
    "add_norm_backward": [_I, *[_P] * 11, _L, _L, *_DROPOUT],
    "bias_act_forward": [_I, *[_P] * 3, _L, _L, _I, *_DROPOUT],
    "bias_act_backward": [_I, *[_P] * 6, _L, _L, _I, *_DROPOUT],
    "linear_forward": [_I, _P, _P, _L, _L, *[_P] * 4, _L, _L, _L, _I, *_DROPOUT],
    "weight_gradient": [_I, *[_P] * 4, _L, _L, _L, _I],
    "embed_forward": [*[_P] * 5, _L, _L, _L, _L, _F, *_DROPOUT],
    "embed_backward": [*[_P] * 3, _L, _L, _L, _F, *_DROPOUT],
    "encoder_offers": [_I],
    "encoder_create": [_P, _I, _P],
    "encoder_forward": [_P, _P, _P, _L, _P, _I, _I],
    "encoder_changed": [_P],
    "encoder_destroy": [_P],
}


def library_path() -> Path | None:
    """The built library, or None."""
    found = sorted(p for p in HERE.glob("_native*") if p.suffix in (".so", ".pyd", ".dylib"))
    return found[0] if found else None


@functools.cache
def library() -> ctypes.CDLL:
    """The library, with torch's threads. Raises OSError where it is not there or does not load."""
    path = library_path()
    if path is None:
        raise OSError(f"no library was built in {HERE}")
    native = ctypes.CDLL(str(path))
    interface = getattr(native, "fasttx_interface", lambda: 1)()
    if interface != INTERFACE:
        raise OSError(
            f"{path} was built for another version: interface {interface}, not {INTERFACE}"
        )
    for name, arguments in SIGNATURES.items():
        function = getattr(native, f"fasttx_{name}")
        function.argtypes, function.restype = arguments, ctypes.c_int64
    native.fasttx_keep.argtypes = [_P, _L, _I, _L, _I, _L, _L, _L, _U]
    native.fasttx_keep.restype = None
    native.fasttx_choose.argtypes = [ctypes.c_char_p]
    for name in ("instruction_sets", "chosen"):
        getattr(native, f"fasttx_{name}").restype = ctypes.c_char_p
    native.fasttx_use_threads.argtypes = [_P] * 4
    native.fasttx_use_threads.restype = None
    native.fasttx_use_threads(*openmp_entry_points())
    return native


def openmp_entry_points() -> tuple[int | None, int | None, int | None, int | None]:
    """Addresses in the OpenMP runtime that torch itself runs on: GNU's entry, or LLVM's three.

    A symbol is looked up in libtorch_cpu and what that was linked with, never by name in the whole
    process: another package (scikit-learn) may have brought a runtime of its own, and two pools
    that wait for one another's cores cost 8 ms a call. All None: one thread.
    """
    lib = Path(torch.__file__).parent / "lib"
    names = ("libtorch_cpu.so", "libtorch_cpu.dylib", "torch_cpu.dll")
    torch_cpu = next((lib / name for name in names if (lib / name).exists()), None)
    runtime = ctypes.CDLL(str(torch_cpu) if torch_cpu else None)

    def address(symbol: str) -> int | None:
        try:
            return ctypes.cast(getattr(runtime, symbol), ctypes.c_void_p).value
        except AttributeError:
            return None

    if gomp := address("GOMP_parallel"):
        return gomp, None, None, None
    llvm = [
        address(s)
        for s in ("__kmpc_fork_call", "__kmpc_push_num_threads", "__kmpc_global_thread_num")
    ]
    return (None, *llvm) if all(llvm) else (None, None, None, None)  # type: ignore[return-value]


def instruction_sets() -> list[str]:
    """The sets this machine runs, fastest first."""
    return library().fasttx_instruction_sets().decode().split()


def instruction_set() -> str:
    """The set in use."""
    return library().fasttx_chosen().decode()


def use_instruction_set(name: str) -> None:
    """Compute with this set from now on, in the whole process; for tests and benchmarks.

    Raises ValueError for one that the library or the machine does not have.
    """
    if library().fasttx_choose(name.encode()):
        raise ValueError(
            f"instruction set {name!r}; expected one of {', '.join(instruction_sets())}"
        )


def view(x: torch.Tensor) -> View:
    """x (T, H, D), last dimension contiguous."""
    return View(x.data_ptr(), x.stride(0), x.stride(1))


def addresses(*tensors: torch.Tensor | None) -> list[int | None]:
    return [None if x is None else x.data_ptr() for x in tensors]


def stored_as_bfloat16(x: torch.Tensor) -> bool:
    return x.dtype == torch.bfloat16


def dropout(threshold: int, seed: torch.Tensor | None) -> tuple[int, int]:
    """What the functions take: the seed, and the threshold."""
    return (0 if seed is None else int(seed)), threshold


def call(name: str, *arguments: Any) -> int:
    """The number of what is wrong, from 1; 0 where nothing is. Raises MemoryError."""
    code: int = getattr(library(), f"fasttx_{name}")(*arguments, torch.get_num_threads())
    if code == NO_MEMORY:
        raise MemoryError(f"{name}: no memory for the scratch space of a thread")
    return code


def keep_mask(
    rows: int, columns: int, *, head: int, sequence: int, seed: int, threshold: int, row0: int = 0
) -> torch.Tensor:
    """(rows, columns) bool: the kernels' own dropout mask at counters (column // 8, row, ...)."""
    blocks = -(-columns // 8)
    out = torch.empty(rows, blocks, dtype=torch.uint8)
    library().fasttx_keep(out.data_ptr(), row0, rows, 0, blocks, head, sequence, seed, threshold)
    bits = (out[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.flatten(1)[:, :columns].bool()
