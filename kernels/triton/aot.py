"""Compiles the kernels ahead of time for GPUs that need not be there, and reports what they use.

    python -m fasttx.kernels.triton.aot [--all] [--only REGEX] [--target sm_90 ...]

By default the default model's configurations; with --all every one that the tables can ask for.
Exits with 1 where a kernel does not compile, asks for more shared memory than its chip has, or
spills where the tables promise that it does not. Needs no GPU: Triton carries the assemblers.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import importlib
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from fasttx.kernels.triton import tiles

# name -> (backend, architecture, warp size, shared memory of one block in bytes)
TARGETS: dict[str, tuple[str, Any, int, int]] = {
    "sm_80": ("cuda", 80, 32, 163 * 1024),
    "sm_90": ("cuda", 90, 32, 227 * 1024),
    "sm_100": ("cuda", 100, 32, 227 * 1024),
    "gfx942": ("hip", "gfx942", 64, 64 * 1024),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HEADS = 2  # of the batches that are launched: with head_dim 20 no stride is a multiple of 16
THRESHOLD = 6554  # dropout of 0.1


@dataclasses.dataclass(frozen=True)
class Configuration:
    """One kernel as one launch compiles it.

    constants: its tl.constexpr arguments, and those that are None. signature: the type of each
    argument. aligned: which of them are multiples of 16, by their place.
    """

    module: str
    kernel: str
    dtype: str
    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int
    signature: tuple[tuple[str, str], ...] = ()
    aligned: tuple[int, ...] = ()

    @property
    def may_spill(self) -> bool:
        """Registers may spill to memory in fp32, and above head_dim 64; else they must not."""
        constants = dict(self.constants)
        return self.dtype == "fp32" or constants.get("BLOCK_D", 0) > 64

    def __str__(self) -> str:
        flags = sorted(name.lower() for name, value in self.constants if value is True)
        sizes = [f"{name}={value}" for name, value in self.constants if type(value) is int]
        precision = [value for _, value in self.constants if value == "tf32"]
        return " ".join([self.kernel, self.dtype, *precision, *sizes, *flags])


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes: registers of a thread, bytes of shared memory of a block, bytes
    of stack of a thread (more than 0: registers were spilled)."""

    registers: int
    shared: int
    stack: int

    def __str__(self) -> str:
        return f"{self.registers} / {self.shared} / {self.stack}"


