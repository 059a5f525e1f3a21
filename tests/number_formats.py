"""Number formats by their definitions: one number after another, in whole numbers and fractions.

Shares nothing with what it is compared with but the words of the definitions.
"""

from __future__ import annotations

import math
import struct
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise

TILE = 128
LEAST_EXPONENT = -126
NAN_CODE = -1  # any code that is not a number


@dataclass(frozen=True)
class Format:
    """A floating-point format with a sign, subnormals, and round to nearest, ties to even.

    Attributes:
        bits: in all.
        mantissa_bits: of these.
        bias: of the exponent.
        ieee: an exponent of all ones is an infinity or NaN; else only the code of all ones is NaN.
    """

    bits: int
    mantissa_bits: int
    bias: int
    ieee: bool

    @cached_property
    def magnitudes(self) -> list[Fraction]:
        """The finite magnitudes, each at the place of its code."""
        per_exponent = 1 << self.mantissa_bits
        codes = 1 << (self.bits - 1)
        finite = codes - per_exponent if self.ieee else codes - 1
        unit = Fraction(2) ** (1 - self.bias - self.mantissa_bits)
        found = []
        for code in range(finite):
            exponent, mantissa = divmod(code, per_exponent)
            if exponent == 0:
                found.append(mantissa * unit)
            else:
                found.append((per_exponent + mantissa) * unit * 2 ** (exponent - 1))
        return found

    @property
    def largest(self) -> Fraction:
        return self.magnitudes[-1]

    def code(self, value: Fraction, negative: bool) -> int:
        """The code nearest to a number, with the sign bit set if it is negative."""
        magnitude = abs(value)
        above = min(bisect_left(self.magnitudes, magnitude), len(self.magnitudes) - 1)
        below = max(above - 1, 0)
        over, under = self.magnitudes[above] - magnitude, magnitude - self.magnitudes[below]
        if over == under:
            best = above if above % 2 == 0 else below
        else:
            best = above if over < under else below
        return best | negative << (self.bits - 1)

    def value(self, code: int) -> float:
        """What a code stands for."""
        sign, place = divmod(code, 1 << (self.bits - 1))
        if place < len(self.magnitudes):
            return math.copysign(float(self.magnitudes[place]), -1 if sign else 1)
        infinite = self.ieee and place == len(self.magnitudes)
        return math.copysign(math.inf, -1 if sign else 1) if infinite else math.nan


E4M3 = Format(8, 3, 7, ieee=False)
E5M2 = Format(8, 2, 15, ieee=True)
E5M6 = Format(12, 6, 15, ieee=True)


def to_float32(value: Fraction) -> Fraction:
    """The float32 nearest to a number within its range, ties to even."""
    if value == 0:
        return value
    # 2**top <= |value| < 2**(top + 1)
    magnitude = abs(value)
    top = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** top > magnitude:
        top -= 1
    unit = Fraction(2) ** max(top - 23, -149)
    return round(value / unit) * unit  # Python's round takes ties to even


def scale_of(amax: float, form: Format, power_of_two: bool) -> float:
    """The scale of a tile whose largest magnitude is finite."""
    if amax == 0:
        return 1.0
    ratio = Fraction(amax) / form.largest
    if not power_of_two:
        return float(max(to_float32(ratio), Fraction(2) ** LEAST_EXPONENT))
    exponent = LEAST_EXPONENT
    while Fraction(2) ** exponent < ratio:
        exponent += 1
    return 2.0**exponent


def quantized(
    tile: Sequence[float], form: Format, power_of_two: bool = True
) -> tuple[list[int], float]:
    """The codes and the scale of the numbers that share one."""
    if not all(map(math.isfinite, tile)):
        return [NAN_CODE] * len(tile), math.nan
    scale = scale_of(max(map(abs, tile), default=0.0), form, power_of_two)
    codes = [
        form.code(to_float32(Fraction(x) / Fraction(scale)), math.copysign(1, x) < 0) for x in tile
    ]
    return codes, scale


def beside(value: float) -> list[float]:
    """The float32 numbers before and after a positive one."""
    (pattern,) = struct.unpack("<i", struct.pack("<f", value))
    return [struct.unpack("<f", struct.pack("<i", pattern + step))[0] for step in (-1, 1)]


def boundaries(form: Format) -> list[float]:
    """The magnitudes of a format, what lies halfway between two, and the float32s beside those."""
    halfway = [float((low + high) / 2) for low, high in pairwise(form.magnitudes)]
    near = [x for middle in halfway for x in beside(middle)]
    return sorted({*map(float, form.magnitudes), *halfway, *near})
