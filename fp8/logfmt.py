"""LogFMT-nBit: codes for communication whose steps are even in the logarithm.

Proposed in "Insights into DeepSeek-V3" (arXiv 2505.09343, section 3.2) for 8 bits and for 10; not
deployed there, because encoding takes too long beside the communication.

A tile of 1x128 spans from its least magnitude above zero, exp(min), to its largest, exp(max). An
n-bit code is a sign and a number K of n - 1 bits: zero is the code of all zeros, and K >= 1 is

    sign * exp(min + step * (K - 1)),   step = (max - min) / (2**(n - 1) - 2)

Magnitudes more than 2**32 under the largest would make the steps too coarse: min is at least
max - ln 2**32. Stored are exp(min), which unlike min is exact, and step.

Shapes: D columns; d = ceil(D / 128) tiles; B bytes of D codes (see `code_bytes`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .formats import TILE, tiles_in

BITS = (8, 10)
_RANGE = 2.0**32
_LARGEST_FLOAT32 = torch.finfo(torch.float32).max


class LogCode(NamedTuple):
    """A tensor in LogFMT.

    Attributes:
        codes: [..., B] uint8. Of 8 bits: a code a byte, the sign in the highest bit. Of 10: four
            codes in five bytes, as one number of 40 bits whose lowest byte and code come first;
            unused places at the end are zero.
        least: [..., d] float32, the magnitude of K = 1: exp(min). 0 for a tile of zeros; NaN for a
            tile that held an infinity or NaN, which is decoded as NaN throughout.
        steps: [..., d] float32, of the natural logarithm; 0 where there is one magnitude only; NaN
            where `least` is.
        bits: n, 8 or 10.
        columns: D.
    """

    codes: Tensor
    least: Tensor
    steps: Tensor
    bits: int
    columns: int


def code_bytes(columns: int, bits: int) -> int:
    """Bytes of the codes of a row, without `least` and `steps`.

    Raises:
        ValueError: bits is neither 8 nor 10.
    """
    _check_bits(bits)
    return columns if bits == 8 else 5 * -(-columns // 4)


def encode_logfmt(x: Tensor, bits: int) -> LogCode:
    """Each number's code is one whose decoded float32 is nearest to it, zero included.

    Nearness is that of the numbers and not of their logarithms, as the paper asks. Of two that are
    equally near, the smaller magnitude is taken. Magnitudes up to half of exp(min) become zero, and
    -0 becomes 0.

    Args:
        x: [..., D] floating; float64 is rounded to float32 first. A last tile may be shorter.
        bits: 8 or 10.

    Raises:
        ValueError: x is not floating or has no dimension; bits is neither 8 nor 10.
    """
    _check_bits(bits)
    if not x.is_floating_point() or x.dtype.itemsize == 1:
        raise ValueError(f"float32, bfloat16, float16 or float64 is encoded, got {x.dtype}")
    if not x.dim():
        raise ValueError("a single number has no tiles of 1x128; LogFMT encodes [..., D]")
    columns = x.shape[-1]
    padded = F.pad(x.float(), (0, -columns % TILE)) if columns % TILE else x.float()
    tiles = padded.unflatten(-1, (tiles_in(columns), TILE))
    magnitudes = tiles.abs()
    least, steps = _spans(magnitudes, bits)
    numbers = _nearest(magnitudes, least, steps, bits)
    negative = (tiles < 0) & (numbers > 0)
    codes = numbers.add_(negative.to(numbers.dtype), alpha=1 << (bits - 1)).flatten(-2)
    packed = _pack(codes[..., :columns], bits)
    return LogCode(packed, least, steps, bits, columns)


def decode_logfmt(code: LogCode, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers [..., D]: exp in float64, rounded to float32 and then to `dtype`.

    In float64, so that its last bit, in which libraries for exp differ, hardly ever reaches the
    float32. A tile's largest magnitude comes back to within 3e-6 of it (step is rounded), and at
    most as the largest float32; in `dtype` it may be an infinity.

    Raises:
        ValueError: dtypes or shapes are not those of `LogCode`.
    """
    _check(code)
    numbers = _unpack(code)
    columns, half = code.columns, 1 << (code.bits - 1)
    numbers = F.pad(numbers, (0, -columns % TILE)).unflatten(-1, (tiles_in(columns), TILE))
    found = _values(numbers.bitwise_and(half - 1), code.least, code.steps)
    found = torch.where(numbers >= half, -found, found)
    return found.flatten(-2)[..., :columns].to(dtype).contiguous()


