"""What the kernels share: conversions, scales and SwiGLU's arithmetic, inside Triton.

Every kernel takes INTERPRETED. On a GPU conversions are the hardware's. Triton's interpreter (3.6)
truncates instead of rounding, and loses subnormals of bfloat16 and NaNs of E4M3, so that there the
same conversions are done on the bits.
"""

# Triton's language is not Python to a type checker: its blocks, constants and launches are its own.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportArgumentType=false
from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from .. import swiglu_reference as reference
from ..formats import E4M3, TILE, Quantized, largest

P = ParamSpec("P")
R = TypeVar("R")

MAGNITUDE = tl.constexpr(0x7FFFFFFF)
INFINITY = tl.constexpr(0x7F800000)
QUIET_NAN = tl.constexpr(0x7FC00000)
NEGATIVE_LOG2_E = tl.constexpr(-reference.LOG2_E)
TO_INTEGER = tl.constexpr(reference.TO_INTEGER)
MOST_EXPONENT = tl.constexpr(reference.MOST_EXPONENT)
C0, C1, C2, C3, C4 = map(tl.constexpr, reference.EXP2)
TILE_SIZE = tl.constexpr(TILE)


@dataclass(frozen=True)
class Rule:
    """How to quantise: a constant of kernels, which are compiled for each.

    Attributes:
        fp8: Triton's name of the format.
        mantissa: bits of its mantissa.
        least_exponent: of its normal numbers.
        largest: its largest value, 1.75 times a power of two.
        top: that power's exponent.
        power_of_two: scales are powers of two.
        interpreted: see the head of this file.
    """

    fp8: tl.dtype
    mantissa: int
    least_exponent: int
    largest: float
    top: int
    power_of_two: bool
    interpreted: bool


def rule(dtype: torch.dtype, power_of_two: bool) -> Rule:
    """The rule of E4M3 or E5M2 with one of the two kinds of scales."""
    if dtype == E4M3:
        return Rule(tl.float8e4nv, 3, -6, largest(dtype), 8, power_of_two, interpreted())
    return Rule(tl.float8e5, 2, -14, largest(dtype), 15, power_of_two, interpreted())


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def group_tiles(counts: Sequence[int], device: torch.device) -> Tensor:
    """The first row and the end of the rows of each tile of 128 of padded groups: int32 [2, tiles].

    The counts are on the host, so that nothing waits for the device.
    """
    starts: list[int] = []
    stops: list[int] = []
    row = 0
    for n in counts:
        starts += range(row, row + n, TILE)
        row += n
        stops += [min(start + TILE, row) for start in starts[len(stops) :]]
    return to_device([starts, stops], device)


def to_device(table: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Small integers as int32 on a device, without a wait of the host or of the device."""
    on_gpu = device.type == "cuda"
    host = torch.tensor(table, dtype=torch.int32, pin_memory=on_gpu)
    return host.to(device, non_blocking=True)


def on_its_device(launcher: Callable[P, R]) -> Callable[P, R]:
    """The launcher with the device of its first argument, a tensor or a quantised one, as current.

    Triton launches on torch's current device, wherever the operands are.
    """

    @wraps(launcher)
    def launch(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        x = first.values if isinstance(first, Quantized) else first
        assert isinstance(x, Tensor), "launchers take their operands by position"
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            return launcher(*args, **kwargs)

    return launch


@triton.jit
def loop_bound(n, INTERPRETED: tl.constexpr):
    """A number known only when the kernel runs, for `tl.range`.

    In the interpreter it is an array of one element, of which numpy 2.4 makes no index.
    """
    return n.handle.data.item() if INTERPRETED else n


@triton.jit
def widen(x, INTERPRETED: tl.constexpr):
    """Any floating block as float32, exactly."""
    return _widen_bits(x) if INTERPRETED else x.to(tl.float32)


@triton.jit
def _widen_bits(x):
    if x.dtype == tl.bfloat16:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        wide = bits.to(tl.float32, bitcast=True)
    elif x.dtype == tl.float8e5:  # the upper byte of a float16
        bits = x.to(tl.uint8, bitcast=True).to(tl.uint16) << 8
        wide = bits.to(tl.float16, bitcast=True).to(tl.float32)
    elif x.dtype == tl.float8e4nv:  # shifted to float32's places, its exponent is short by 120
        code = x.to(tl.uint8, bitcast=True).to(tl.uint32)
        number = (((code & 0x80) << 24) | ((code & 0x7F) << 20)).to(tl.float32, bitcast=True)
        nan = (((code & 0x80) << 24) | 0x7FC00000).to(tl.float32, bitcast=True)
        wide = tl.where((code & 0x7F) == 0x7F, nan, number * 1.329227995784916e36)  # 2**120
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def narrow(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """A float32 block as bfloat16, float16 or float32, rounded to the nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, (bits >> 16) | 0x40, rounded)
        found = rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        found = x.to(dtype)
    return found


