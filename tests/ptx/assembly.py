"""Small PTX texts for tests of the machine, and their launches on tensors of the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.ptx.machine import Counts, Kernel

HEAD = """.version 8.7
.target sm_90a
.address_size 64
.visible .entry probe({parameters}) .reqntid {threads}
{{
.reg .pred %p<64>;
.reg .b16 %h<64>;
.reg .b32 %w<512>;
.reg .b64 %d<64>;
"""
# %d0 ... are the tensors' addresses, %w0 the thread, %w1 the program, %w2 where shared memory
# begins.
BEGIN = """mov.u32 %w0, %tid.x;
mov.u32 %w1, %ctaid.x;
mov.b32 %w2, global_smem;
"""


def entry(body: str, tensors: int, threads: int = 32) -> str:
    """A kernel that is given so many tensors."""
    names = [f"tensor_{i}" for i in range(tensors)]
    parameters = ", ".join(f".param .u64 .ptr .global .align 1 {name}" for name in names)
    loads = "".join(f"ld.param.b64 %d{i}, [{name}];\n" for i, name in enumerate(names))
    return HEAD.format(parameters=parameters, threads=threads) + BEGIN + loads + body + "ret;\n}\n"


def run(
    body: str,
    *tensors: Tensor,
    threads: int = 32,
    programs: int = 1,
    shared: int = 0,
    seed: int = 0,
) -> Counts:
    """Launches `body` on tensors, which it writes in place."""
    buffers = [(x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()) for x in tensors]
    kernel = Kernel(entry(body, len(tensors), threads))
    return kernel.launch((programs,), [x.data_ptr() for x in tensors], buffers, shared, seed)


def lanewise(opcode: str, signature: str, rows: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """What an opcode makes of rows of operands, raw bits both, one row a lane.

    signature: as `Opcode::signature` has it, "w=ww". Predicates are 0 and 1.
    """
    made, _, given = signature.partition("=")
    count = -(-len(rows) // 32) * 32
    padded = [*rows, *[rows[0]] * (count - len(rows))]
    signed = [[x - (1 << 64) if x >> 63 else x for x in row] for row in padded]
    source = torch.tensor(signed, dtype=torch.int64)
    result = torch.zeros(count, len(made), dtype=torch.int64)
    body = "mad.lo.s32 %w3, %w1, 32, %w0;\n"
    for i, n in enumerate((len(given), len(made))):
        body += f"mul.wide.u32 %d{4 + i}, %w3, {8 * n};\nadd.s64 %d{4 + i}, %d{i}, %d{4 + i};\n"
    for i, kind in enumerate(given):
        bits = {"p": 32, "h": 16, "w": 32, "d": 64}[kind]
        register = f"%{'w' if kind == 'p' else kind}{20 + i}"
        body += f"ld.global.b{bits} {register}, [%d4 + {8 * i}];\n"
        if kind == "p":
            body += f"setp.ne.b32 %p{20 + i}, {register}, 0;\n"
    body += written(opcode, [f"%{k}{10 + i}" for i, k in enumerate(made)],
                    [f"%{k}{20 + i}" for i, k in enumerate(given)])  # fmt: skip
    for i, kind in enumerate(made):
        if kind == "p":
            body += f"selp.b32 %w{10 + i}, 1, 0, %p{10 + i};\n"
        bits = {"p": 32, "h": 16, "w": 32, "d": 64}[kind]
        body += f"st.global.b{bits} [%d5 + {8 * i}], %{'w' if kind == 'p' else kind}{10 + i};\n"
    run(body, source, result, programs=count // 32)
    mask = (1 << 64) - 1
    return [tuple(x & mask for x in row) for row in result.tolist()[: len(rows)]]


def written(opcode: str, made: list[str], given: list[str]) -> str:
    """An instruction as PTX has it; `pack` and `unpack` are forms of mov."""
    first, second = ", ".join(made), ", ".join(given)
    if opcode.startswith("unpack"):
        return f"mov{opcode[6:]} {{{first}}}, {second};\n"
    if opcode.startswith("pack"):
        return f"mov{opcode[4:]} {first}, {{{second}}};\n"
    if "x2" in opcode and opcode.startswith("setp"):
        first = "|".join(made)
    return f"{opcode} {first}, {second};\n"
