"""E4M3 with one scale for each 1x128 tile, the format of activations (arXiv 2412.19437, 3.3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 128


def quantize_tiles(x: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 values and float32 scales, powers of two, of 1x128 tiles along the last dimension.

    The scale is the least power of two that brings the tile's largest magnitude to at most 448, so
    dequantising is exact and quantising its result again changes nothing. A tile of zeros has scale
    1. A tile with an infinity or NaN becomes NaN throughout.

    Args:
        x: [..., D] floating; a last tile may be shorter than 128.

    Returns:
        values: [..., D] float8_e4m3fn.
        scales: [..., ceil(D / 128)] float32; x is about values * scales.
    """
    columns = x.shape[-1]
    padded = F.pad(x.float(), (0, -columns % TILE))
    tiles = padded.unflatten(-1, (-1, TILE))
    amax = tiles.abs().amax(dim=-1)
    # amax = mantissa * 2 ** exponent with mantissa in [1/2, 1), and 448 = 7/8 * 2 ** 9.
    mantissa, exponent = torch.frexp(amax)
    exponent = exponent - 9 + (mantissa > 0.875).to(exponent.dtype)
    # Below 2 ** -126 a float32 power of two is subnormal, which some units flush to zero.
    scales = torch.ldexp(torch.ones_like(amax), exponent.clamp(min=-126))
    scales = torch.where(amax == 0, 1.0, scales)
    scales = torch.where(amax.isfinite(), scales, torch.nan)
    values = (tiles / scales.unsqueeze(-1)).to(torch.float8_e4m3fn)
    return values.flatten(-2)[..., :columns].contiguous(), scales


def dequantize_tiles(values: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """values * scales, rounded once to `dtype`.

    What was rounded up on quantising may leave the range of `dtype` at its very end (float32 from
    about 3.3e38, float16 from 63488) and is an infinity then.

    Args:
        values: [..., D] float8_e4m3fn.
        scales: [..., ceil(D / 128)] float32.
        dtype: floating.

    Raises:
        ValueError: scales of another shape.
    """
    columns = values.shape[-1]
    if scales.shape != (*values.shape[:-1], -(-columns // TILE)):
        raise ValueError(
            f"scales of {list(values.shape)} values must be [..., {-(-columns // TILE)}], one a "
            f"tile of {TILE}, got {list(scales.shape)}"
        )
    wide = values.float()
    whole = columns // TILE
    wide[..., : whole * TILE].unflatten(-1, (whole, TILE)).mul_(scales[..., :whole, None])
    wide[..., whole * TILE :].mul_(scales[..., whole:])  # a shorter last tile, or nothing
    return wide.to(dtype)
