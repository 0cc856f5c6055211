"""Each opcode of the PTX machine whose lanes do not see one another, against its definition in the
PTX ISA, written here once more in Python's integers and fractions."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch

from tests.ptx import machine
from tests.ptx.assembly import lanewise, run
from tests.ptx.rounding import BF16, FP16, FP32, NAN, nearest, value

pytestmark = pytest.mark.skipif(machine.missing() is not None, reason=str(machine.missing()))

BITS = {"h": 16, "w": 32, "d": 64, "p": 1}


def signed(x: int, bits: int) -> int:
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


def _quotient(a: int, b: int) -> int:
    return (abs(a) // abs(b)) * (1 if (a < 0) == (b < 0) else -1) if b else -1


def _integers() -> dict[str, Callable[..., int]]:
    found: dict[str, Callable[..., int]] = {}
    for bits in (16, 32, 64):
        found[f"add.s{bits}"] = lambda a, b: a + b
        found[f"sub.s{bits}"] = lambda a, b: a - b
        found[f"mul.lo.s{bits}"] = lambda a, b: a * b
        found[f"and.b{bits}"] = lambda a, b: a & b
        found[f"or.b{bits}"] = lambda a, b: a | b
        found[f"xor.b{bits}"] = lambda a, b: a ^ b
        found[f"not.b{bits}"] = lambda a: ~a
        found[f"mov.b{bits}"] = lambda a: a
        found[f"selp.b{bits}"] = lambda a, b, p: a if p else b
        found[f"shl.b{bits}"] = lambda a, n: a << min(n, 64)
        found[f"shr.u{bits}"] = lambda a, n: a >> min(n, 64)
        found[f"shr.s{bits}"] = lambda a, n, bits=bits: signed(a, bits) >> min(n, 64)
    for bits in (32, 64):
        found[f"mad.lo.s{bits}"] = lambda a, b, c: a * b + c
        found[f"neg.s{bits}"] = lambda a: -a
        found[f"min.s{bits}"] = lambda a, b, bits=bits: min(signed(a, bits), signed(b, bits))
        found[f"max.s{bits}"] = lambda a, b, bits=bits: max(signed(a, bits), signed(b, bits))
    for bits in (16, 32):
        found[f"mul.wide.u{bits}"] = lambda a, b: a * b
        found[f"mul.wide.s{bits}"] = lambda a, b, bits=bits: signed(a, bits) * signed(b, bits)
    return found | {
        "mul.hi.u32": lambda a, b: a * b >> 32,
        "mul.hi.s32": lambda a, b: signed(a, 32) * signed(b, 32) >> 32,
        "mad.wide.u32": lambda a, b, c: a * b + c,
        "mad.wide.s32": lambda a, b, c: signed(a, 32) * signed(b, 32) + c,
        "div.u32": lambda a, b: a // b if b else -1,
        "rem.u32": lambda a, b: a % b if b else -1,
        "div.s32": lambda a, b: _quotient(signed(a, 32), signed(b, 32)),
        "rem.s32": lambda a, b: (
            signed(a, 32) - _quotient(signed(a, 32), signed(b, 32)) * signed(b, 32) if b else -1
        ),
        "abs.s32": lambda a: abs(signed(a, 32)),
        "min.u32": min,
        "max.u32": max,
        "bfe.u32": lambda a, at, n: (a >> (at & 255)) & ((1 << (n & 255)) - 1),
        "bfe.s32": _signed_field,
        "prmt.b32": _permute,
        "selp.f32": lambda a, b, p: a if p else b,
        "and.pred": lambda a, b: a & b,
        "or.pred": lambda a, b: a | b,
        "xor.pred": lambda a, b: a ^ b,
        "not.pred": lambda a: 1 - a,
        "mov.pred": lambda a: a,
    }


def _signed_field(a: int, at: int, n: int) -> int:
    """Beyond the top there is the sign of the field's last bit, at most the register's."""
    at, n = at & 255, n & 255
    if not n:
        return 0
    bits = [a >> i & 1 for i in range(32)]
    sign = bits[min(at + n - 1, 31)]
    taken = [bits[at + i] if i < n and at + i < 32 else sign for i in range(32)]
    return sum(bit << i for i, bit in enumerate(taken))


def _permute(a: int, b: int, selector: int) -> int:
    source = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    made = []
    for i in range(4):
        nibble = selector >> (4 * i) & 15
        byte = source[nibble & 7]
        made.append((255 if byte >> 7 else 0) if nibble & 8 else byte)
    return int.from_bytes(bytes(made), "little")


def _conversions() -> dict[str, Callable[..., int]]:
    return {
        **{f"cvt.{to}.{of}": (lambda a: a) for to, of in (
            ("u16", "u32"), ("u16", "u64"), ("u32", "u16"), ("u32", "u64"), ("u64", "u16"),
            ("u64", "u32"),
        )},
        "cvt.s16.s8": lambda a: signed(a, 8),
        "cvt.s32.s16": lambda a: signed(a, 16),
        "cvt.s64.s32": lambda a: signed(a, 32),
        "cvt.rn.f32.s32": lambda a: nearest(Fraction(signed(a, 32)), FP32),
        "cvt.rn.f32.u32": lambda a: nearest(Fraction(a), FP32),
        "cvt.f32.bf16": lambda a: a << 16,
        "cvt.f32.f16": lambda a: nearest(float(np.uint16(a).view(np.float16)), FP32),
        "cvt.rn.bf16.f32": lambda a: nearest(value(a), BF16),
        "cvt.rn.f16.f32": lambda a: nearest(value(a), FP16),
        "cvt.rn.bf16x2.f32": lambda a, b: nearest(value(a), BF16) << 16 | nearest(value(b), BF16),
        "cvt.rn.f16x2.f32": lambda a, b: nearest(value(a), FP16) << 16 | nearest(value(b), FP16),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------ floats


def flushed(x: float) -> float:
    return math.copysign(0.0, x) if abs(x) < 2.0**-126 else x


def _exact(a: float, b: float, c: float) -> int:
    """a * b + c, rounded once."""
    if not all(map(math.isfinite, (a, b, c))):
        with np.errstate(all="ignore"):
            return nearest(float(np.float64(a) * np.float64(b) + np.float64(c)), FP32)
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact:
        return nearest(exact, FP32)
    return nearest(a * b + c, FP32)  # for the sign of zero


def _arithmetic(op: str) -> Callable[..., int]:
    def function(a: float, b: float) -> int:
        with np.errstate(all="ignore"):
            x, y = np.float32(a), np.float32(b)
            made = {"add": x + y, "sub": x - y, "mul": x * y, "div": x / y}[op]
        return nearest(float(made), FP32)

    return function


def _extreme(largest: bool) -> Callable[..., int]:
    def function(a: float, b: float) -> int:
        if math.isnan(a) or math.isnan(b):
            return nearest(b if math.isnan(a) else a, FP32)
        order = sorted((a, b), key=lambda x: (x, math.copysign(1, x)))  # -0 < +0
        return nearest(order[largest], FP32)

    return function


def _of_doubles(function: Callable[[np.float64], np.float64]) -> Callable[[float], int]:
    def rounded(a: float) -> int:
        with np.errstate(all="ignore"):
            return nearest(float(function(np.float64(a))), FP32)

    return rounded


EX2, LG2 = _of_doubles(np.exp2), _of_doubles(np.log2)
RSQRT, SQRT = _of_doubles(lambda x: 1 / np.sqrt(x)), _of_doubles(np.sqrt)
RCP = _of_doubles(lambda x: 1 / x)


def _floats() -> dict[str, Callable[..., int]]:
    """Of values, not of bits, and to bits."""
    found: dict[str, Callable[..., int]] = {"div.full.f32": _arithmetic("div")}
    for op in ("add", "sub", "mul"):
        found[f"{op}.f32"] = found[f"{op}.rn.f32"] = _arithmetic(op)
        found[f"{op}.ftz.f32"] = _flushing(_arithmetic(op))
    return found | {
        "div.rn.f32": _arithmetic("div"),
        "fma.rn.f32": _exact,
        "fma.rn.ftz.f32": _flushing(_exact),
        "neg.ftz.f32": _flushing(lambda a: nearest(-a, FP32)),
        "abs.ftz.f32": _flushing(lambda a: nearest(abs(a), FP32)),
        "min.f32": _extreme(False),
        "max.f32": _extreme(True),
        "ex2.approx.f32": EX2,
        "ex2.approx.ftz.f32": _flushing(EX2),
        "lg2.approx.f32": LG2,
        "lg2.approx.ftz.f32": _flushing(LG2),
        "rsqrt.approx.f32": RSQRT,
        "rsqrt.approx.ftz.f32": _flushing(RSQRT),
        "sqrt.approx.ftz.f32": _flushing(SQRT),
        "rcp.approx.ftz.f32": _flushing(RCP),
    }


def _flushing(function: Callable[..., int]) -> Callable[..., int]:
    def flushing(*operands: float) -> int:
        return nearest(flushed(value(function(*map(flushed, operands)))), FP32)

    return flushing


# Of bits: they keep the bits of a NaN.
OF_BITS = {
    "neg.f32": lambda a: a ^ 1 << 31,
    "abs.f32": lambda a: a & ~(1 << 31),
    "copysign.f32": lambda a, b: b & ~(1 << 31) | a & 1 << 31,
}
# The PTX ISA leaves open which NaN they make of one.
ANY_NAN = ("neg.ftz.f32", "abs.ftz.f32", "cvt.f32.f16")
FLOATS = _floats()
INTEGERS = _integers() | _conversions() | OF_BITS

# ------------------------------------------------------------------------------------- comparisons

_ORDERED = {
    "lt": lambda a, b: a < b, "le": lambda a, b: a <= b, "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b, "eq": lambda a, b: a == b, "ne": lambda a, b: a != b,
}  # fmt: skip


def _compared(opcode: str) -> Callable[[int, int], tuple[int, ...]]:
    _, name, kind = opcode.split(".")

    def of_floats(a: float, b: float) -> int:
        unordered = math.isnan(a) or math.isnan(b)
        if name in ("nan", "num"):
            return int(unordered == (name == "nan"))
        if name.endswith("u") and name != "u":
            return int(unordered or _ORDERED[name[:-1]](a, b))
        return int(not unordered and _ORDERED[name](a, b))

    def function(a: int, b: int) -> tuple[int, ...]:
        if kind == "f32":
            return (of_floats(value(a), value(b)),)
        if kind.endswith("x2"):
            widen = (lambda x: value(x << 16)) if kind == "bf16x2" else (
                lambda x: float(np.uint16(x).view(np.float16)))  # fmt: skip
            return tuple(of_floats(*(widen(x >> at & 0xFFFF) for x in (a, b))) for at in (0, 16))
        if kind[0] == "s":
            a, b = (signed(x, int(kind[1:])) for x in (a, b))
        return (int(_ORDERED[name](a, b)),)

    return function


def _packed(opcode: str) -> Callable[..., tuple[int, ...]]:
    bits = int(opcode.rpartition("b")[2]) // 2
    if opcode.startswith("pack"):
        return lambda a, b: (a | b << bits,)
    return lambda a: (a & (1 << bits) - 1, a >> bits)


def definition(opcode: str) -> Callable[..., tuple[int, ...]] | None:
    if opcode.startswith("setp."):
        return _compared(opcode)
    if "pack." in opcode:
        return _packed(opcode)
    if opcode in INTEGERS:
        return lambda *operands: (INTEGERS[opcode](*operands),)
    if opcode in FLOATS:
        return lambda *operands: (FLOATS[opcode](*map(value, operands)),)
    return None


# ------------------------------------------------------------------------------------------ values

_SPECIAL_FLOATS = (
    0, 1 << 31, 0x3F800000, 0xBF800000, 0x7F800000, 0xFF800000, 0x7FC00001, 0x00000001, 0x807FFFFF,
    0x00800000, 0x7F7FFFFF, 0x33800000, 0x42FF8000, 0xC2FC0000, 0x3F808000, 0x3F818000, 0x477FF000,
    0x477FEFFF, 0x33000000, 0x33000001, 0x3F802000, 0x3F801000, 0xC3150000, 0x43000000,
)  # fmt: skip


def operands(opcode: str, kinds: str) -> list[tuple[int, ...]]:
    """Values at the edges of the type, all pairs of them, and drawn ones."""
    generator = random.Random(opcode)
    columns = []
    for i, kind in enumerate(kinds):
        bits = BITS[kind]
        if (".f32" in opcode and kind == "w") or opcode.endswith("16x2"):
            special = list(_SPECIAL_FLOATS)
        else:
            edges = (0, 1, 2, 5, 31, 32, (1 << bits) - 1, 1 << (bits - 1), (1 << (bits - 1)) - 1)
            special = sorted({x & (1 << bits) - 1 for x in edges})
        if opcode[:3] in ("shl", "shr", "bfe") and i:
            special = [0, 1, 5, 8, 15, 16, 31, 32, 33, 63, 64, 200, 256, 261]
        columns.append(special)
    rows = list(itertools.product(*columns))
    rows = generator.sample(rows, min(len(rows), 350))
    return rows + [
        tuple(
            generator.choice(column) if opcode[:3] in ("shl", "shr", "bfe") and i
            else generator.getrandbits(BITS[kind])
            for i, (kind, column) in enumerate(zip(kinds, columns, strict=True))
        )
        for _ in range(130)
    ]  # fmt: skip


def _lanewise() -> dict[str, str]:
    """Opcodes with a plain signature; those of whole warps have files of their own."""
    if machine.missing():
        return {}
    of_warps = ("shfl", "redux", "bar", "mma", "ldmatrix", "stmatrix")
    return {
        name: signature
        for name, (_, signature) in machine.opcodes().items()
        if signature and not name.startswith(of_warps)
    }


@pytest.mark.parametrize("opcode", _lanewise())
def test_definition(opcode):
    function, signature = definition(opcode), _lanewise()[opcode]
    assert function is not None, f"{opcode} has no definition here"
    made, _, given = signature.partition("=")
    rows = operands(opcode, given)
    for row, found in zip(rows, lanewise(opcode, signature, rows), strict=True):
        expected = function(*row)
        for kind, x, y in zip(made, found, expected, strict=True):
            x, y = (z & (1 << BITS[kind]) - 1 for z in (x, y))
            if opcode in ANY_NAN and math.isnan(value(x)):
                x = NAN[32]
            assert x == y, f"{opcode} of {[hex(z) for z in row]}: {x:#x}, and not {y:#x}"


def test_every_definition_is_that_of_an_opcode():
    assert {*INTEGERS, *FLOATS} <= {*_lanewise()}


def test_predicated_off_lanes_keep_their_value():
    out = torch.full((32,), -1, dtype=torch.int32)
    run(
        "mov.b32 %w5, 7;\nsetp.lt.u32 %p1, %w0, 9;\n@%p1 add.s32 %w5, %w5, 3;\n"
        "@!%p1 mul.lo.s32 %w5, %w5, 2;\nmul.wide.u32 %d1, %w0, 4;\nadd.s64 %d2, %d0, %d1;\n"
        "st.global.b32 [%d2], %w5;\n",
        out,
    )
    assert out.tolist() == [10] * 9 + [14] * 23
