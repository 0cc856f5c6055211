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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fasttx.kernels.triton import tiles

# name -> (backend, architecture, warp size, shared memory of one block in bytes)
TARGETS: dict[str, tuple[str, Any, int, int]] = {
    "sm_80": ("cuda", 80, 32, 163 * 1024),
    "sm_90": ("cuda", 90, 32, 227 * 1024),
    "sm_100": ("cuda", 100, 32, 227 * 1024),
    "gfx942": ("hip", "gfx942", 64, 64 * 1024),
}
BITS = {"fp32": 32, "bf16": 16, "fp16": 16}

# The type of each argument by its name; what is not here is a pointer to the kernel's dtype.
_TYPES = {
    **dict.fromkeys(("lse", "moments", "sums"), "*fp32"),
    **dict.fromkeys(("starts", "lens", "position_ids"), "*i32"),
    **dict.fromkeys(("seed", "ids", "order", "ends"), "*i64"),
    **dict.fromkeys(("sequences", "heads", "rows", "max_seqlen", "words", "longest"), "i32"),
    **dict.fromkeys(("threshold",), "i32"),
    **dict.fromkeys(("qk_scale", "scale", "keep_scale", "eps"), "fp32"),
}


@dataclasses.dataclass(frozen=True)
class Configuration:
    """One kernel as one launch compiles it."""

    module: str
    kernel: str
    dtype: str
    constants: tuple[tuple[str, Any], ...]  # its tl.constexpr arguments, and those that are None
    num_warps: int
    num_stages: int = 3

    @property
    def may_spill(self) -> bool:
        """Registers may spill to memory in fp32, and above head_dim 64; else they must not."""
        constants = dict(self.constants)
        return self.dtype == "fp32" or constants.get("BLOCK_D", 0) > 64

    def __str__(self) -> str:
        flags = [name.lower() for name, value in self.constants if value is True]
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


def attention(
    way: str, dtype: str, head_dim: int, max_seqlen: int, causal: bool, dropout: bool,
    precision: str = "ieee",
) -> Configuration:  # fmt: skip
    """What the launcher `way` (forward, backward) of attention.py asks for."""
    tile = tiles.tile(way, BITS[dtype], head_dim, max_seqlen)
    constants = {
        "D": head_dim, "BLOCK_D": tiles.padded_head_dim(head_dim),
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
        "CAUSAL": causal, "DROPOUT": dropout, "PRECISION": precision, "WHOLE": tile.whole,
    }  # fmt: skip
    name = f"attention_{way}"
    return _configuration(name, name, dtype, constants, tile.num_warps, tile.num_stages)


def row_operation(kernel: str, dtype: str, columns: int, dropout: bool) -> Configuration:
    """What the launchers of add_norm.py, bias_act.py and embed.py ask for."""
    module = kernel.removesuffix("_forward").removesuffix("_backward")
    tile = importlib.import_module(f"fasttx.kernels.triton.{module}").tile
    constants = tile(columns, backward=True) if kernel == "embed_backward" else tile(columns)
    warps = constants.pop("num_warps")
    constants["DROPOUT"] = dropout
    if module == "bias_act":
        constants["GELU"] = False
    if kernel == "bias_act_backward":
        constants |= {"u": None, "bias": None}
    if kernel == "add_norm_backward":
        constants["HAS_DTOTAL"] = True
    return _configuration(module, kernel, dtype, constants, warps)


def _configuration(
    module: str, kernel: str, dtype: str, constants: dict[str, Any], *resources: int
) -> Configuration:
    if not constants["DROPOUT"]:
        constants["seed"] = None
    return Configuration(module, kernel, dtype, tuple(constants.items()), *resources)


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
    """All that the tables can ask for, at the head_dims that need no padding."""
    seen = set()
    flags = (False, True)
    lengths = [16, 32, 64, 128, 256, 257]
    for kernel, dtype, head_dim, length, causal, dropout in itertools.product(
        ("forward", "backward"), BITS, tiles.HEAD_DIMS, lengths, flags, flags
    ):
        for precision in ("ieee", "tf32") if dtype == "fp32" else ("ieee",):
            seen.add(attention(kernel, dtype, head_dim, length, causal, dropout, precision))
    for kernel, dtype, dropout in itertools.product(ROW_KERNELS, BITS, flags):
        for columns in (64, 256, 1024):
            seen.add(row_operation(kernel, dtype, columns, dropout))
    yield from sorted(seen, key=str)


def _signature(kernel: Any, configuration: Configuration) -> tuple[dict[str, str], dict[Any, Any]]:
    """Types of the arguments, and which are multiples of 16: all pointers but the seed, and
    strides. These are what Triton finds at a launch."""
    constants = dict(configuration.constants)
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        is_stride = name.endswith(("_row", "_head"))
        kind = "constexpr" if name in constants else _TYPES.get(name)
        signature[name] = kind or ("i32" if is_stride else f"*{configuration.dtype}")
        if is_stride or (signature[name].startswith("*") and name != "seed"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, attributes


def compile_for(configuration: Configuration, target: str) -> Any:
    """The compiled kernel: `.asm` holds its forms, `.metadata.shared` its shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = importlib.import_module(f"fasttx.kernels.triton.{configuration.module}")
    kernel = getattr(module, configuration.kernel)
    signature, attributes = _signature(kernel, configuration)
    backend, architecture, warp_size, _ = TARGETS[target]
    options = {
        "num_warps": max(1, configuration.num_warps * 32 // warp_size),
        "num_stages": configuration.num_stages,
        "enable_fp_fusion": True,
    }
    return triton.compile(
        ASTSource(kernel, signature, constexprs=dict(configuration.constants), attrs=attributes),
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
