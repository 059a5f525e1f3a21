"""To FP8 and back, with the largest magnitude of each tile found as it is quantised.

DeepSeek-V3's recipe (arXiv 2412.19437, section 3.3.2): E4M3 everywhere, activations and gradients
in tiles of 1x128, weights in blocks of 128x128. In the weight gradient's product the contraction
runs along tokens, so its operands have tiles of 128x1: `quantize_columns`.

On an NVIDIA GPU of compute capability 8.9 or more, where Triton is installed, these run the kernels
of `kernels.quantize`, elsewhere `quantize_reference`; both give the same bits.

Shapes: M rows, D columns, P = sum over groups of their rows rounded up to a multiple of 128.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import quantize_reference as reference
from .formats import E4M3, Quantized, largest
from .kernels import kernels_for


def quantize_tiles(x: Tensor, *, dtype: torch.dtype = E4M3, power_of_two: bool = True) -> Quantized:
    """One scale for each tile of 1x128 along the last dimension, a last tile may be shorter.

    The scale is the least power of two that brings the tile's largest magnitude, amax, to at most
    the format's largest value; then dequantising is exact and quantising its result again gives
    the same numbers. Or it is amax / largest, rounded to float32. It is never under 2**-126, and 1
    for a tile of zeros. A value is x / scale in float32, rounded to the nearest, ties to even.
    A tile that holds an infinity or NaN has scale NaN and becomes NaN throughout.

    Args:
        x: [..., D] floating; float64 is rounded to float32 first.
        dtype: float8_e4m3fn or float8_e5m2.
        power_of_two: which of the two scales.

    Returns:
        values [..., D], scales [..., ceil(D / 128)] float32.

    Raises:
        ValueError: x is not floating, has no dimension, or dtype is no FP8 format.
    """
    _check(x, 1, dtype)
    return _home(x).quantize_tiles(x, dtype=dtype, power_of_two=power_of_two)


def quantize_columns(
    x_MD: Tensor,
    counts: Sequence[int] | None = None,
    *,
    dtype: torch.dtype = E4M3,
    power_of_two: bool = True,
) -> Quantized:
    """One scale for each tile of 128x1, that is of 128 rows, stored as the transpose.

    Args:
        x_MD: [M, D] floating.
        counts: rows of consecutive groups (such as experts), which add up to M; None is one group.
            Each group is followed by zeros up to a multiple of 128, so that no tile has rows of two
            groups.
        dtype, power_of_two: as of `quantize_tiles`.

    Returns:
        values [D, P], scales [D, P / 128] float32.

    Raises:
        ValueError: as of `quantize_tiles`; x is not a matrix; counts do not add up to M, or one is
            negative.
    """
    _check(x_MD, 2, dtype, exact=True)
    _check_counts(counts, len(x_MD))
    return _home(x_MD).quantize_columns(x_MD, counts, dtype=dtype, power_of_two=power_of_two)


def quantize_both(
    x_MD: Tensor,
    counts: Sequence[int] | None = None,
    *,
    dtype: torch.dtype = E4M3,
    power_of_two: bool = True,
) -> tuple[Quantized, Quantized]:
    """`quantize_tiles` and `quantize_columns` of the same matrix; on a GPU, from one reading."""
    _check(x_MD, 2, dtype, exact=True)
    _check_counts(counts, len(x_MD))
    home = _home(x_MD)
    if home is not reference:
        return home.quantize_both(x_MD, counts, dtype=dtype, power_of_two=power_of_two)
    return (
        reference.quantize_tiles(x_MD, dtype=dtype, power_of_two=power_of_two),
        reference.quantize_columns(x_MD, counts, dtype=dtype, power_of_two=power_of_two),
    )


def quantize_blocks(
    x: Tensor, *, dtype: torch.dtype = E4M3, power_of_two: bool = True
) -> Quantized:
    """One scale for each block of 128x128 of the last two dimensions, the format of weights.

    Args:
        x: [..., R, C] floating; blocks at the lower and right edge may be smaller.
        dtype, power_of_two: as of `quantize_tiles`.

    Returns:
        values [..., R, C], scales [..., ceil(R / 128), ceil(C / 128)] float32.

    Raises:
        ValueError: as of `quantize_tiles`, or fewer than two dimensions.
    """
    _check(x, 2, dtype)
    return _home(x).quantize_blocks(x, dtype=dtype, power_of_two=power_of_two)


def quantize_tensor(
    x: Tensor, *, dtype: torch.dtype = E4M3, power_of_two: bool = True
) -> Quantized:
    """One scale for each matrix: what fine-grained scaling is compared with.

    Args:
        x: [..., R, C] floating.
        dtype, power_of_two: as of `quantize_tiles`.

    Returns:
        values [..., R, C], scales [..., 1, 1] float32.

    Raises:
        ValueError: as of `quantize_blocks`.
    """
    _check(x, 2, dtype)
    return reference.quantize_tensor(x, dtype=dtype, power_of_two=power_of_two)


def dequantize(q: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """values * scales, rounded once to `dtype`; for any of the three layouts of scales.

    What was rounded up on quantising may leave the range of `dtype` at its very end (float32 from
    about 3.3e38, float16 from 63488) and is an infinity then.

    Raises:
        ValueError: the scales have another layout.
    """
    q.check("what is to be dequantised")
    return reference.dequantize(q, dtype)


def transpose_tiles(
    q: Quantized, counts: Sequence[int] | None = None, *, power_of_two: bool = True
) -> Quantized:
    """Stored tiles of 1x128 as tiles of 128x1, stored transposed: what a weight gradient needs.

    Where both scales are powers of two, a number that stays in the normal range of its new tile's
    scale is not rounded a second time: in E4M3 at least 2**-6 of the scale, which all reach that
    are 2**-13 of the new tile's largest or more; in E5M2 2**-14 of the scale, and 2**-29 of the
    largest. A smaller one takes the subnormal nearest to it.

    Args:
        q: tiles, values [M, D].
        counts: as of `quantize_columns`.
        power_of_two: the new scales.

    Returns:
        values [D, P] of the same format, scales [D, P / 128] float32.

    Raises:
        ValueError: q is not a matrix in tiles of 1x128; counts as of `quantize_columns`.
    """
    q.check("what is to be transposed")
    if q.values.dim() != 2 or len(q.scales) != len(q.values):
        raise ValueError(
            f"only a matrix in tiles of 1x128 is transposed so, got values {list(q.values.shape)} "
            f"with scales {list(q.scales.shape)}; blocks transpose as they are: q.mT"
        )
    _check_counts(counts, len(q.values))
    return _home(q.values).transpose_tiles(q, counts, power_of_two=power_of_two)


def compact_scales(q: Quantized) -> Quantized:
    """The same with scales in one byte each (E8M0), for storage.

    Raises:
        ValueError: a scale is not a power of two.
    """
    scales = q.scales.to(torch.float8_e8m0fnu)
    if not torch.equal(scales.float().nan_to_num(), q.scales.nan_to_num()):
        raise ValueError(
            "E8M0 holds powers of two from 2**-127 to 2**127 alone; quantise with power_of_two=True"
        )
    return Quantized(q.values, scales)


def _home(x: Tensor) -> ModuleType:
    return kernels_for(x) or reference


def _check(x: Tensor, dims: int, dtype: torch.dtype, *, exact: bool = False) -> None:
    largest(dtype)
    if not x.is_floating_point() or x.dtype.itemsize == 1:
        raise ValueError(f"float32, bfloat16, float16 or float64 is quantised, got {x.dtype}")
    if x.dim() < dims or (exact and x.dim() != dims):
        many = "a matrix" if exact else f"{dims} dimension{'s' if dims > 1 else ''} or more"
        raise ValueError(f"{many} can be quantised so, got a tensor of shape {list(x.shape)}")


def _check_counts(counts: Sequence[int] | None, rows: int) -> None:
    if counts is None:
        return
    if min(counts, default=0) < 0:
        raise ValueError(f"counts {list(counts)} must be numbers of rows, none of them negative")
    if sum(counts) != rows:
        raise ValueError(f"counts {list(counts)} do not add up to the {rows} rows")
