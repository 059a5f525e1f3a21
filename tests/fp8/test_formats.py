"""What codes stand for, which layouts of scales there are, and their storage in one byte."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from counterflow.fp8 import (
    E4M3,
    E5M2,
    Quantized,
    compact_scales,
    decode,
    dequantize,
    quantize_blocks,
    quantize_columns,
    quantize_tensor,
    quantize_tiles,
)
from counterflow.fp8.formats import largest
from tests import number_formats as scalar

FORMS = {E4M3: scalar.E4M3, E5M2: scalar.E5M2}
CODES = torch.arange(256, dtype=torch.uint8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, with -0 unlike 0 and NaN like NaN."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.nan_to_num(nan=0.125), b.nan_to_num(nan=0.125))
        and torch.equal(a.signbit() & ~a.isnan(), b.signbit() & ~b.isnan())
        and torch.equal(a.isnan(), b.isnan())
    )


@pytest.mark.parametrize("dtype", FORMS)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_every_code_is_decoded_as_defined_and_as_torch_does(
    dtype: torch.dtype, wide: torch.dtype
) -> None:
    form, values = FORMS[dtype], CODES.view(dtype)
    defined = torch.tensor([form.value(code) for code in range(256)], dtype=wide)
    assert same_bits(decode(values, wide), defined)
    assert same_bits(decode(values, wide), values.to(wide))
    assert largest(dtype) == form.largest


@pytest.mark.parametrize("dtype", FORMS)
@pytest.mark.parametrize("nan_codes", [True, False])
def test_views_are_decoded_like_what_is_contiguous(dtype: torch.dtype, nan_codes: bool) -> None:
    numbers = CODES.view(16, 16)
    if not nan_codes:
        numbers = numbers.masked_fill(numbers.view(dtype).float().isnan(), 1)
    values = numbers.contiguous().view(dtype)
    wide = torch.stack([values.view(torch.uint8)] * 3).view(dtype)
    for view in (values.t(), values[:, 3:9], values[::2, ::3], wide.permute(2, 0, 1), values[3, 5]):
        assert same_bits(decode(view), view.contiguous().to(torch.float32))
    before = values.view(torch.uint8).clone()
    decode(values)
    assert torch.equal(values.view(torch.uint8), before)


def test_decoding_nothing_gives_nothing() -> None:
    for dtype in FORMS:
        assert decode(torch.zeros(0, 3).to(dtype)).shape == (0, 3)


def test_the_largest_value_of_what_is_not_fp8_is_refused() -> None:
    with pytest.raises(ValueError, match=r"torch\.float16 is not an FP8 format; use float8_e4m3fn"):
        largest(torch.float16)


@pytest.mark.parametrize(
    ("values", "scales"),
    [
        ((300, 200), (300, 2)),
        ((300, 200), (3, 2)),
        ((300, 200), (1, 1)),
        ((4, 300, 200), (4, 3, 2)),
        ((4, 300, 200), (4, 300, 2)),
        ((300,), (3,)),
        ((0, 200), (0, 2)),
    ],
)
@pytest.mark.parametrize("stored", [torch.float32, torch.float8_e8m0fnu])
def test_tiles_blocks_and_one_scale_are_layouts(
    values: tuple[int, ...], scales: tuple[int, ...], stored: torch.dtype
) -> None:
    Quantized(torch.zeros(values).to(E4M3), torch.ones(scales).to(stored)).check()


@pytest.mark.parametrize(
    ("values", "scales"),
    [
        ((300, 200), (300, 1)),
        ((300, 200), (200, 3)),
        ((300, 200), (300, 200)),
        ((300, 200), (2,)),
        ((4, 300, 200), (300, 2)),
        ((4, 300, 200), (1, 3, 2)),
        ((300,), (1,)),
        ((300,), (1, 3)),
    ],
)
def test_scales_of_another_shape_are_refused(
    values: tuple[int, ...], scales: tuple[int, ...]
) -> None:
    q = Quantized(torch.zeros(values).to(E4M3), torch.ones(scales))
    with pytest.raises(ValueError, match=r"the left one has scales .* they must be \["):
        q.check("the left one")


def test_other_dtypes_are_refused() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"values of torch\.bfloat16; FP8 products take"):
        Quantized(x.bfloat16(), x[:, :1]).check()
    with pytest.raises(ValueError, match=r"scales of torch\.float64; they must be float32"):
        Quantized(x.to(E4M3), x[:, :1].double()).check()


def test_blocks_transpose_as_they_are_and_tiles_do_not() -> None:
    x = torch.randn(130, 300, generator=torch.Generator().manual_seed(0))
    blocks = quantize_blocks(x)
    assert torch.equal(dequantize(blocks.mT), dequantize(quantize_blocks(x.t())))
    one = quantize_tensor(x)
    assert torch.equal(dequantize(one.mT), dequantize(one).t())
    with pytest.raises(AssertionError, match="see transpose_tiles"):
        _ = quantize_tiles(x).mT


def test_bytes_are_those_of_values_and_scales() -> None:
    q = quantize_tiles(torch.ones(10, 300))
    assert q.nbytes() == 10 * 300 + 10 * 3 * 4
    assert compact_scales(q).nbytes() == 10 * 300 + 10 * 3


@pytest.mark.parametrize("quantise", [quantize_tiles, quantize_blocks, quantize_columns])
def test_power_of_two_scales_fit_one_byte_and_mean_the_same(quantise: Any) -> None:
    random = torch.Generator().manual_seed(1)
    x = torch.randn(256, 300, generator=random) * 2.0 ** torch.randint(
        -149, 128, (256, 1), generator=random
    )
    x[3, 5] = math.nan
    x[7], x[8] = 0, 2.0**-149
    q = quantise(x)
    stored = compact_scales(q)
    assert stored.scales.dtype == torch.float8_e8m0fnu
    assert stored.scales.shape == q.scales.shape
    assert same_bits(stored.scales.float(), q.scales)
    assert stored.values is q.values
    assert same_bits(dequantize(stored), dequantize(q))


@pytest.mark.parametrize("scale", [3.0, 0.0, -2.0, math.inf, 2.0**-130])
def test_scales_that_are_no_powers_of_two_do_not_fit_one_byte(scale: float) -> None:
    q = Quantized(torch.ones(1, 3).to(E4M3), torch.full((1, 1), scale))
    with pytest.raises(ValueError, match="quantise with power_of_two=True"):
        compact_scales(q)
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(2))
    with pytest.raises(ValueError, match="powers of two"):
        compact_scales(quantize_tiles(x, power_of_two=False))
