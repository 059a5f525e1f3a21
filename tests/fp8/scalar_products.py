"""Products of FP8 numbers from their definition, one number after another, in Python's integers.

Written without the code under test: codes are decoded by the formats' definitions, sums are exact
integers, and each rounding is spelled out.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from counterflow.fp8 import E4M3, Quantized

TILE = 128


def code_value(code: int, dtype: torch.dtype) -> Fraction:
    """The number a finite code stands for: sign, exponent, mantissa; subnormals at exponent 0."""
    mantissa_bits, bias = (3, 7) if dtype == E4M3 else (2, 15)
    exponent, mantissa = (code & 0x7F) >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
    if exponent:
        mantissa += 1 << mantissa_bits
    magnitude = mantissa * Fraction(2) ** (max(exponent, 1) - bias - mantissa_bits)
    return -magnitude if code & 0x80 else magnitude


def numbers(values: Tensor) -> list[list[Fraction]]:
    """The numbers of a matrix of codes."""
    codes = values.contiguous().view(torch.uint8).tolist()
    return [[code_value(code, values.dtype) for code in row] for row in codes]


def to_float32(x: Fraction) -> np.float32:
    """The nearest float32, ties to even."""
    if x == 0:
        return np.float32(0)
    # 2 ** e <= |x| < 2 ** (e + 1)
    e = abs(x.numerator).bit_length() - x.denominator.bit_length()
    if abs(x) < Fraction(2) ** e:
        e -= 1
    unit = Fraction(2) ** max(e - 23, -149)
    return np.float32(float(round(x / unit) * unit))  # round() of a Fraction: ties to even


def scale_at(q: Quantized, row: int, tile: int) -> np.float32:
    """The scale of one number, by the layout of its scales."""
    rows, columns = q.values.shape
    high, wide = q.scales.shape
    assert wide in (1, -(-columns // TILE))
    i = row if high == rows else row // TILE if high > 1 else 0
    return np.float32(float(q.scales[i, tile if wide > 1 else 0]))


def product(a: Quantized, b: Quantized) -> Tensor:
    """a @ b.T in the stated order, float32, from the definition."""
    wide_a, wide_b = numbers(a.values), numbers(b.values)
    columns = len(wide_a[0])
    found = np.zeros((len(wide_a), len(wide_b)), dtype=np.float32)
    with np.errstate(all="ignore"):
        for i, row_a in enumerate(wide_a):
            for j, row_b in enumerate(wide_b):
                acc = np.float32(0)
                for tile, start in enumerate(range(0, columns, TILE)):
                    pairs = zip(row_a[start:][:TILE], row_b[start:][:TILE], strict=True)
                    partial = to_float32(sum((x * y for x, y in pairs), Fraction(0)))
                    scale = scale_at(a, i, tile) * scale_at(b, j, tile)
                    acc = acc + partial * scale
                found[i, j] = acc
    return torch.from_numpy(found)


def truncated(x: Fraction, unit: Fraction) -> Fraction:
    """x cut off towards zero at multiples of `unit`."""
    cut = abs(x) // unit * unit
    return -cut if x < 0 else cut


def last_place(magnitude: Fraction, bits: int) -> Fraction:
    """The weight of the lowest of `bits` bits of a positive number."""
    e = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if magnitude < Fraction(2) ** e:
        e -= 1
    return Fraction(2) ** (e + 1 - bits)


def truncating_sum(row_a: list[Fraction], row_b: list[Fraction], bits: int, group: int) -> Fraction:
    """What a register of `bits` bits holds after these products, `group` at a time."""
    register = Fraction(0)
    for start in range(0, len(row_a), group):
        terms = [x * y for x, y in zip(row_a[start:][:group], row_b[start:][:group], strict=True)]
        terms.append(register)
        if not any(terms):
            register = Fraction(0)
            continue
        unit = last_place(max(abs(x) for x in terms), bits)
        register = sum((truncated(x, unit) for x in terms), Fraction(0))
        if register:
            register = truncated(register, last_place(abs(register), bits))
    return register


def emulated(a: Quantized, b: Quantized, bits: int, group: int, interval: int) -> Tensor:
    """a @ b.T as a truncating unit adds it up, from the definition; interval at most 128."""
    wide_a, wide_b = numbers(a.values), numbers(b.values)
    columns = len(wide_a[0])
    found = np.zeros((len(wide_a), len(wide_b)), dtype=np.float32)
    for i, row_a in enumerate(wide_a):
        for j, row_b in enumerate(wide_b):
            acc = np.float32(0)
            for start in range(0, columns, interval):
                parts = (row_a[start:][:interval], row_b[start:][:interval])
                register = to_float32(truncating_sum(*parts, bits, group))
                tile = start // TILE
                acc = acc + register * (scale_at(a, i, tile) * scale_at(b, j, tile))
            found[i, j] = acc
    return torch.from_numpy(found)
