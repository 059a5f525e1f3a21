"""Quantisers: bit for bit the scalar definition, and what dequantising and transposing keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from counterflow.fp8 import (
    E4M3,
    E5M2,
    TILE,
    Quantized,
    dequantize,
    quantize_blocks,
    quantize_both,
    quantize_columns,
    quantize_tensor,
    quantize_tiles,
    transpose_tiles,
)
from tests import number_formats as scalar

FORMS = {E4M3: scalar.E4M3, E5M2: scalar.E5M2}
KINDS = [(dtype, power_of_two) for dtype in FORMS for power_of_two in (True, False)]
both_kinds = pytest.mark.parametrize(("dtype", "power_of_two"), KINDS)
INPUTS = [torch.bfloat16, torch.float16, torch.float32]
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
SIZES = [1, 3, 127, 128, 129, 300]

Group = list[tuple[int, int]]  # the places that share a scale


def codes_of(values: Tensor) -> list[list[int]]:
    """Codes of [R, C], all NaNs as one."""
    codes = values.view(torch.uint8).int()
    return codes.masked_fill(values.float().isnan(), scalar.NAN_CODE).tolist()


def same(found: Tensor, expected: Any) -> bool:
    """Equal floats, NaN like NaN."""
    wanted = torch.tensor(expected, dtype=torch.float32).reshape(found.shape)
    return torch.equal(found.nan_to_num(nan=-1.0), wanted.nan_to_num(nan=-1.0))


def holds(
    x: Tensor, q: Quantized, groups: Sequence[Group], dtype: torch.dtype, power_of_two: bool
) -> bool:
    """Whether q is x by the definition, scales in the order of the groups."""
    rows = x.float().tolist()
    codes, scales = [[0] * x.shape[1] for _ in rows], []
    for group in groups:
        numbers = [rows[r][c] for r, c in group]
        found, scale = scalar.quantized(numbers, FORMS[dtype], power_of_two)
        scales.append(scale)
        for (r, c), code in zip(group, found, strict=True):
            codes[r][c] = code
    assert q.values.dtype == dtype
    assert q.values.is_contiguous()
    assert q.scales.dtype == torch.float32
    assert q.scales.is_contiguous()
    return q.values.shape == x.shape and codes_of(q.values) == codes and same(q.scales, scales)


def spans(size: int) -> list[range]:
    return [range(a, min(a + TILE, size)) for a in range(0, size, TILE)]


def tiles(x: Tensor) -> list[Group]:
    return [[(r, c) for c in span] for r in range(x.shape[0]) for span in spans(x.shape[1])]


def blocks(x: Tensor) -> list[Group]:
    rows, columns = x.shape
    return [[(r, c) for r in a for c in b] for a in spans(rows) for b in spans(columns)]


def padded(x: Tensor, counts: Sequence[int]) -> Tensor:
    """Groups of rows, each followed by zeros, as the definition of quantize_columns has it."""
    rows: list[Tensor] = []
    for a, b in pairwise([0, *accumulate(counts)]):
        rows += [*x[a:b]] + [x.new_zeros(x.shape[1])] * (-(b - a) % TILE)
    return torch.stack(rows) if rows else x[:0]


def numbers(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of many magnitudes, with zeros, -0 and sometimes what is not finite."""
    random = torch.Generator().manual_seed(seed)
    x = (
        torch.randn(rows, columns, generator=random)
        * torch.randn(rows, columns, generator=random).mul(3).exp2()
    )
    x = torch.where(torch.rand(x.shape, generator=random) < 0.1, x * 0, x)
    if seed % 4 == 0 and x.numel():
        x.view(-1)[seed % x.numel()] = (math.nan, math.inf, -math.inf)[seed // 4 % 3]
    return x.to(dtype)


# ---- rounding and scales ----


@pytest.mark.parametrize("dtype", FORMS)
@pytest.mark.parametrize("sign", [1, -1])
def test_each_boundary_between_codes_rounds_as_defined(dtype: torch.dtype, sign: int) -> None:
    form = FORMS[dtype]
    interesting = scalar.boundaries(form)
    interesting += [0.0, 2.0**-149, 2.0**-30, 2.0**-126]
    rows = [interesting[i : i + TILE - 1] for i in range(0, len(interesting), TILE - 1)]
    # The largest value in front makes the scale 1.
    x = sign * torch.tensor([[float(form.largest), *r] + [0.0] * (127 - len(r)) for r in rows])
    q = quantize_tiles(x, dtype=dtype)
    assert bool((q.scales == 1).all())
    assert holds(x, q, tiles(x), dtype, True)


@both_kinds
@pytest.mark.parametrize(
    "exponent", [-149, -140, -127, -126, -118, -112, -110, -30, -1, 0, 8, 15, 60, 126]
)
def test_amax_at_and_beside_the_largest_and_powers_of_two_gets_the_defined_scale(
    dtype: torch.dtype, power_of_two: bool, exponent: int
) -> None:
    # 448 is 1.75 * 2 ** 8, and 57344 is 1.75 * 2 ** 15.
    amax = [math.ldexp(m, exponent) for m in (1.0, 1.5, 1.75, 1.875, 1 + 2**-23)]
    amax = torch.tensor([float(torch.tensor(a)) for a in amax if a]).tolist()
    near = [x for a in amax if a for x in (a, *scalar.beside(a)) if x > 0]
    x = torch.tensor([[a, -a / 3, 0.0] for a in near])
    q = quantize_tiles(x, dtype=dtype, power_of_two=power_of_two)
    assert holds(x, q, tiles(x), dtype, power_of_two)


@both_kinds
def test_zeros_subnormals_the_largest_and_what_is_not_finite(
    dtype: torch.dtype, power_of_two: bool
) -> None:
    tiny, largest = 2.0**-149, torch.finfo(torch.float32).max
    rows = [
        [0.0] * TILE,
        [-0.0, 0.0],
        [tiny, -tiny, 3 * tiny],  # subnormal in float32; the scale is no less than 2 ** -126
        [2.0**-126 * 448, 2.0**-127, 2.0**-135, 2.0**-136],
        [largest, -largest, 1.0, 0.0, -1e-30],
        *([1.0] * TILE + [strange] + [2.0] * 127 + [3.0] for strange in (math.inf, math.nan)),
        [-math.inf, 1.0],
    ]
    for row in rows:
        x = torch.tensor([row])
        q = quantize_tiles(x, dtype=dtype, power_of_two=power_of_two)
        assert holds(x, q, tiles(x), dtype, power_of_two)


def test_a_power_of_two_scale_is_the_least_that_is_enough() -> None:
    random = torch.Generator().manual_seed(4)
    x = torch.randn(400, TILE, generator=random) * 2.0 ** torch.arange(-100, 100, 0.5)[:, None]
    scales = quantize_tiles(x).scales
    mantissa, _ = torch.frexp(scales)
    amax = x.abs().amax(dim=1, keepdim=True)
    assert bool((mantissa == 0.5).all())
    assert bool((amax <= 448 * scales).all())
    assert bool((amax > 224 * scales).all())


# ---- layouts, against the definition ----


@settings(max_examples=60, deadline=None)
@given(st.lists(FLOATS, min_size=1, max_size=8), st.sampled_from(KINDS), st.sampled_from(INPUTS))
def test_any_numbers_in_a_tile_are_as_defined(
    row: list[float], kind: tuple[torch.dtype, bool], given_as: torch.dtype
) -> None:
    x = torch.tensor([row]).to(given_as)
    q = quantize_tiles(x, dtype=kind[0], power_of_two=kind[1])
    assert holds(x, q, tiles(x), *kind)


shapes = st.tuples(st.sampled_from([1, 2, 5]), st.sampled_from(SIZES))
common = given(
    shape=shapes,
    seed=st.integers(0, 999),
    kind=st.sampled_from(KINDS),
    given_as=st.sampled_from(INPUTS),
    turn=st.booleans(),
)


@settings(max_examples=25, deadline=None)
@common
def test_tiles_of_any_shape_are_as_defined(
    shape: tuple[int, int], seed: int, kind: Any, given_as: torch.dtype, turn: bool
) -> None:
    x = numbers(*shape, seed, given_as)
    x = x.t().contiguous().t() if turn else x
    q = quantize_tiles(x, dtype=kind[0], power_of_two=kind[1])
    assert holds(x, q, tiles(x), *kind)


@settings(max_examples=25, deadline=None)
@common
def test_blocks_of_any_shape_are_as_defined(
    shape: tuple[int, int], seed: int, kind: Any, given_as: torch.dtype, turn: bool
) -> None:
    x = numbers(*shape, seed, given_as)
    x = x.t() if turn else x
    q = quantize_blocks(x, dtype=kind[0], power_of_two=kind[1])
    assert holds(x, q, blocks(x), *kind)


@settings(max_examples=15, deadline=None)
@common
def test_one_scale_for_a_tensor_is_as_defined(
    shape: tuple[int, int], seed: int, kind: Any, given_as: torch.dtype, turn: bool
) -> None:
    x = numbers(*shape, seed, given_as)
    x = x.t() if turn else x
    q = quantize_tensor(x, dtype=kind[0], power_of_two=kind[1])
    assert q.scales.shape == (1, 1)
    everything = [[(r, c) for r in range(x.shape[0]) for c in range(x.shape[1])]]
    assert holds(x, q, everything, *kind)


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.sampled_from([0, 0, 1, 2, 127, 128, 129, 200]), max_size=4),
    columns=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 999),
    kind=st.sampled_from(KINDS),
    given_as=st.sampled_from(INPUTS),
)
def test_columns_of_groups_are_padded_with_zeros_and_as_defined(
    counts: list[int], columns: int, seed: int, kind: Any, given_as: torch.dtype
) -> None:
    x = numbers(sum(counts), columns, seed, given_as)
    wide = padded(x, counts).t()
    q = quantize_columns(x, counts, dtype=kind[0], power_of_two=kind[1])
    assert holds(wide, q, tiles(wide), *kind)
    assert wide.shape[1] == sum(-(-n // TILE) * TILE for n in counts)


@both_kinds
def test_quantising_both_ways_is_quantising_each_way(
    dtype: torch.dtype, power_of_two: bool
) -> None:
    x, counts = numbers(300, 130, 1), (0, 100, 128, 0, 72)
    options: dict[str, Any] = {"dtype": dtype, "power_of_two": power_of_two}
    across, along = quantize_both(x, counts, **options)
    assert equal(across, quantize_tiles(x, **options))
    assert equal(along, quantize_columns(x, counts, **options))
    assert equal(quantize_both(x, **options)[1], quantize_columns(x, [300], **options))


def equal(a: Quantized, b: Quantized) -> bool:
    """The same codes and scales."""
    return torch.equal(a.values.view(torch.uint8), b.values.view(torch.uint8)) and torch.equal(
        a.scales.nan_to_num(nan=-1.0), b.scales.nan_to_num(nan=-1.0)
    )


def test_leading_dimensions_are_rows_and_matrices() -> None:
    x = numbers(6, 300, 5).view(2, 3, 300)
    q = quantize_tiles(x)
    assert equal(
        Quantized(q.values.flatten(0, 1), q.scales.flatten(0, 1)), quantize_tiles(x.flatten(0, 1))
    )
    one = quantize_tiles(x[0, 0])
    assert (one.values.shape, one.scales.shape) == ((300,), (3,))
    assert equal(one, Quantized(q.values[0, 0], q.scales[0, 0]))
    for quantise in (quantize_blocks, quantize_tensor):
        q = quantise(x)
        for i in range(2):
            assert equal(Quantized(q.values[i], q.scales[i]), quantise(x[i]))


@pytest.mark.parametrize("shape", [(0, 130), (130, 0), (0, 0)])
def test_nothing_is_quantised_to_nothing(shape: tuple[int, int]) -> None:
    x, (rows, columns) = torch.zeros(shape), (-(-shape[0] // TILE), -(-shape[1] // TILE))
    found: list[tuple[Quantized, tuple[int, int], tuple[int, int]]] = [
        (quantize_tiles(x), shape, (shape[0], columns)),
        (quantize_blocks(x), shape, (rows, columns)),
        (quantize_tensor(x), shape, (1, 1)),
        (quantize_columns(x), (shape[1], rows * TILE), (shape[1], rows)),
    ]
    for q, values, scales in found:
        assert (q.values.shape, q.scales.shape) == (values, scales)
        assert dequantize(q).shape == values


def test_float64_is_rounded_to_float32_first() -> None:
    # Halfway between two codes but for what float32 cannot hold: rounded twice, to even.
    x = torch.tensor([[448.0, 17.0 + 2**-40]], dtype=torch.float64)
    assert dequantize(quantize_tiles(x)).tolist() == [[448.0, 16.0]]
    for quantise in (quantize_blocks, quantize_tensor, quantize_columns):
        assert equal(quantise(x), quantise(x.float()))


# ---- back again ----


QUANTISERS: list[Callable[..., Quantized]] = [quantize_tiles, quantize_blocks, quantize_tensor]


@both_kinds
@pytest.mark.parametrize("back", [*INPUTS, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 128), (130, 300), (2, 129, 127)])
def test_dequantising_is_the_product_rounded_once(
    shape: tuple[int, ...], back: torch.dtype, dtype: torch.dtype, power_of_two: bool
) -> None:
    x = numbers(math.prod(shape[:-1]), shape[-1], 5).reshape(shape)
    for quantise in QUANTISERS:
        q = quantise(x, dtype=dtype, power_of_two=power_of_two)
        wide = q.scales
        if wide.shape[-1] > 1:
            wide = wide.repeat_interleave(TILE, dim=-1)[..., : shape[-1]]
        if wide.shape[-2] not in (1, shape[-2]):
            wide = wide.repeat_interleave(TILE, dim=-2)[..., : shape[-2], :]
        exact = q.values.double() * wide.double()  # 4 and 24 bits: float64 holds the product
        found = dequantize(q, back)
        assert found.dtype == back
        # Of a power of two float32 holds it as well; else it is rounded to float32 on the way.
        assert torch.equal(found, (exact if power_of_two else exact.float()).to(back))


def test_dequantising_a_transposed_view_is_the_transpose() -> None:
    q = quantize_blocks(numbers(130, 300, 2))
    assert torch.equal(dequantize(q.mT), dequantize(q).mT)


@settings(max_examples=100, deadline=None)
@given(st.lists(FLOATS, min_size=1, max_size=8), st.sampled_from([E4M3, E5M2]))
def test_quantising_again_changes_no_number(row: list[float], dtype: torch.dtype) -> None:
    # What is nearer to the end of float32 may round up to a power of two beyond it.
    x = torch.tensor([row]).clamp(-(2.0**127), 2.0**127)
    q = quantize_tiles(x, dtype=dtype)
    back = dequantize(q)
    again = quantize_tiles(back, dtype=dtype)
    assert torch.equal(dequantize(again), back)
    if bool(back.any()):  # rounding may have taken the largest down to where half the scale does
        assert float(again.scales) in (float(q.scales), float(q.scales) / 2)


def test_what_rounds_up_beyond_the_dtypes_range_comes_back_infinite() -> None:
    q = quantize_tiles(torch.tensor([[63456.0, -63488.0, 1.0]], dtype=torch.float16))
    assert dequantize(q, torch.float16).tolist()[0][:2] == [61440.0, -math.inf]
    assert dequantize(q).tolist()[0][:2] == [61440.0, -65536.0]
    assert dequantize(quantize_tiles(torch.tensor([3.4e38]))).tolist() == [math.inf]


@pytest.mark.parametrize(("dtype", "digits", "least"), [(E4M3, 3, -9), (E5M2, 2, -16)])
def test_the_error_is_at_most_half_a_step(dtype: torch.dtype, digits: int, least: int) -> None:
    x = torch.randn(50, 256, generator=torch.Generator().manual_seed(2))
    q = quantize_tiles(x, dtype=dtype)
    wide = q.scales.repeat_interleave(TILE, dim=1)
    bound = torch.maximum(x.abs() * 2.0 ** -(digits + 1), wide * 2.0 ** (least - 1))
    assert bool(((dequantize(q) - x).abs() <= bound).all())


# ---- 1x128 to 128x1 ----


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.sampled_from([0, 1, 127, 128, 129, 200]), max_size=3),
    columns=st.sampled_from([1, 127, 128, 130]),
    seed=st.integers(0, 999),
    kind=st.sampled_from(KINDS),
)
def test_transposing_tiles_is_quantising_what_they_stand_for(
    counts: list[int], columns: int, seed: int, kind: Any
) -> None:
    q = quantize_tiles(numbers(sum(counts), columns, seed), dtype=kind[0], power_of_two=kind[1])
    found = transpose_tiles(q, counts, power_of_two=kind[1])
    assert equal(
        found, quantize_columns(dequantize(q), counts, dtype=kind[0], power_of_two=kind[1])
    )
    assert found.values.dtype == kind[0]


@pytest.mark.parametrize(
    ("dtype", "normal", "of_largest", "step"), [(E4M3, -6, -13, -9), (E5M2, -14, -29, -16)]
)
def test_transposing_rounds_again_only_below_the_normal_range(
    dtype: torch.dtype, normal: int, of_largest: int, step: int
) -> None:
    random = torch.Generator().manual_seed(6)
    # Rows of very different scales, which meet in one tile of a column.
    x = torch.randn(256, 256, generator=random) * 2.0 ** torch.randint(
        -40, 1, (256, 1), generator=random
    )
    q = quantize_tiles(x, dtype=dtype)
    before = dequantize(q).t()
    turned = transpose_tiles(q)
    after, scale = dequantize(turned), turned.scales.repeat_interleave(TILE, dim=1)
    kept = before.abs() >= scale * 2.0**normal
    assert torch.equal(after[kept], before[kept])
    largest = before.unflatten(1, (2, TILE)).abs().amax(2).repeat_interleave(TILE, dim=1)
    assert bool(kept[before.abs() >= largest * 2.0**of_largest].all())
    steps = before / (scale * 2.0**step)  # of subnormals
    assert torch.equal(after[~kept], (steps.round() * scale * 2.0**step)[~kept])
    assert bool((after != before).any())


# ---- what is refused ----


def test_what_cannot_be_quantised_is_refused() -> None:
    x: Any = torch.ones(4, 4)
    calls: list[Callable[..., Any]] = [*QUANTISERS, quantize_columns, quantize_both]
    for quantise in calls:
        with pytest.raises(ValueError, match=r"float16 is not an FP8 format; use float8_e4m3"):
            quantise(x, dtype=torch.float16)
        kinds = (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu)
        in_a_byte = [x.to(kind) for kind in (E4M3, E5M2, *kinds)]
        for strange in (x.int(), x.to(torch.complex64), *in_a_byte):
            with pytest.raises(ValueError, match=f"is quantised, got {strange.dtype}"):
                quantise(strange)
    for quantise in (quantize_blocks, quantize_tensor):
        with pytest.raises(ValueError, match=r"2 dimensions or more can be quantised.*\[4\]"):
            quantise(x[0])
    for quantise in (quantize_columns, quantize_both):
        with pytest.raises(ValueError, match=r"a matrix can be quantised.*\[1, 4, 4\]"):
            quantise(x[None])
    with pytest.raises(ValueError, match=r"1 dimension or more can be quantised.*\[\]"):
        quantize_tiles(x[0, 0])


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([], "do not add up to the 4 rows"),
        ([3], "do not add up to the 4 rows"),
        ([2, 3], "do not add up to the 4 rows"),
        ([5, -1], "none of them negative"),
    ],
)
def test_counts_that_do_not_fit_are_refused(counts: list[int], message: str) -> None:
    x = torch.ones(4, 4)
    calls: list[Callable[[], Any]] = [
        lambda: quantize_columns(x, counts),
        lambda: quantize_both(x, counts),
        lambda: transpose_tiles(quantize_tiles(x), counts),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_only_tiles_are_transposed_as_tiles() -> None:
    for q in (quantize_blocks(torch.ones(4, 4)), quantize_tiles(torch.ones(2, 4, 4))):
        with pytest.raises(ValueError, match=r"only a matrix in tiles of 1x128.*q\.mT"):
            transpose_tiles(q)
    with pytest.raises(ValueError, match="what is to be transposed has scales"):
        transpose_tiles(Quantized(torch.ones(4, 4).to(E4M3), torch.ones(4, 2)))
    with pytest.raises(ValueError, match="what is to be dequantised has scales"):
        dequantize(Quantized(torch.ones(4, 4).to(E4M3), torch.ones(3, 1)))
