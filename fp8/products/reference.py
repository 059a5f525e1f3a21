"""The stated order of every rounding, in plain PyTorch: what other backends are held to.

For each 128 along K in ascending order (arXiv 2412.19437, section 3.3.2; the last may be shorter):

    partial = the exact sum of the products of FP8 numbers, rounded once to float32
    scale = float32(scale_a * scale_b)
    acc = float32(acc + float32(partial * scale)), from 0

and at the end accumulate = float32(accumulate + acc), or acc rounded to the output's dtype.
It is also what CPUs train with, so that it works through panels of rows that stay in the cache.

Shapes: M, N rows; K summed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..formats import E5M2, TILE, Quantized, decode, tiles_in
from .base import Backend, Product, tile_scales

# Elements of a panel of partial sums: 2 MB in float64, which a core's second-level cache holds.
_PANEL = 1 << 18
_PANEL_ON_GPU = 1 << 26
_LEAST_ROWS = 64  # of a panel; with fewer, most of the time goes into reading b again

_FLOAT64_BITS = 53
_FLOAT32_LEAST_NORMAL = 2.0**-126
_FLOAT32_TOP = 2.0**127
_MANTISSA = (1 << 23) - 1


class Reference(Backend):
    """Every layout of scales in any combination, on any device."""

    name: ClassVar[str] = "reference"

    def _compute(self, product: Product) -> Tensor:
        return compute_by_groups(product, multiply)


class Multiply(Protocol):
    """A dense product: a @ b.T of operands in tiles of 1x128, added to `into` or written there."""

    def __call__(self, a: Quantized, b: Quantized, into: Tensor, add: bool) -> None: ...


def compute_by_groups(product: Product, multiply: Multiply) -> Tensor:
    """Any of the three products from dense ones, a group at a time."""
    a, b, into = as_tiles(product.a), as_tiles(product.b), product.accumulate
    add = into is not None
    if into is None:
        into = a.values.new_empty(product.shape, dtype=product.out_dtype)
    if product.kind == "dense":
        multiply(a, b, into, add)
    elif product.kind == "grouped":
        for e, rows in slices(product.counts):
            multiply(_of(a, rows), Quantized(b.values[e], b.scales[e]), into[rows], add)
    else:
        padded = [tiles_in(n) * TILE for n in product.counts]
        for e, columns in slices(padded):
            multiply(_columns(a, columns), _columns(b, columns), into[e], add)
    return into


def multiply(a: Quantized, b: Quantized, into: Tensor, add: bool) -> None:
    """A dense product in the stated order.

    Args:
        a, b: [M, K] and [N, K] in tiles of 1x128.
        into: [M, N].
        add: whether the product is added to what is there.
    """
    exact = fits_float64(a, b)
    fold = exact and _may_fold(a, b)
    wide_b, scales_b = _wide(b, fold), b.scales.t().contiguous()
    m, n = into.shape
    rows = panel_rows(m, n, into.device)
    partial = torch.empty(rows, n, dtype=torch.float64, device=into.device)
    single, scale, acc = (torch.empty(rows, n, device=into.device) for _ in range(3))
    for start in range(0, m, rows):
        panel = _of(a, slice(start, start + rows))
        wide_a, size = _wide(panel, fold), len(panel.values)
        partial, single, scale, acc = (x[:size] for x in (partial, single, scale, acc))
        acc.zero_()
        for t in range(tiles_in(wide_a.shape[1])):
            k = slice(t * TILE, (t + 1) * TILE)
            if exact:
                torch.mm(wide_a[:, k], wide_b[:, k].t(), out=partial)
            else:
                partial.copy_(exact_product(wide_a[:, k], wide_b[:, k].t()))
            single.copy_(partial)
            if not fold:
                torch.mul(panel.scales[:, t, None], scales_b[t], out=scale)
                single.mul_(scale)
            acc.add_(single)
        target = into[start : start + size]
        if add:
            target.add_(acc)
        else:
            target.copy_(acc)


def fits_float64(a: Quantized, b: Quantized) -> bool:
    """Whether float64 holds every sum of 128 products exactly, in any order of summation.

    It always does for E4M3, whose products are multiples of 2**-18 and under 2**18. Products of
    E5M2 span 64 bits, but seldom those of the numbers in a real tensor.
    """
    return _span(a.values) + _span(b.values) + 7 <= _FLOAT64_BITS


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for FP8 numbers of any span, such that float32(result) is that of the exact sums.

    Args:
        a, b: [M, k] and [k, N] float64, k at most 128, without scales.

    Returns:
        [M, N] float64.
    """
    # Numbers from 1 up are multiples of 2**-9 or 2**-2, those under 1 of 2**-9 or 2**-16: each of
    # the four products fits, and so do the sum of the middle two and what is left over of `high`.
    plain = a @ b  # right where an infinity or NaN takes part
    a, b = a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0)
    low_a, low_b = a.where(a.abs() < 1, 0), b.where(b.abs() < 1, 0)
    high_a, high_b = a - low_a, b - low_b
    high, left = _two_sum(high_a @ high_b, high_a @ low_b + low_a @ high_b)
    odd = round_to_odd(high, left + low_a @ low_b)
    return torch.where(plain.isfinite(), odd, plain)