def _spans(magnitudes: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """exp(min) and step of tiles [..., d, 128]."""
    largest = magnitudes.amax(dim=-1)
    least = torch.where(magnitudes == 0, torch.inf, magnitudes).amin(dim=-1)
    # A tile of zeros has no least one; NaN and infinity pass from the largest to both results.
    least = torch.where(largest == 0, 0.0, torch.maximum(least, largest / _RANGE))
    span = torch.where(largest == least, 1.0, largest.double() / least.double()).log()
    steps = span.div(2 ** (bits - 1) - 2).float()
    strange = ~largest.isfinite()
    return least.masked_fill(strange, torch.nan), steps.masked_fill(strange, torch.nan)


def _values(numbers: Tensor, least: Tensor, steps: Tensor) -> Tensor:
    """What K stands for: numbers [..., d, 128], int32 -> float32."""
    factor = steps.double().unsqueeze(-1).mul(numbers - 1).exp_()
    # The mask is multiplied, not selected, so that zeros of a NaN tile are NaN too.
    found = factor.mul_(least.double().unsqueeze(-1)).mul_(numbers != 0)
    return found.clamp_(max=_LARGEST_FLOAT32).float()


def _nearest(magnitudes: Tensor, least: Tensor, steps: Tensor, bits: int) -> Tensor:
    """The K, int32, whose value is nearest to each magnitude [..., d, 128]."""
    wide = magnitudes.double()
    last = 2 ** (bits - 1) - 1
    ratio = wide / torch.where(least == 0, 1.0, least.double()).unsqueeze(-1)
    above = ratio.log_() / torch.where(steps == 0, 1.0, steps.double()).unsqueeze(-1)
    # The logarithm finds two neighbours with the magnitude between them, or so near to one of them
    # that rounding of the logarithm does not matter; which of them is nearer is told by their
    # values. The logarithm of 0 is -inf, and NaN is any number: it is NaN decoded.
    lower = above.floor_().add_(1).nan_to_num_(nan=0.0).clamp_(0, last - 1).to(torch.int32)
    low, high = _values(lower, least, steps), _values(lower + 1, least, steps)
    return lower + (wide.mul_(2) > low.double() + high.double())


def _pack(codes: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return codes.to(torch.uint8)
    columns = codes.shape[-1]
    fours = F.pad(codes, (0, -columns % 4)).unflatten(-1, (-(-columns // 4), 4))
    a, b, c, d = fours.unbind(-1)
    parts = (a, (a >> 8) | (b << 2), (b >> 6) | (c << 4), (c >> 4) | (d << 6), d >> 2)
    return torch.stack([(part & 0xFF).to(torch.uint8) for part in parts], dim=-1).flatten(-2)


def _unpack(code: LogCode) -> Tensor:
    """The codes [..., D], int32."""
    wide = code.codes.to(torch.int32)
    if code.bits == 8:
        return wide
    p, q, r, s, t = wide.unflatten(-1, (-(-code.columns // 4), 5)).unbind(-1)
    parts = (p | (q << 8), (q >> 2) | (r << 6), (r >> 4) | (s << 4), (s >> 6) | (t << 2))
    found = torch.stack([part & 0x3FF for part in parts], dim=-1).flatten(-2)
    return found[..., : code.columns]


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"LogFMT has 8 or 10 bits here, not {bits}")


def _check(code: LogCode) -> None:
    width, num_tiles = code_bytes(code.columns, code.bits), tiles_in(code.columns)
    dtypes = code.codes.dtype, code.least.dtype, code.steps.dtype
    if dtypes != (torch.uint8, torch.float32, torch.float32):
        raise ValueError(
            "LogFMT codes are uint8 with float32 `least` and `steps`, got "
            f"{', '.join(map(str, dtypes))}"
        )
    lead = code.codes.shape[:-1]
    shapes = [code.codes.shape, code.least.shape, code.steps.shape]
    if shapes != [(*lead, width), (*lead, num_tiles), (*lead, num_tiles)]:
        raise ValueError(
            f"{code.columns} columns of LogFMT-{code.bits} are [..., {width}] bytes with "
            f"[..., {num_tiles}] `least` and `steps`, got {', '.join(str(list(s)) for s in shapes)}"
        )
