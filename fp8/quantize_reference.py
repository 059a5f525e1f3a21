"""Quantisation in plain PyTorch: what every kernel computes, bit for bit, and what CPUs run.

Functions have the names and arguments of those in `quantize`, which chooses; arguments are checked
there. Shapes: M rows, D columns, P columns of a transposed tensor whose groups are padded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .formats import TILE, Quantized, decode, largest, tiles_in

# A float32 power of two under this is subnormal, which some units flush to zero.
_SMALLEST_EXPONENT = -126


def scale_of(amax: Tensor, limit: float, power_of_two: bool) -> Tensor:
    """The scale of tiles whose largest magnitudes are `amax`, float32 (see `quantize_tiles`).

    Args:
        amax: float32, of any shape.
        limit: the format's largest value.
    """
    if power_of_two:
        # Mantissas are in [1/2, 1): the quotient of the powers is enough, or half of what is.
        mantissa, exponent = torch.frexp(amax)
        limit_mantissa, limit_exponent = math.frexp(limit)
        exponent = exponent - limit_exponent + (mantissa > limit_mantissa).to(exponent.dtype)
        scale = torch.ldexp(torch.ones_like(amax), exponent.clamp(min=_SMALLEST_EXPONENT))
    else:
        scale = (amax / limit).clamp(min=2.0**_SMALLEST_EXPONENT)
    scale = torch.where(amax == 0, 1.0, scale)
    return torch.where(amax.isfinite(), scale, torch.nan)


def quantize_tiles(x: Tensor, *, dtype: torch.dtype, power_of_two: bool) -> Quantized:
    columns = x.shape[-1]
    x = _at_most_float32(x)
    padded = F.pad(x, (0, -columns % TILE)) if columns % TILE else x
    tiles = padded.unflatten(-1, (tiles_in(columns), TILE))
    scales = scale_of(_amax(tiles, (-1,)), largest(dtype), power_of_two)
    values = tiles.div(scales.unsqueeze(-1)).to(dtype).flatten(-2)
    return Quantized(values[..., :columns].contiguous(), scales)


def quantize_blocks(x: Tensor, *, dtype: torch.dtype, power_of_two: bool) -> Quantized:
    rows, columns = x.shape[-2:]
    padded = F.pad(_at_most_float32(x), (0, -columns % TILE, 0, -rows % TILE))
    blocks = padded.unflatten(-1, (tiles_in(columns), TILE))
    blocks = blocks.unflatten(-3, (tiles_in(rows), TILE))
    scales = scale_of(_amax(blocks, (-1, -3)), largest(dtype), power_of_two)
    values = blocks.div(scales[..., :, None, :, None]).to(dtype)
    values = values.flatten(-4, -3).flatten(-2, -1)
    return Quantized(values[..., :rows, :columns].contiguous(), scales)


def quantize_tensor(x: Tensor, *, dtype: torch.dtype, power_of_two: bool) -> Quantized:
    x = _at_most_float32(x)
    scales = scale_of(_amax(x, (-1, -2), keepdim=True), largest(dtype), power_of_two)
    return Quantized(x.div(scales).to(dtype).contiguous(), scales)


def quantize_columns(
    x_MD: Tensor, counts: Sequence[int] | None, *, dtype: torch.dtype, power_of_two: bool
) -> Quantized:
    padded_PD = _at_most_float32(pad_groups(x_MD, counts))
    tiles = padded_PD.unflatten(0, (len(padded_PD) // TILE, TILE))
    scales = scale_of(_amax(tiles, (1,)), largest(dtype), power_of_two)
    values_PD = tiles.div(scales.unsqueeze(1)).to(dtype).flatten(0, 1)
    # Only now, when they are bytes, are the numbers transposed: that is most of the time otherwise.
    values_DP = values_PD.view(torch.uint8).t().contiguous().view(dtype)
    return Quantized(values_DP, scales.t().contiguous())


def transpose_tiles(q: Quantized, counts: Sequence[int] | None, *, power_of_two: bool) -> Quantized:
    wide_MD = dequantize(q, torch.float32)
    return quantize_columns(wide_MD, counts, dtype=q.values.dtype, power_of_two=power_of_two)


def dequantize(q: Quantized, dtype: torch.dtype) -> Tensor:
    wide = decode(q.values)
    scales = q.scales.to(torch.float32)
    rows, columns = wide.shape[-2:] if wide.dim() > 1 else (1, wide.shape[-1])
    if wide.dim() > 1 and scales.shape[-2] not in (1, rows):
        scales = scales.repeat_interleave(TILE, dim=-2)[..., :rows, :]
    if scales.shape[-1] == 1:
        return wide.mul_(scales).to(dtype)
    whole = columns // TILE
    wide[..., : whole * TILE].unflatten(-1, (whole, TILE)).mul_(scales[..., :whole, None])
    wide[..., whole * TILE :].mul_(scales[..., whole:])  # a shorter last tile, or nothing
    return wide.to(dtype)


def pad_groups(x_MD: Tensor, counts: Sequence[int] | None) -> Tensor:
    """Each group of rows followed by zeros up to a multiple of 128 rows: [P, D]."""
    counts = [len(x_MD)] if counts is None else counts
    if all(n % TILE == 0 for n in counts):
        return x_MD
    padded = x_MD.new_zeros(sum(tiles_in(n) for n in counts) * TILE, x_MD.shape[1])
    source = target = 0
    for n in counts:
        padded[target : target + n] = x_MD[source : source + n]
        source, target = source + n, target + tiles_in(n) * TILE
    return padded


def _amax(x: Tensor, dims: tuple[int, ...], keepdim: bool = False) -> Tensor:
    """The largest magnitude, float32; NaN where there is one."""
    if not x.numel():  # no maximum of nothing
        return x.sum(dim=dims, keepdim=keepdim, dtype=torch.float32)
    if x.itemsize == 2:
        # Without the sign, patterns of bits are in the order of the numbers, NaN above infinity;
        # and whole numbers are compared much faster.
        patterns = x.view(torch.int16).bitwise_and(0x7FFF).amax(dim=dims, keepdim=keepdim)
        return patterns.view(x.dtype).float()
    highest, lowest = x.amax(dim=dims, keepdim=keepdim), x.amin(dim=dims, keepdim=keepdim)
    return torch.maximum(highest, -lowest)


def _at_most_float32(x: Tensor) -> Tensor:
    """Float64 is rounded to float32; narrower numbers stay, as what follows widens them exactly."""
    return x.float() if x.dtype == torch.float64 else x