def recorded(launch: Callable[[], None], dtype: str) -> Configuration:
    """What `launch`, which calls a launcher once, asks Triton to compile. Nothing runs."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def note(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        calls.append((kernel, arguments, options))

    with mock.patch.object(JITFunction, "run", note):
        launch()
    ((kernel, arguments, options),) = calls
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = bind(*arguments, **options)
    kinds = dict(zip(bound, specialization, strict=True))
    name = kernel.fn.__name__
    return Configuration(
        module=kernel.fn.__module__.rpartition(".")[2],
        kernel=name,
        dtype=dtype,
        constants=tuple((n, bound[n]) for n, (kind, _) in kinds.items() if kind == "constexpr"),
        num_warps=options["num_warps"],
        num_stages=options.get("num_stages", 3),
        signature=tuple((n, kind) for n, (kind, _) in kinds.items()),
        aligned=tuple(
            i for i, (kind, found) in enumerate(specialization)
            if kind != "constexpr" and "D" in (found or "")
        ),
    )  # fmt: skip


def _seed(dropout: bool) -> torch.Tensor | None:
    """Seeds of sites are elements of one tensor: not all of them lie at a multiple of 16 bytes."""
    return torch.zeros(2, dtype=torch.int64)[1] if dropout else None


def attention(
    way: str, dtype: str, head_dim: int, max_seqlen: int, causal: bool, dropout: bool,
    precision: str = "ieee",
) -> Configuration:  # fmt: skip
    """What the launcher `way` (forward, backward) of attention.py asks for."""
    launchers: Any = importlib.import_module("fasttx.kernels.triton.attention")
    qkv = torch.empty(1, 3, HEADS, head_dim, dtype=DTYPES[dtype])
    out, lse = torch.empty_like(qkv[:, 0]), torch.empty(HEADS, 1)
    one = torch.zeros(1, dtype=torch.int32)
    options = (one, one, max_seqlen, THRESHOLD * dropout, _seed(dropout), causal, 1.0)

    def launch() -> None:
        if way == "forward":
            launchers.forward(*qkv.unbind(1), out, lse, *options)
        else:
            dqkv = torch.empty_like(qkv).unbind(1)
            launchers.backward(torch.empty_like(out), *qkv.unbind(1), out, lse, *dqkv, *options)

    with mock.patch.object(launchers, "dot_precision", return_value=precision):
        return recorded(launch, dtype)


def row_operation(kernel: str, dtype: str, columns: int, dropout: bool) -> Configuration:
    """What the launchers of add_norm.py, bias_act.py and embed.py ask for."""
    name, _, way = kernel.rpartition("_")
    launchers = importlib.import_module(f"fasttx.kernels.triton.{name}")
    x, vector = (torch.empty(*shape, columns, dtype=DTYPES[dtype]) for shape in ((2,), ()))
    moments, sums = torch.empty(2, 2), torch.empty(3, columns)
    ids = torch.zeros(2, dtype=torch.int64)
    threshold, seed = THRESHOLD * dropout, _seed(dropout)
    arguments: dict[str, tuple[Any, ...]] = {
        "add_norm_forward": (x, x, vector, vector, vector, x, x, moments, threshold, seed, 1e-5),
        "add_norm_backward": (x, x, x, vector, moments, x, x, sums, threshold, seed),
        "bias_act_forward": (x, vector, x, threshold, seed, False),
        "bias_act_backward": (x, None, None, x, x, sums[0], threshold, seed, False),
        "embed_forward": (ids, ids.int(), x, x, x, threshold, seed, 1.0),
        "embed_backward": (x, ids, x, threshold, seed, 1.0),
    }
    return recorded(lambda: getattr(launchers, way)(*arguments[kernel]), dtype)


ROW_KERNELS = tuple(
    f"{name}_{way}" for name in ("add_norm", "bias_act", "embed") for way in ("forward", "backward")
)


def default_model() -> Iterator[Configuration]:
    """Training and inference of the default model (head_dim 32, 256 tokens), and one configuration
    for each other axis: dtype, head_dim, length, causal, precision."""
    for kernel in ("forward", "backward"):
        for dropout in (True, False):
            yield attention(kernel, "bf16", 32, 256, False, dropout)
        yield attention(kernel, "fp16", 32, 128, False, True)
        yield attention(kernel, "fp32", 32, 256, False, True)
        yield attention(kernel, "fp32", 32, 256, False, True, "tf32")
        yield attention(kernel, "bf16", 32, 512, False, True)
        yield attention(kernel, "bf16", 32, 256, True, True)
        yield attention(kernel, "bf16", 20, 16, False, True)
        yield attention(kernel, "bf16", 64, 256, False, True)
        yield attention(kernel, "bf16", 128, 256, False, True)
    for kernel in ROW_KERNELS:
        yield row_operation(kernel, "bf16", 1024 if kernel.startswith("bias") else 256, True)


def every() -> Iterator[Configuration]:
    """All that the tables can ask for, at the head_dims that need no padding and at two that do: of
    these the strides are no multiples of 16, so that rows are read element by element."""
    seen = set()
    flags = (False, True)
    lengths = [16, 32, 64, 128, 256, 257]
    for kernel, dtype, head_dim, length, causal, dropout in itertools.product(
        ("forward", "backward"), DTYPES, (*tiles.HEAD_DIMS, 8, 20), lengths, flags, flags
    ):
        for precision in ("ieee", "tf32") if dtype == "fp32" else ("ieee",):
            seen.add(attention(kernel, dtype, head_dim, length, causal, dropout, precision))
    for kernel, dtype, dropout in itertools.product(ROW_KERNELS, DTYPES, flags):
        for columns in (20, 64, 256, 1024):
            seen.add(row_operation(kernel, dtype, columns, dropout))
    yield from sorted(seen, key=str)


def compile_for(configuration: Configuration, target: str) -> Any:
    """The compiled kernel: `.asm` holds its forms, `.metadata.shared` its shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = importlib.import_module(f"fasttx.kernels.triton.{configuration.module}")
    kernel = getattr(module, configuration.kernel)
    constants, signature = dict(configuration.constants), dict(configuration.signature)
    attributes = {(i,): [["tt.divisibility", 16]] for i in configuration.aligned}
    backend, architecture, warp_size, _ = TARGETS[target]
    options = {
        "num_warps": max(1, configuration.num_warps * 32 // warp_size),
        "num_stages": configuration.num_stages,
        "enable_fp_fusion": True,
    }
    return triton.compile(
        ASTSource(kernel, signature, constexprs=constants, attrs=attributes),
        target=GPUTarget(backend, architecture, warp_size),
        options=options,
    )


def usage(compiled: Any, target: str) -> Usage:
    """Read from the binary (NVIDIA: by the cuobjdump that Triton carries) or the assembly (AMD)."""
    shared = compiled.metadata.shared
    if TARGETS[target][0] == "hip":
        text = compiled.asm["amdgcn"]
        registers = max(int(n) for n in re.findall(r"\.vgpr_count:\s+(\d+)", text))
        (stack,) = (int(n) for n in re.findall(r"\.private_segment_fixed_size:\s+(\d+)", text))
        return Usage(registers, shared, stack)
    import triton

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", path]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return Usage(int(found["REG"]), shared, int(found["STACK"]) + int(found["LOCAL"]))


def faults(configuration: Configuration, target: str, used: Usage) -> list[str]:
    """What is wrong with a compiled kernel."""
    wrong = []
    limit = TARGETS[target][3]
    if used.shared > limit:
        wrong.append(f"{used.shared} bytes of shared memory; {target} has {limit} a block")
    if used.stack and not configuration.may_spill:
        wrong.append(f"{used.stack} bytes of registers spilled")
    return wrong


@dataclasses.dataclass(frozen=True)
class Row:
    """One kernel on one target: what it takes (None: it does not compile), and what is wrong."""

    configuration: Configuration
    target: str
    used: Usage | None
    faults: list[str]


def examine(work: tuple[Configuration, str]) -> Row:
    configuration, target = work
    try:
        used = usage(compile_for(configuration, target), target)
    except Exception as error:  # one of thousands: the others are still worth their hours
        why = " ".join(f"{type(error).__name__}: {error}".split())
        return Row(configuration, target, None, [f"does not compile: {why[:300]}"])
    return Row(configuration, target, used, faults(configuration, target, used))


def table(rows: list[Row]) -> str:
    """Markdown: a line a configuration, a column a target, `registers / shared bytes / spilled`."""
    targets = list(dict.fromkeys(row.target for row in rows))
    cells = {(row.configuration, row.target): row.used for row in rows}
    lines = [f"| {' | '.join(['kernel', 'warps', *targets])} |", "|---" * (2 + len(targets)) + "|"]
    for c in dict.fromkeys(row.configuration for row in rows):
        taken = [str(cells[c, target] or "-") for target in targets]
        lines.append(f"| {' | '.join([str(c), str(c.num_warps), *taken])} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="every configuration of the tables")
    parser.add_argument("--only", metavar="REGEX", default="", help="those whose line matches")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=[*TARGETS])
    parser.add_argument("--markdown", type=Path, help="write the table of resources there")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    arguments = parser.parse_args(argv)
    wanted = re.compile(arguments.only)
    configurations = [c for c in (every() if arguments.all else default_model())
                      if wanted.search(str(c))]  # fmt: skip
    if not configurations:
        parser.error(f"--only {arguments.only!r} matches no configuration")
    work = list(itertools.product(configurations, arguments.target))
    rows = []
    with concurrent.futures.ProcessPoolExecutor(arguments.workers) as pool:
        for row in pool.map(examine, work):
            rows.append(row)
            if sys.stderr.isatty():
                print(f"\r{len(rows)} of {len(work)}", end="", file=sys.stderr)
    text = table(rows)
    if arguments.markdown:
        arguments.markdown.write_text(text, encoding="utf-8")
    else:
        print(text)
    wrong = [
        f"{row.configuration} on {row.target}: {fault}" for row in rows for fault in row.faults
    ]
    for line in wrong:
        print(line, file=sys.stderr)
    print(f"{len(rows)} compiled, {len(wrong)} faults")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
