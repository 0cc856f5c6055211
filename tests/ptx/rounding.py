"""Rounding to floating-point formats by its definition, in exact arithmetic of fractions."""

from __future__ import annotations

import math
import struct
from fractions import Fraction
from typing import NamedTuple


class Format(NamedTuple):
    """bits of the whole, of the significand with the leading one, and the least normal exponent."""

    bits: int
    precision: int
    least: int

    @property
    def infinity(self) -> int:
        exponent = self.bits - self.precision
        return ((1 << exponent) - 1) << (self.precision - 1)


FP32, FP16, BF16 = Format(32, 24, -126), Format(16, 11, -14), Format(16, 8, -126)
NAN = {32: 0x7FFFFFFF, 16: 0x7FFF}  # what PTX makes of any NaN


def value(bits: int) -> float:
    """The float32 of these bits."""
    return struct.unpack("<f", struct.pack("<I", bits & 0xFFFFFFFF))[0]


def nearest(x: float | Fraction, to: Format) -> int:
    """The bits of x rounded to nearest, ties to even."""
    if isinstance(x, float):
        if math.isnan(x):
            return NAN[to.bits]
        sign = int(math.copysign(1, x) < 0) << (to.bits - 1)
        if math.isinf(x):
            return sign | to.infinity
    else:
        sign = int(x < 0) << (to.bits - 1)
    exact = abs(Fraction(x))
    exponent = to.least
    if exact:
        exponent = max(to.least, exact.numerator.bit_length() - exact.denominator.bit_length())
        exponent -= exponent > to.least and Fraction(2) ** exponent > exact
    unit = Fraction(2) ** (exponent - to.precision + 1)
    steps, rest = divmod(exact, unit)
    if rest * 2 > unit or (rest * 2 == unit and steps % 2):
        steps += 1
    # A significand that overflowed carries into the exponent, as the bits of IEEE 754 do.
    return sign | min(((exponent - to.least) << (to.precision - 1)) + steps, to.infinity)
