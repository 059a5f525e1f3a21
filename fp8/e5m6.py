"""E5M6: numbers of twelve bits, packed two in three bytes.

DeepSeek-V3 keeps the input of the linear layer after attention so (arXiv 2412.19437, section
3.3.3): attention's own backward pass needs it too, and would suffer from E4M3's coarser steps.

The format is IEEE's scheme with a sign, 5 bits of exponent with bias 15 and 6 of mantissa, that is
float16 short of its last four bits: the largest value is 65024, the least normal one 2**-14, the
least subnormal one 2**-20; an exponent of all ones is an infinity or NaN.

Shapes: D columns; d = ceil(D / 128) tiles; B = 3 * ceil(D / 2) bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .formats import TILE, tiles_in
from .quantize_reference import scale_of

LARGEST_E5M6 = 65024.0

_LEAST_NORMAL = 2.0**-14
_EXPONENT = 0x7F800000  # where it lies in a float32
_NAN = 0x7E0


class Packed(NamedTuple):
    """A tensor in E5M6: about numbers * scales, a scale for each tile of 1x128.

    Attributes:
        values: [..., B] uint8. Each three bytes are 24 bits, the lowest byte first, of which the
            lower twelve are the number in the even column and the upper twelve that in the odd one;
            the last twelve mean nothing where D is odd.
        scales: [..., d] float32, powers of two.
        columns: D.
    """

    values: Tensor
    scales: Tensor
    columns: int

    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + self.scales.nbytes


def pack_e5m6(x: Tensor) -> Packed:
    """A tensor in E5M6, rounded to the nearest, ties to even.

    The scale of a tile is the least power of two that brings its largest magnitude to at most
    65024, and so no infinity is ever stored; it is never under 2**-126, and 1 for a tile of zeros.
    A tile that holds an infinity or NaN has scale NaN and becomes NaN throughout.

    Args:
        x: [..., D] floating; float64 is rounded to float32 first. A last tile may be shorter.

    Raises:
        ValueError: x is not floating, or has no dimension.
    """
    if not x.is_floating_point() or x.dtype.itemsize == 1:
        raise ValueError(
            f"float32, bfloat16, float16 or float64 is packed as E5M6, got {x.dtype}; dequantise "
            "what is in FP8 first"
        )
    if not x.dim():
        raise ValueError("a single number has no tiles of 1x128; E5M6 packs [..., D]")
    columns = x.shape[-1]
    num_tiles = tiles_in(columns)
    padded = F.pad(x.float(), (0, -columns % TILE)) if columns % TILE else x.float()
    tiles = padded.unflatten(-1, (num_tiles, TILE))
    scales = scale_of(tiles.abs().amax(dim=-1), LARGEST_E5M6, power_of_two=True)
    codes = _codes(tiles / scales.unsqueeze(-1))
    codes = codes.masked_fill_(scales.isnan().unsqueeze(-1), _NAN).flatten(-2)
    values = _pack(codes)[..., : _bytes(columns)].contiguous()
    return Packed(values, scales, columns)


def unpack_e5m6(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers times their scales: [..., D], rounded once to `dtype`; float32 is exact.

    What was rounded up on packing may leave the range of `dtype` at its very end and is an infinity
    then.

    Raises:
        ValueError: dtypes or shapes are not those of `Packed`.
    """
    _check(packed)
    values, scales, columns = packed
    low, middle, high = values.to(torch.int16).unflatten(-1, (_bytes(columns) // 3, 3)).unbind(-1)
    # A code and four zeros are a float16; what shifting takes above its 16 bits is cut off.
    even = middle.bitwise_left_shift(12).bitwise_or_(low.bitwise_left_shift(4))
    odd = high.bitwise_left_shift(8).bitwise_or_(middle.bitwise_and(0xF0))
    halves = torch.stack((even, odd), dim=-1).flatten(-2).view(torch.float16)
    wide = halves[..., :columns].float()
    whole = columns // TILE
    wide[..., : whole * TILE].unflatten(-1, (whole, TILE)).mul_(scales[..., :whole, None])
    wide[..., whole * TILE :].mul_(scales[..., whole:])  # a shorter last tile, or nothing
    return wide.to(dtype).contiguous()


def _codes(x: Tensor) -> Tensor:
    """The codes of float32 numbers of at most 65024: int32 in [0, 2**12); of NaN any of them."""
    magnitude = x.abs()
    # 2**e, of the number or at least of the least normal one, as float32's bits.
    power = magnitude.clamp(min=_LEAST_NORMAL).view(torch.int32).bitwise_and_(_EXPONENT)
    # Beside 2**(e + 17) float32 numbers are as far apart as codes are beside 2**e: the sum is
    # rounded as wanted, to the nearest and ties to even, and its last bits count in such steps.
    found = magnitude.add_(power.add(17 << 23).view(torch.float32)).view(torch.int32)
    found.sub_(power).sub_(17 << 23)
    # e = -14 counts from 0, as subnormals do. A number that is rounded up to 2**(e + 1) has 128
    # steps, which is that number's code too.
    found.add_(power.bitwise_right_shift_(17)).sub_((127 - 14) << 6)
    sign = x.view(torch.int32).bitwise_right_shift(20).bitwise_and_(0x800)
    return found.bitwise_or_(sign)


def _pack(codes: Tensor) -> Tensor:
    """Codes [..., n], n a multiple of 8, as bytes [..., 3 * n / 2]."""
    # As int16 two neighbours are one int32 (the lower half first, as on all machines of ours); it
    # becomes 24 bits, and four of those become three int32: bytes are not handled one by one.
    both = codes.to(torch.int16).flatten().view(torch.int32)
    both = both.bitwise_right_shift(4).bitwise_and_(0xFFF000).bitwise_or_(both.bitwise_and(0xFFF))
    a, b, c, d = both.unflatten(-1, (both.shape[-1] // 4, 4)).unbind(-1)
    words = (a | (b << 24), (b >> 8) | (c << 16), (c >> 16) | (d << 8))
    packed = torch.stack(words, dim=-1).flatten().view(torch.uint8)
    return packed.view(*codes.shape[:-1], 3 * codes.shape[-1] // 2)


def _bytes(columns: int) -> int:
    return 3 * -(-columns // 2)


def _check(packed: Packed) -> None:
    values, scales, columns = packed
    expected = _bytes(columns), tiles_in(columns)
    if values.dtype != torch.uint8 or scales.dtype != torch.float32:
        raise ValueError(
            f"packed E5M6 is uint8 with float32 scales, got {values.dtype} and {scales.dtype}"
        )
    lead = values.shape[:-1]
    if values.shape != (*lead, expected[0]) or scales.shape != (*lead, expected[1]):
        raise ValueError(
            f"{columns} columns of packed E5M6 are [..., {expected[0]}] bytes with "
            f"[..., {expected[1]}] scales, got {list(values.shape)} and {list(scales.shape)}"
        )
