"""PTX text to the instructions of the machine."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

SHARED_BASE = 1024  # as in machine.h
BRANCH, RETURN, BARRIER = -1, -2, -3  # in place of an opcode's number
WIDTHS = {"pred": 0, "b16": 2, "b32": 4, "b64": 8}  # bytes of a register; of a predicate a mask
LETTERS = {"p": 0, "h": 2, "w": 4, "d": 8, "[": 4}
SPECIALS = [
    f"%{name}"
    for name in (
        "tid.x tid.y tid.z ntid.x ntid.y ntid.z ctaid.x ctaid.y ctaid.z nctaid.x nctaid.y nctaid.z "
        "laneid warpid"
    ).split()
]
# PTX type of a parameter -> its code in `struct`
TYPES = {"u64": "Q", "u32": "I", "f32": "f", "u16": "H", "u8": "B", "s32": "i", "s64": "q"}
LANES = 32


class Unsupported(RuntimeError):
    """PTX that the machine does not know."""


@dataclass
class Instruction:
    """One instruction, as `Instruction` of machine.h; line and place are for messages."""

    line: int
    place: str
    opcode: int = 0
    guard: int = -1
    negated: bool = False
    count: int = 0
    size: int = 0
    width: int = 0
    is_signed: bool = False
    extra: int = 0
    immediate: int = 0
    r: list[int] = field(default_factory=list)


def statements(text: str) -> list[tuple[int, str, str]]:
    """(line of the text, place in the kernel's source, statement without its semicolon)."""
    found, place, pending, start = [], "", "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if located := re.match(r"\s*\.loc\b.*?//\s*(\S+)", line):
            place = located[1].split("@")[0]
        line = re.sub(r"//.*", "", line).strip()
        if not line or (not pending and line.startswith((".file", ".section", ".loc"))):
            continue
        start = start if pending else number
        pending += " " + line
        while match := re.match(r"\s*(\$?\w+:(?!:)|[{}](?=\s*$|\s*[.@\w])|[^;]*;)", pending):
            found.append((start, place, match[1].rstrip(";").strip()))
            pending = pending[match.end() :]
        pending = pending if pending.strip() else ""
    return found


def _split(text: str) -> list[str]:
    """Operands; a vector {...} or an address [...] is one of them, predicates p|q are two."""
    parts = (part.strip() for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,|{}\[\]]+", text))
    return [part for part in parts if part]


def _vector(text: str) -> list[str]:
    return [name.strip() for name in text.strip("{} ").split(",")]


class Program:
    """The one entry of a PTX text. opcodes: name -> (number, signature), as the machine has them.

    Raises Unsupported, which names each opcode or operand that the machine does not know.
    """

    def __init__(self, text: str, opcodes: Mapping[str, tuple[int, str]]) -> None:
        self.lines = text.splitlines()
        self.instructions: list[Instruction] = []
        self.pool: list[int] = []  # registers of the instructions that have many
        self.specials: list[tuple[int, int]] = []  # index in SPECIALS, where it lies
        self._opcodes = opcodes
        self._at: dict[str, int] = {}  # register -> where it lies
        self._width: dict[str, int] = {}
        self._constants: dict[tuple[int, int], int] = {}  # (width, value) -> where it lies
        self._loads: list[
            tuple[int, int, str, bool]
        ] = []  # of parameters: where, width, name, signed
        self._bytes = 0
        head, _, body = text[text.index(".entry") :].partition("{")
        self.name = re.match(r"\.entry\s+(\w+)", head)[1]
        self.threads = int(re.search(r"\.(?:req|max)ntid\s+(\d+)", head)[1])
        self.parameters = [
            (name, TYPES[kind])
            for kind, name in re.findall(r"\.param\s+\.(\w+)(?:[^,()]*?)\s(\w+)\s*(?=,|\))", head)
        ]
        first_line = text[: text.index(".entry")].count("\n") + head.count("\n")
        self._build(body.rpartition("}")[0], first_line)

    # ---------------------------------------------------------------------------------- registers

    def _slot(self, width: int) -> int:
        at = self._bytes
        self._bytes += LANES * width if width else 4
        self._bytes += -self._bytes % (64 if width else 4)
        return at

    def _constant(self, text: str, width: int) -> int:
        """A register that holds what is written out."""
        if width == 0:
            value = 0xFFFFFFFF if int(text, 0) else 0
        elif text == "global_smem":
            value = SHARED_BASE
        elif match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", text):
            value = int(match[1] or match[2], 16)
        else:
            value = int(text.rstrip("U"), 0) & ((1 << 8 * width) - 1)
        if (width, value) not in self._constants:
            self._constants[width, value] = self._slot(width)
        return self._constants[width, value]

    def _operand(self, text: str, width: int) -> int:
        """Where a register lies."""
        if text == "_":  # a result that nobody reads
            return self._slot(width)
        if text in SPECIALS and text not in self._at:
            self._at[text], self._width[text] = self._slot(4), 4
            self.specials.append((SPECIALS.index(text), self._at[text]))
        if not text.startswith("%"):
            return self._constant(text, width)
        if text not in self._at:
            raise Unsupported(f"register {text}")
        if self._width[text] != width:
            raise Unsupported(f"{text} of {self._width[text]} bytes, where {width} are expected")
        return self._at[text]

    def _address(self, text: str, width: int) -> tuple[int, int]:
        """[register + offset]: where the register lies, the offset."""
        match = re.fullmatch(r"\[([%\w]+)(?:\+?(-?\w+))?\]", text.replace(" ", ""))
        if not match:
            raise Unsupported(f"address {text}")
        return self._operand(match[1], width), int(match[2] or "0", 0)

    # ------------------------------------------------------------------------------- instructions

    def _build(self, body: str, first_line: int) -> None:
        labels: dict[str, int] = {}
        missing: dict[str, int] = {}
        self._jumps: list[tuple[Instruction, str]] = []
        for line, place, statement in statements(body):
            if statement in ("{", "}", ""):
                continue
            if statement.endswith(":"):
                labels[statement[:-1]] = len(self.instructions)
                continue
            if declared := re.match(r"\.reg\s+\.(\w+)\s+%(\w+)<(\d+)>", statement):
                for i in range(int(declared[3])):
                    name = f"%{declared[2]}{i}"
                    self._width[name] = WIDTHS[declared[1]]
                    self._at[name] = self._slot(self._width[name])
                continue
            if statement.startswith("."):
                continue
            match = re.match(r"(?:@(!?)(%\w+)\s+)?(\S+)\s*(.*)", statement, re.S)
            negated, guard, opcode, rest = match.groups()
            instruction = Instruction(line + first_line, place)
            try:
                if guard:
                    instruction.guard, instruction.negated = self._operand(guard, 0), bool(negated)
                self._fill(instruction, opcode, _split(rest))
            except Unsupported as why:
                missing[f"{opcode}: {why}"] = missing.get(f"{opcode}: {why}", 0) + 1
            else:
                self.instructions.append(instruction)
        if missing:
            raise Unsupported(
                f"{self.name}: the PTX machine does not know "
                + "; ".join(f"{what} ({count} times)" for what, count in missing.items())
            )
        for instruction, label in self._jumps:
            instruction.immediate = labels[label]

    def _number(self, opcode: str) -> int:
        if opcode not in self._opcodes:
            raise Unsupported("no such opcode")
        return self._opcodes[opcode][0]

    def _fill(self, ins: Instruction, opcode: str, parts: list[str]) -> None:
        if opcode in ("bra", "bra.uni"):
            ins.opcode = BRANCH
            self._jumps.append((ins, parts[0]))
        elif opcode == "ret":
            ins.opcode = RETURN
        elif opcode == "bar.sync":
            if parts != ["0"]:
                raise Unsupported("a barrier other than 0")
            ins.opcode = BARRIER
        elif match := re.fullmatch(r"ld\.param\.([busf])\d+", opcode):
            # A parameter never changes: a register holds it, and each load copies that.
            width = self._width[parts[0]]
            source = self._slot(width)
            self._loads.append((source, width, parts[1].strip("[] "), match[1] == "s"))
            ins.opcode, ins.r = self._number(f"mov.b{8 * width}"), [self._at[parts[0]], source]
        elif match := re.fullmatch(r"(ld|st)\.(global|shared)(?:\.v(\d))?\.([busf])(\d+)", opcode):
            self._fill_access(ins, match, parts)
        elif opcode.startswith("cp.async"):
            self._fill_copy(ins, opcode, parts)
        elif opcode.startswith("wgmma."):
            self._fill_wgmma(ins, opcode, parts)
        else:
            if opcode.startswith("mov."):
                width = opcode[4:].lstrip("bfsu")  # pred, 16, 32, 64
                if any(part.startswith("{") for part in parts):
                    opcode = ("un" if parts[0].startswith("{") else "") + f"pack.b{width}"
                else:
                    opcode = "mov.pred" if width == "pred" else f"mov.b{width}"
            self._fill_plain(ins, opcode, parts)

    def _fill_plain(self, ins: Instruction, opcode: str, parts: list[str]) -> None:
        """Operands in the order of the opcode's signature."""
        ins.opcode = self._number(opcode)
        kinds = self._opcodes[opcode][1].replace("=", "")
        names = [name for part in parts for name in (_vector(part) if part[0] == "{" else [part])]
        if len(names) != len(kinds):
            raise Unsupported(f"{len(names)} operands, where {len(kinds)} are expected")
        for kind, name in zip(kinds, names, strict=True):
            if kind == "[":
                at, ins.immediate = self._address(name, LETTERS[kind])
            else:
                at = self._operand(name, LETTERS[kind])
            ins.r.append(at)

    def _fill_access(self, ins: Instruction, match: re.Match[str], parts: list[str]) -> None:
        way, space, count, kind, bits = match.groups()
        ins.opcode = self._number(f"{way}.{space}")
        ins.count, ins.size, ins.is_signed = int(count or 1), int(bits) // 8, kind == "s"
        address, values = (parts[1], parts[0]) if way == "ld" else parts
        names = _vector(values)
        if len(names) != ins.count:
            raise Unsupported(f"{len(names)} registers, where {ins.count} are expected")
        if ins.size < 2 and space == "global":
            raise Unsupported("accesses of one byte of global memory")
        widths = {self._width[name] for name in names if name in self._width}
        ins.width = widths.pop() if widths else max(2, ins.size)
        registers = [self._operand(name, ins.width) for name in names]
        base, ins.immediate = self._address(address, 4 if space == "shared" else 8)
        ins.r = [*registers, base] if way == "ld" else [base, *registers]

    def _fill_copy(self, ins: Instruction, opcode: str, parts: list[str]) -> None:
        if re.fullmatch(r"cp\.async\.c[ag]\.shared\.global", opcode):
            ins.opcode, ins.size = self._number("cp.async"), int(parts[2], 0)
            to, ins.immediate = self._address(parts[0], 4)
            from_, ins.extra = self._address(parts[1], 8)
            ins.r = [to, from_, self._operand(parts[3] if len(parts) > 3 else parts[2], 4)]
        else:
            ins.opcode = self._number(opcode)
            ins.immediate = int(parts[0], 0) if parts else 0

    def _fill_wgmma(self, ins: Instruction, opcode: str, parts: list[str]) -> None:
        ins.opcode = self._number(opcode)
        if not opcode.startswith("wgmma.mma_async"):
            ins.immediate = int(parts[0], 0) if parts else 0
            return
        ins.r = [len(self.pool)]
        in_registers = parts[1].startswith("{")
        accumulators = [self._operand(name, 4) for name in _vector(parts[0])]
        first = (
            [self._operand(name, 4) for name in _vector(parts[1])] if in_registers
            else [self._operand(parts[1], 8)]
        )  # fmt: skip
        self.pool += [*accumulators, *first, self._operand(parts[2], 8), self._operand(parts[3], 0)]
        if parts[4:6] != ["1", "1"]:
            raise Unsupported("negated factors")
        transposed = [
            bool(int(part)) for part in parts[6:]
        ]  # none for tf32; of B alone if A is in registers
        transposed = [False] * (2 - len(transposed)) + transposed
        ins.immediate = transposed[0] + 2 * transposed[1] + 4 * in_registers

    # ------------------------------------------------------------------------------------ launches

    def image(self, values: Sequence[int | float], seed: int) -> np.ndarray:
        """The registers of a warp as a program begins: constants, parameters, and NaN by the
        seed."""
        given = {}
        for (name, code), value in zip(self.parameters, values, strict=True):
            if code == "f":
                given[name] = struct.unpack("<I", struct.pack("<f", value))[0]
            else:
                given[name] = int(value) & ((1 << 8 * struct.calcsize(code)) - 1)
        poison = np.random.default_rng(seed).integers(0, 1 << 22, -(-self._bytes // 4), np.uint32)
        image = (poison | np.uint32(0x7FC00000)).view(np.uint8)

        def put(at: int, width: int, value: int) -> None:
            raw = value.to_bytes(width or 4, "little") * (LANES if width else 1)
            image[at : at + len(raw)] = np.frombuffer(raw, np.uint8)

        for (width, value), at in self._constants.items():
            put(at, width, value)
        codes = dict(self.parameters)
        for at, width, name, signed in self._loads:
            bits = 8 * struct.calcsize(codes[name])
            value = given[name]
            if signed and value >> (bits - 1):
                value -= 1 << bits
            put(at, width, value & ((1 << 8 * width) - 1))
        return image