@triton.jit
def encode(y, RULE: tl.constexpr):
    """Codes (uint8) of float32 numbers that are NaN or within the format's range once rounded."""
    return _encode_bits(y, RULE) if RULE.interpreted else y.to(RULE.fp8).to(tl.uint8, bitcast=True)


@triton.jit
def _encode_bits(y, RULE: tl.constexpr):
    bits = y.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    drop: tl.constexpr = 23 - RULE.mantissa
    half: tl.constexpr = (1 << (22 - RULE.mantissa)) - 1
    normal = (magnitude + half + ((magnitude >> drop) & 1)) >> drop
    normal -= (126 + RULE.least_exponent) << RULE.mantissa
    # Under the normal numbers the code counts the format's least step.
    step: tl.constexpr = 2.0 ** (RULE.mantissa - RULE.least_exponent)
    counted = magnitude.to(tl.float32, bitcast=True) * step + TO_INTEGER
    subnormal = counted.to(tl.uint32, bitcast=True) & 0xFF
    least_normal: tl.constexpr = (127 + RULE.least_exponent) << 23
    code = tl.where(magnitude < least_normal, subnormal, normal)
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def magnitude_bits(x):
    """|x| of float32 as integers: in the same order, and a NaN is above every number."""
    return x.to(tl.int32, bitcast=True) & MAGNITUDE


@triton.jit
def scale_of(amax_bits, RULE: tl.constexpr):
    """A tile's scale, and what to multiply by if scales are powers of two (else the scale again).

    `amax_bits` are `magnitude_bits`. Powers of two are put together from bits: neither division nor
    logarithm, so that a GPU has nothing to approximate.
    """
    strange = amax_bits >= INFINITY
    if RULE.power_of_two:
        # amax = 1.m * 2**e, and the format's largest value is 1.75 * 2**top.
        above = (amax_bits & 0x7FFFFF) > 0x600000
        exponent = tl.maximum((amax_bits >> 23) - 127 - RULE.top + above.to(tl.int32), -126)
        exponent = tl.where(amax_bits == 0, 0, exponent)
        scale = tl.where(strange, QUIET_NAN, (exponent + 127) << 23).to(tl.float32, bitcast=True)
        inverse = tl.where(strange, QUIET_NAN, (127 - exponent) << 23).to(tl.float32, bitcast=True)
        return scale, inverse
    amax = amax_bits.to(tl.float32, bitcast=True)
    limit = tl.full(amax_bits.shape, RULE.largest, tl.float32)
    scale = tl.maximum(tl.math.div_rn(amax, limit), 1.1754943508222875e-38)  # 2**-126
    scale = tl.where(amax_bits == 0, 1.0, scale)
    nan = tl.full(amax_bits.shape, QUIET_NAN, tl.int32).to(tl.float32, bitcast=True)
    scale = tl.where(strange, nan, scale)
    return scale, scale


@triton.jit
def scaled(x, factor, RULE: tl.constexpr):
    """x / scale, rounded once; `factor` is the second result of `scale_of`, of x's shape."""
    if RULE.power_of_two:
        return x * factor
    return tl.math.div_rn(x, factor)


@triton.jit
def sigmoid(g, INTERPRETED: tl.constexpr):
    """`swiglu_reference.sigmoid`: launch with enable_fp_fusion=False."""
    t = tl.minimum(tl.maximum(g * NEGATIVE_LOG2_E, -MOST_EXPONENT), MOST_EXPONENT)
    shifted = t + TO_INTEGER
    f = t - (shifted - TO_INTEGER)
    power = f * C4 + C3
    power = power * f + C2
    power = power * f + C1
    power = power * f + C0
    power = power * f + 1.0
    bits = power.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)
    below = bits.to(tl.float32, bitcast=True) + 1.0
    return 1.0 / below if INTERPRETED else libdevice.rcp_rn(below)
