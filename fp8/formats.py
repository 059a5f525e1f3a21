"""Eight-bit numbers with scales: what a quantised tensor is, and exact decoding.

Shapes: R rows, C columns. Where a quantised tensor takes part in a product, the contraction runs
along C, its last dimension, as Hopper's FP8 units want it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

TILE = 128
E4M3 = torch.float8_e4m3fn
E5M2 = torch.float8_e5m2

# By format: its largest value; how far its exponent field has to move to be float32's or float64's.
_LARGEST = {E4M3: 448.0, E5M2: 57344.0}


class Quantized(NamedTuple):
    """A tensor in FP8: about values * scales. Unpacks as (values, scales).

    The shape of the scales tells what one of them covers, so that a tensor with another layout
    cannot be taken for it:

        [..., R, ceil(C / 128)]              a tile of 1x128
        [..., ceil(R / 128), ceil(C / 128)]  a block of 128x128
        [..., 1, 1]                          the whole matrix

    Where two of these coincide, as for R = 1, they mean the same.

    Attributes:
        values: [..., R, C] float8_e4m3fn or float8_e5m2. (Tiles may also have one dimension, [C].)
        scales: float32, or powers of two stored in float8_e8m0fnu.
    """

    values: Tensor
    scales: Tensor

    @property
    def mT(self) -> Quantized:  # noqa: N802  torch's name
        """The transpose of blocks or of a tensor with one scale; a view."""
        assert self.values.shape[-2] == 1 or self.scales.shape[-2] != self.values.shape[-2], (
            "tiles of 1x128 are not tiles of their transpose: see transpose_tiles"
        )
        return Quantized(self.values.mT, self.scales.mT)

    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + self.scales.nbytes

    def check(self, what: str = "the operand") -> None:
        """Raise ValueError, which names `what`, unless dtypes and the scales' shape are right."""
        values, scales = self
        if values.dtype not in _LARGEST:
            raise ValueError(
                f"{what} has values of {values.dtype}; FP8 products take float8_e4m3fn or "
                "float8_e5m2: quantise it with quantize_tiles or quantize_blocks"
            )
        if scales.dtype not in (torch.float32, torch.float8_e8m0fnu):
            raise ValueError(
                f"{what} has scales of {scales.dtype}; they must be float32, or powers of two in "
                "float8_e8m0fnu"
            )
        rows, columns = values.shape[-2:] if values.dim() > 1 else (1, values.shape[-1])
        wide, high = tiles_in(columns), tiles_in(rows)
        lead = values.shape[:-2]
        allowed = [(*lead, rows, wide), (*lead, high, wide), (*lead, 1, 1)]
        if values.dim() == 1:
            allowed = [(wide,)]
        if tuple(scales.shape) not in allowed:
            forms = " or ".join(str(list(shape)) for shape in dict.fromkeys(allowed))
            raise ValueError(
                f"{what} has scales {list(scales.shape)} for values {list(values.shape)}; they "
                f"must be {forms}: one for each tile of 1x{TILE}, for each block of {TILE}x{TILE}, "
                "or one in all"
            )


def tiles_in(size: int) -> int:
    """How many tiles of 128 cover `size`."""
    return -(-size // TILE)


def padded_rows(counts: Sequence[int]) -> int:
    """P: rows of groups that are each padded to a multiple of 128."""
    return sum(tiles_in(n) for n in counts) * TILE


def largest(dtype: torch.dtype) -> float:
    """The largest finite value of an FP8 format.

    Raises:
        ValueError: not one of them.
    """
    if dtype not in _LARGEST:
        raise ValueError(f"{dtype} is not an FP8 format; use float8_e4m3fn or float8_e5m2")
    return _LARGEST[dtype]


def decode(values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that E4M3 or E5M2 codes stand for, without scales; exact.

    Args:
        values: of an FP8 dtype.
        dtype: float32 or float64, into which every code fits.

    Raises:
        ValueError: values are not E4M3 or E5M2.
    """
    largest(values.dtype)  # refuses what is neither
    if values.is_cuda:
        return values.to(dtype)
    # torch converts one code after the other on CPUs; shifting whole tensors takes a fifth of that.
    if values.dtype == E5M2:  # these are the upper halves of float16 numbers
        return (
            values.view(torch.uint8)
            .to(torch.int16)
            .bitwise_left_shift_(8)
            .view(torch.float16)
            .to(dtype)
        )
    # Sign and the seven other bits move to where float32 has sign, exponent and mantissa; that
    # number's exponent is then short by the difference of the two biases, 120.
    wide = values.view(torch.int8).to(torch.int32)
    is_nan = (wide.bitwise_and(0x7F) == 0x7F) if _may_hold_nan(values) else None
    wide.bitwise_left_shift_(20).bitwise_and_(_SIGN_AND_CODE)
    found = wide.view(torch.float32).mul_(2.0**120)
    if is_nan is not None:
        found.masked_fill_(is_nan, torch.nan)
    return found.to(dtype)


_SIGN_AND_CODE = 0x87F00000 - (1 << 32)


def _may_hold_nan(values: Tensor) -> bool:
    """Whether any code is one of E4M3's two NaNs, 0x7F and 0xFF."""
    # Without the sign these are the largest, and a maximum is found faster than an equal one.
    magnitudes = values.view(torch.int8).bitwise_and(0x7F)
    return bool(magnitudes.numel()) and int(magnitudes.amax()) == 0x7F
