"""A Triton driver whose device is the machine: `kernel[grid](...)` compiles for a GPU that is not
there, and the PTX runs on tensors of the CPU.

Everything before the driver is Triton's own: how it binds and specialises arguments, its caches,
its compiler. The last step, ptxas, is left out: nobody needs its binary.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from tests.ptx.machine import Kernel
from tests.ptx.settings import Ran, Settings

# compute capability -> the most shared memory of a block, in bytes
TARGETS = {80: 163 * 1024, 90: 227 * 1024}


parsed = functools.lru_cache(maxsize=256)(Kernel)


class _Utilities:
    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": TARGETS[self._capability], "multiprocessor_count": 108,
                "warpSize": 32, "max_num_regs": 65536}  # fmt: skip

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return "module", name, 0, 0, 1024


class _Launcher:
    """What Triton calls with the grid and all bound arguments."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self._metadata = metadata
        self._kinds = list(source.signature.values())
        self.text = ""

    def __call__(
        self, x: int, y: int, z: int, stream: Any, function: str, packed: Any, launch_metadata: Any,
        enter: Any, leave: Any, *arguments: Any,
    ) -> None:  # fmt: skip
        values: list[int | float] = []
        buffers = set()
        for kind, value in zip(self._kinds, arguments, strict=True):
            if kind == "constexpr":  # what is None or was specialised is no parameter
                continue
            if kind.startswith("*"):
                storage = value.untyped_storage()
                buffers.add((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
                value = value.data_ptr()
            values.append(value)
        assert not self._metadata.global_scratch_size and not self._metadata.profile_scratch_size
        text = self.text if Settings.rewrite is None else Settings.rewrite(function, self.text)
        kernel = parsed(text)
        # Two more parameters, of scratch memory that no kernel asks for.
        values += [0] * (len(kernel.program.parameters) - len(values))
        counts = kernel.launch(
            (x, y, z), values, sorted(buffers), self._metadata.shared, Settings.seed
        )
        if Settings.note is not None:
            Settings.note(Ran(function, (x, y, z), text, counts))


class _Driver(DriverBase):
    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)
        self.utils = _Utilities(capability)
        self.launcher_cls = _Launcher

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        # Triton keeps kernels by device: each target is one, and none is a GPU's.
        return 1000 + self._target.arch

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("the machine has no times")


def _without_assembler(*work: Any) -> tuple[str, str] | None:
    """Triton's hook for the stages of its compiler: called without arguments for a key of the
    cache."""
    if not work:
        return "PTX only", "PTX only"
    stages = work[1]
    if "cubin" in stages:
        stages["cubin"] = lambda text, metadata: b"PTX only"
    return None


_drivers = functools.cache(_Driver)


@contextlib.contextmanager
def active(capability: int) -> Iterator[None]:
    """Triton's launches run on the machine, as a GPU of that compute capability (80, 90)."""
    state, handles = triton.runtime.driver, triton.compiler.CompiledKernel._init_handles
    before, hook = state._active, triton.knobs.runtime.add_stages_inspection_hook
    cache = triton.knobs.cache.dir if "TRITON_CACHE_DIR" in os.environ else _cache()

    def with_text(kernel: Any) -> None:  # the launcher is given the source and not the PTX
        handles(kernel)
        kernel._run.text = kernel.asm["ptx"]

    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = cache
        state.set_active(_drivers(capability))
        triton.compiler.CompiledKernel._init_handles = with_text
        triton.knobs.runtime.add_stages_inspection_hook = _without_assembler
        try:
            yield
        finally:
            triton.knobs.runtime.add_stages_inspection_hook = hook
            triton.compiler.CompiledKernel._init_handles = handles
            state._active = before


def _cache() -> str:
    """Tests write into the folder for temporary files only."""
    return str(Path(tempfile.gettempdir()) / f"fasttx-triton-cache-{os.getuid()}")
