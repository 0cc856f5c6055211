"""The machine of `machine/*.cpp`, compiled when it is first asked for, and launches of kernels on
it.

What is a fault: an access outside the tensors of a launch, or misaligned; shared or global memory
that two threads of a program use, one of them writing, with no barrier between; stores of different
bits to one place by one instruction; cp.async or wgmma data used before it was waited for; what a
wgmma reads, written before that or not fenced for the asynchronous proxy; instructions of a whole
warp that some lanes never reach, barriers that some warps never reach; global memory that one
program writes and another touches; more instructions than a kernel can need.

Registers and shared memory that nobody wrote hold NaN. The seed of a launch changes that NaN, the
order of programs, the turns of warps (1 to 64 instructions), and which of several lanes stores
last.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.ptx.parser import Program

HERE = Path(__file__).resolve().parent / "machine"
FLAGS = (
    "-std=c++20",
    "-O2",
    "-march=native",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fPIC",
    "-w",
)
LIMIT = 50_000_000  # instructions of a warp
OLDEST_COMPILER = 12  # of g++: _Float16 in C++


class Fault(RuntimeError):
    """The kernel did what it must not; the message says what, where and which thread."""


@functools.cache
def missing() -> str | None:
    """Why the machine cannot be compiled here; None: it can."""
    compiler = shutil.which("g++")
    if compiler is None:
        return f"no g++: the PTX machine needs g++ {OLDEST_COMPILER}"
    said = subprocess.run([compiler, "-dumpversion"], capture_output=True, text=True).stdout
    if not said[:1].isdigit() or int(said.split(".")[0]) < OLDEST_COMPILER:
        return f"g++ {said.strip()}: the PTX machine needs g++ {OLDEST_COMPILER}"
    return None


@dataclass(frozen=True)
class Counts:
    """What a launch took, in counts and not in times.

    instructions: of warps. sectors: of 32 bytes, of global memory, moved by the instructions of a
    warp; sectors_needed: the fewest that the same bytes fit in. wavefronts: of shared memory, 128
    bytes at most; conflicts: those beyond one for each 32 lanes x 4 bytes, because two words lie in
    one bank.
    """

    instructions: int = 0
    sectors: int = 0
    sectors_needed: int = 0
    wavefronts: int = 0
    conflicts: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(self.values, other.values, strict=True)))

    @property
    def values(self) -> tuple[int, ...]:
        return tuple(getattr(self, name) for name in COUNTED)


COUNTED = tuple(Counts.__dataclass_fields__)


class _Instruction(ctypes.Structure):
    _names = ("opcode", "guard", "negated", "count", "size", "width", "is_signed", "extra")
    _fields_ = [*((name, ctypes.c_int32) for name in _names), ("immediate", ctypes.c_int64),
                ("r", ctypes.c_int32 * 16)]  # fmt: skip


class _Launch(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.c_void_p), ("length", ctypes.c_int64), ("pool", ctypes.c_void_p),
        ("image", ctypes.c_void_p), ("image_bytes", ctypes.c_int64), ("warps", ctypes.c_int64),
        ("shared", ctypes.c_int64), ("specials", ctypes.c_void_p),
        ("special_count", ctypes.c_int64),
        ("grid", ctypes.c_void_p), ("buffers", ctypes.c_void_p), ("buffer_count", ctypes.c_int64),
        ("seed", ctypes.c_int64), ("limit", ctypes.c_int64),
        *((name, ctypes.c_int64) for name in COUNTED),
        ("current", ctypes.c_int64), ("program", ctypes.c_int64),
    ]  # fmt: skip


def _folder() -> Path:
    """Where the compiled machine is kept: of this user alone, since it is loaded."""
    folder = Path(tempfile.gettempdir()) / f"fasttx-ptx-machine-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o022:
        return Path(tempfile.mkdtemp(prefix="fasttx-ptx-machine-"))
    return folder


def _processor() -> str:
    """-march=native compiles for one processor, and a folder for temporary files may be shared."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""
    return "".join(sorted(set(re.findall(r"^(?:model name|flags)\s*:.*", text, re.M))))


@functools.cache
def _library() -> ctypes.CDLL:
    sources = sorted(HERE.glob("*.cpp"))
    key = hashlib.sha256(" ".join([*FLAGS, _processor()]).encode())
    for path in (*sources, *sorted(HERE.glob("*.h"))):
        key.update(path.read_bytes())
    library = _folder() / f"{key.hexdigest()[:24]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=library.parent) as room:
            objects = [Path(room) / f"{path.stem}.o" for path in sources]

            def compiled(source: Path, target: Path) -> None:
                _call("g++", *FLAGS, "-c", source, "-o", target)

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(compiled, sources, objects))
            _call("g++", "-shared", *objects, "-o", Path(room) / "machine.so")
            (Path(room) / "machine.so").replace(library)  # whole: others may compile the same
    loaded = ctypes.CDLL(str(library))
    loaded.machine_opcode.restype = loaded.machine_run.restype = ctypes.c_char_p
    assert loaded.machine_instruction_bytes() == ctypes.sizeof(_Instruction)
    assert loaded.machine_launch_bytes() == ctypes.sizeof(_Launch)
    return loaded


def _call(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the PTX machine does not compile:\n{done.stderr[:4000]}")


@functools.cache
def opcodes() -> dict[str, tuple[int, str]]:
    """Name -> number, and the widths of the operands as `Opcode::signature` has them."""
    library, found = _library(), {}
    for number in range(library.machine_opcodes()):
        name, _, signature = library.machine_opcode(number).decode().partition(" ")
        found[name] = number, signature
    return found


class Kernel:
    """The entry of a PTX text, ready to be launched. Raises Unsupported for an opcode that is not
    known."""

    def __init__(self, text: str) -> None:
        self.program = program = Program(text, opcodes())
        instructions = []
        for i in program.instructions:
            registers = (ctypes.c_int32 * 16)(*i.r)
            instructions.append(
                _Instruction(i.opcode, i.guard, i.negated, i.count, i.size, i.width, i.is_signed,
                             i.extra, i.immediate, registers)
            )  # fmt: skip
        self._code = (_Instruction * len(instructions))(*instructions)
        self._pool = np.array([*program.pool, 0], np.int32)

    def launch(
        self, grid: Sequence[int], values: Sequence[int | float],
        buffers: Sequence[tuple[int, int]], shared: int, seed: int = 0,
    ) -> Counts:  # fmt: skip
        """Runs all programs.

        values: of the parameters, of a pointer its address. buffers: begin and end of the memory
        that may be touched. shared: bytes of shared memory. Raises Fault.
        """
        image = self.program.image(values, seed)
        specials = np.array([*self.program.specials, (0, 0)], np.int32)
        sizes = np.array([*grid, *(1,) * (3 - len(grid))], np.uint32)
        spans = np.array([*buffers, (0, 0)], np.uint64)
        launch = _Launch(
            ctypes.addressof(self._code), len(self._code), self._pool.ctypes.data,
            image.ctypes.data, image.size, self.program.threads // 32, shared, specials.ctypes.data,
            len(self.program.specials), sizes.ctypes.data, spans.ctypes.data, len(buffers), seed,
            LIMIT,
        )  # fmt: skip
        wrong = _library().machine_run(ctypes.byref(launch))
        if wrong:
            where = self.program.instructions[launch.current]
            text = self.program.lines[where.line - 1].strip()
            raise Fault(
                f"{self.program.name}, program {launch.program}, {where.place}: {wrong.decode()} "
                f"(PTX line {where.line}: {text})"
            )
        return Counts(*(getattr(launch, name) for name in COUNTED))