def round_to_odd(a: Tensor, b: Tensor) -> Tensor:
    """a + b, float64; where it is inexact, the one of its two neighbours whose last bit is set.

    Rounding that to float32 is like rounding the exact sum, since no tie can have been made of it.
    """
    total, error = _two_sum(a, b)
    is_even = total.view(torch.int64).bitwise_and(1) == 0
    towards = torch.where(error > 0, torch.inf, -torch.inf).to(total.dtype)
    return torch.where(is_even & (error != 0), torch.nextafter(total, towards), total)


def as_tiles(q: Quantized) -> Quantized:
    """The same operand with a float32 scale for each tile of 1x128."""
    return Quantized(q.values, tile_scales(q))


def wide_values(values: Tensor) -> Tensor:
    """Codes as float64, of the same layout in memory if they are a matrix or its transpose."""
    if values.mT.is_contiguous():
        return decode(values.mT, torch.float64).mT
    return decode(values.view(torch.int8).contiguous().view(values.dtype), torch.float64)


def slices(counts: Sequence[int]) -> list[tuple[int, slice]]:
    """Index and rows of each group that has any."""
    found: list[tuple[int, slice]] = []
    start = 0
    for e, n in enumerate(counts):
        if n:
            found.append((e, slice(start, start + n)))
        start += n
    return found


def panel_rows(m: int, n: int, device: torch.device) -> int:
    """How many rows of an [m, n] result are worked on at a time."""
    panel = _PANEL if device.type == "cpu" else _PANEL_ON_GPU
    return min(m, max(_LEAST_ROWS, panel // max(n, 1)))


def _wide(q: Quantized, fold: bool) -> Tensor:
    wide = wide_values(q.values)
    if fold:
        for t in range(q.scales.shape[1]):
            wide[:, t * TILE : (t + 1) * TILE].mul_(q.scales[:, t, None])
    return wide


def _may_fold(a: Quantized, b: Quantized) -> bool:
    """Whether scales can be multiplied into the float64 numbers without a change of any bit.

    A power of two moves through a sum and through roundings, as long as nothing on the way is
    subnormal in float32 or overflows where the stated order does not: scale_a * scale_b must be
    normal, and so must the least product times it. At the upper end both orders give the same:
    what exceeds float32 once rounded to 24 bits is an infinity, before or after a shift.
    """
    least, greatest = 1.0, 1.0
    for q in (a, b):
        if (q.scales.view(torch.int32).bitwise_and(_MANTISSA) != 0).any():
            return False
        low, high = (float(x) for x in q.scales.aminmax())
        least *= low * (2.0**-16 if q.values.dtype == E5M2 else 2.0**-9)
        greatest *= high
    return least >= _FLOAT32_LEAST_NORMAL and greatest <= _FLOAT32_TOP


def _span(values: Tensor) -> int:
    """Bits from the last place of the least number but zero to the top of the greatest."""
    if values.dtype != E5M2:
        return 18
    codes = values.view(torch.int8).bitwise_and(0x7F)
    greatest = int(codes.amax()) >> 2
    least = int(codes.where(codes > 0, 0x7F).amin()) >> 2
    return max(greatest, 1) - max(min(least, greatest), 1) + 3


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a + b rounded, and what the rounding left over, exact (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _of(q: Quantized, rows: slice) -> Quantized:
    return Quantized(q.values[rows], q.scales[rows])


def _columns(q: Quantized, columns: slice) -> Quantized:
    tiles = slice(columns.start // TILE, columns.stop // TILE)
    return Quantized(q.values[:, columns], q.scales[:, tiles])
