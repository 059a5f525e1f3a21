"""1x128 tiles in E4M3: exact against a scalar definition, and stable under repetition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from counterflow.fp8 import TILE, dequantize_tiles, quantize_tiles

# Every finite value of E4M3, from its definition: a sign, 4 bits of exponent with bias 7, 3 bits of
# mantissa, subnormals, no infinities, and one NaN of each sign.
MAGNITUDES = [m * 2.0**-9 for m in range(8)] + [
    (1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8) if (e, m) != (8, 7)
]
LARGEST, LEAST_EXPONENT = 448.0, -126
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def nearest(value: float) -> float:
    """The E4M3 value nearest to one of at most 448, ties to the even mantissa."""
    magnitude = abs(value)
    errors = [abs(m - magnitude) for m in MAGNITUDES]
    best = min(range(len(errors)), key=lambda i: (errors[i], i % 2))
    return math.copysign(MAGNITUDES[best], value)


def scale_of(tile: Sequence[float]) -> float:
    """The least power of two, from 2 ** -126 up, with max |x| <= 448 * scale."""
    amax = max(abs(x) for x in tile)
    if amax == 0:
        return 1.0
    mantissa, exponent = math.frexp(amax)  # amax = mantissa * 2 ** exponent, mantissa in [1/2, 1)
    # 448 = 0.875 * 2 ** 9
    return math.ldexp(1.0, max(exponent - 9 + (mantissa > 0.875), LEAST_EXPONENT))


def quantized(row: Sequence[float]) -> tuple[list[float], list[float]]:
    """Values and scales by the definition, one number after another."""
    values: list[float] = []
    scales: list[float] = []
    for start in range(0, len(row), TILE):
        tile = row[start : start + TILE]
        if not all(map(math.isfinite, tile)):
            scales.append(math.nan)
            values += [math.nan] * len(tile)
            continue
        scales.append(scale_of(tile))
        values += [nearest(x / scales[-1]) for x in tile]
    return values, scales


def same(found: Tensor, expected: Sequence[float]) -> bool:
    """Equal, with -0 unlike 0 and NaN like NaN."""
    numbers = found.float().reshape(-1).tolist()
    return len(numbers) == len(expected) and all(
        (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
        for a, b in zip(numbers, expected, strict=True)
    )


def check(row: Sequence[float]) -> None:
    values, scales = quantize_tiles(torch.tensor([row], dtype=torch.float32))
    expected_values, expected_scales = quantized(torch.tensor(row).tolist())
    assert values.dtype == torch.float8_e4m3fn
    assert scales.dtype == torch.float32
    assert same(scales, expected_scales)
    assert same(values, expected_values)


def neighbours(value: float) -> list[float]:
    """A float32 and those beside it."""
    centre = torch.tensor(value)
    beside = [torch.nextafter(centre, torch.tensor(end)) for end in (-math.inf, math.inf)]
    return [float(t) for t in (beside[0], centre, beside[1])]


def test_the_definition_knows_all_of_e4m3() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite = codes[codes.isfinite()].abs().unique()
    assert finite.tolist() == MAGNITUDES
    assert MAGNITUDES[-1] == LARGEST


@pytest.mark.parametrize("exponent", [-149, -140, -127, -126, -118, -30, -1, 0, 1, 9, 60, 119])
def test_amax_at_and_beside_a_power_of_two_and_448_gets_the_least_scale(exponent: int) -> None:
    for amax in (1.0, 1.75, 1.5, 1.875, 1 + 2**-23):  # 448 is 1.75 * 2 ** 8
        for value in neighbours(math.ldexp(amax, exponent)):
            if value:
                check([value])
                check([-value, value / 3, 0.0])


def test_the_interesting_values_of_a_tile() -> None:
    tiny, largest = 2.0**-149, torch.finfo(torch.float32).max
    check([0.0] * TILE)
    check([-0.0, 0.0])
    check([tiny, -tiny, 3 * tiny])  # subnormal in float32; the scale is no less than 2 ** -126
    check([2.0**-126 * 448, 2.0**-127, 2.0**-135, 2.0**-136])
    check([*MAGNITUDES, *(-m for m in MAGNITUDES[1:])][:TILE])
    check([448.0, 2.0**-9, 2.0**-10, 1.5 * 2.0**-10, 2.0**-11])  # subnormal in E4M3, and under
    check([448.0, *(m + 2.0**-10 for m in MAGNITUDES[:8])])  # halfway, to even
    check([448.0, *((a + b) / 2 for a, b in pairwise(MAGNITUDES))][:TILE])
    check([449.0, 1.0])
    check([largest, -largest, 1.0, 0.0])
    for strange in (math.inf, -math.inf, math.nan):
        check([1.0] * TILE + [strange] + [2.0] * (TILE - 1) + [3.0])


@pytest.mark.parametrize("columns", [1, 2, 127, 128, 129, 255, 256, 300])
def test_a_last_tile_may_be_shorter(columns: int) -> None:
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(columns))
    values, scales = quantize_tiles(x)
    assert values.shape == x.shape
    assert scales.shape == (3, -(-columns // TILE))
    for row, of_row, scale in zip(x.tolist(), values, scales, strict=True):
        expected_values, expected_scales = quantized(row)
        assert same(of_row, expected_values)
        assert same(scale, expected_scales)


@settings(max_examples=150, deadline=None)
@given(st.lists(FLOATS, min_size=1, max_size=8))
def test_any_float32s_are_as_the_definition_says(row: list[float]) -> None:
    check(row)


@settings(max_examples=150, deadline=None)
@given(st.lists(FLOATS, min_size=1, max_size=8))
def test_quantising_again_changes_nothing(row: list[float]) -> None:
    # What is nearer to the end of float32 may round up to a power of two beyond it.
    x = torch.tensor([row]).clamp(-(2.0**127), 2.0**127)
    values, scales = quantize_tiles(x)
    back = dequantize_tiles(values, scales)
    again, scales_again = quantize_tiles(back)
    assert torch.equal(dequantize_tiles(again, scales_again), back)
    if bool(back.any()):  # rounding may have taken the largest down to where half the scale does
        assert float(scales_again) in (float(scales), float(scales) / 2)


def test_the_scale_is_a_power_of_two_and_half_of_it_would_be_too_small() -> None:
    random = torch.Generator().manual_seed(4)
    x = torch.randn(400, TILE, generator=random) * torch.randn(400, 1, generator=random).exp2()
    _, scales = quantize_tiles(x * 2.0 ** torch.arange(-100, 100, 0.5)[:, None])
    mantissa, _ = torch.frexp(scales)
    assert bool((mantissa == 0.5).all())
    amax = (x * 2.0 ** torch.arange(-100, 100, 0.5)[:, None]).abs().amax(dim=1, keepdim=True)
    assert bool((amax <= LARGEST * scales).all())
    assert bool((amax > LARGEST * scales / 2).all())


def test_what_rounds_up_beyond_the_dtypes_range_comes_back_infinite() -> None:
    values, scales = quantize_tiles(torch.tensor([[63456.0, -63488.0, 1.0]], dtype=torch.float16))
    back = dequantize_tiles(values, scales, torch.float16)
    assert back.tolist()[0][:2] == [61440.0, -math.inf]
    assert dequantize_tiles(values, scales).tolist()[0][:2] == [61440.0, -65536.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_dtype_is_quantised_by_its_value_and_given_back(dtype: torch.dtype) -> None:
    x = torch.randn(4, 200, generator=torch.Generator().manual_seed(1)).to(dtype)
    values, scales = quantize_tiles(x)
    wide, wide_scales = quantize_tiles(x.float())
    assert torch.equal(values.view(torch.uint8), wide.view(torch.uint8))
    assert torch.equal(scales, wide_scales)
    back = dequantize_tiles(values, scales, dtype)
    assert back.dtype == dtype
    exact = values.double() * scales.double().repeat_interleave(TILE, dim=1)[:, :200]
    assert torch.equal(back, exact.to(dtype))


def test_the_error_is_at_most_a_sixteenth_of_a_value_or_of_the_least_step() -> None:
    x = torch.randn(50, 256, generator=torch.Generator().manual_seed(2))
    values, scales = quantize_tiles(x)
    wide = scales.repeat_interleave(TILE, dim=1)
    # Three bits of mantissa: half a unit in the last place is 1/16; subnormals step by 2 ** -9.
    bound = torch.maximum(x.abs() / 16, wide * 2.0**-10)
    assert bool(((dequantize_tiles(values, scales) - x).abs() <= bound).all())


def test_leading_dimensions_are_rows_and_may_be_empty() -> None:
    x = torch.randn(2, 3, 130, generator=torch.Generator().manual_seed(3))
    values, scales = quantize_tiles(x)
    flat, flat_scales = quantize_tiles(x.flatten(0, 1))
    assert values.shape == (2, 3, 130)
    assert scales.shape == (2, 3, 2)
    assert torch.equal(values.flatten(0, 1).view(torch.uint8), flat.view(torch.uint8))
    assert torch.equal(scales.flatten(0, 1), flat_scales)
    values, scales = quantize_tiles(torch.zeros(0, 130))
    assert (values.shape, scales.shape) == ((0, 130), (0, 2))
    assert dequantize_tiles(values, scales).shape == (0, 130)


def test_scales_of_another_shape_are_refused() -> None:
    values, scales = quantize_tiles(torch.ones(2, 130))
    with pytest.raises(ValueError, match=r"must be \[\.\.\., 2\], one a tile of 128, got \[2, 1\]"):
        dequantize_tiles(values, scales[:, :1])
