"""FP8 products: the stated order bit for bit, groups, accumulation, accuracy, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from counterflow.fp8 import (
    E4M3,
    E5M2,
    Quantized,
    compact_scales,
    grouped_matmul,
    grouped_matmul_along_k,
    quantize_blocks,
    quantize_columns,
    quantize_tensor,
    quantize_tiles,
    scaled_matmul,
)
from counterflow.fp8.products import Emulation, backend
from tests.fp8 import scalar_products
from tests.fp8.operands import QUANTISERS, any_codes, operands

ON_CPU = ["reference", "emulation"]


def same_bits(found: Tensor, expected: Tensor) -> bool:
    return torch.equal(found.nan_to_num(12345.0), expected.nan_to_num(12345.0)) and torch.equal(
        found.isnan(), expected.isnan()
    )


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """1 - 2<x, y> / (<x, x> + <y, y>)."""
    x, y = found.double(), expected.double()
    return float(1 - 2 * (x * y).sum() / ((x * x).sum() + (y * y).sum()))


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    columns=st.integers(1, 270),
    rows=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_the_reference_has_the_stated_order_bit_for_bit(
    data: st.DataObject, columns: int, rows: tuple[int, int]
) -> None:
    a = data.draw(operands(rows[0], columns))
    b = data.draw(operands(rows[1], columns))
    found = scaled_matmul(a, b, out_dtype=torch.float32)
    assert same_bits(found, scalar_products.product(a, b))
    assert torch.equal(scaled_matmul(a, b), found.bfloat16())


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_scales_at_the_ends_of_float32_give_the_stated_zeros_subnormals_and_infinities(
    data: st.DataObject,
) -> None:
    a = data.draw(operands(2, 140, spread=126))
    b = data.draw(operands(2, 140, spread=126))
    with torch.no_grad():
        found = scaled_matmul(a, b, out_dtype=torch.float32)
    assert same_bits(found, scalar_products.product(a, b))


@pytest.mark.parametrize("exponent", [-64, -63, -55, -54, -46, 60, 63, 64])
def test_powers_of_two_around_the_limits_of_folding_give_the_stated_bits(exponent: int) -> None:
    generator = torch.Generator().manual_seed(exponent)
    values = [any_codes(3, 128, E4M3, generator) for _ in range(2)]
    values[0].view(torch.uint8)[0] = 0  # times a scale that overflows it is NaN, not 0
    scales = torch.full((1, 1), 2.0**exponent)
    a, b = (Quantized(v, scales) for v in values)
    found = scaled_matmul(a, b, out_dtype=torch.float32)
    assert same_bits(found, scalar_products.product(a, b))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("ulps", [0, 1])
@pytest.mark.parametrize("b_dtype", [E4M3, E5M2])
def test_a_sum_of_products_that_float64_does_not_hold_is_rounded_once(
    b_dtype: torch.dtype, ulps: int, sign: int
) -> None:
    # A tie of float32, and the least product there is, which decides it: float64 would lose that.
    large, least = (2.0**15, 2.0**-16) if b_dtype == E5M2 else (2.0**8, 2.0**-9)
    top = 2.0**15 * large
    ulp = top * 2.0**-23
    a, b = torch.zeros(1, 128), torch.zeros(1, 128)
    for i, (x, y) in enumerate(
        [(2.0**15, large), (ulp / 2, 1), (ulps * ulp, 1), (sign * 2.0**-16, least)]
    ):
        a[0, i], b[0, i] = x, y
    one = torch.ones(1, 1)
    found = scaled_matmul(
        Quantized(a.to(E5M2), one), Quantized(b.to(b_dtype), one), out_dtype=torch.float32
    )
    assert float(found) == top + ulp * (ulps + (sign + 1) // 2)


def test_a_transposed_view_of_blocks_is_the_transposed_matrix() -> None:
    torch.manual_seed(0)
    w = quantize_blocks(torch.randn(140, 130))
    x = quantize_tiles(torch.randn(2, 140))
    copied = Quantized(w.values.mT.contiguous(), w.scales.mT.contiguous())
    found = scaled_matmul(x, w.mT, out_dtype=torch.float32)
    assert same_bits(found, scalar_products.product(x, copied))
    assert torch.equal(found, scaled_matmul(x, copied, out_dtype=torch.float32))


def test_scales_stored_in_a_byte_give_the_same_product() -> None:
    torch.manual_seed(0)
    x, w = quantize_tiles(torch.randn(5, 300)), quantize_blocks(torch.randn(140, 300))
    assert torch.equal(scaled_matmul(compact_scales(x), compact_scales(w)), scaled_matmul(x, w))


@pytest.mark.parametrize("b_dtype", [E4M3, E5M2])
@pytest.mark.parametrize("where", [0, 200])
def test_a_tile_with_a_nan_makes_its_row_nan_and_no_other(where: int, b_dtype: torch.dtype) -> None:
    x, w = torch.ones(3, 256), torch.ones(4, 256)
    x[1, where] = torch.nan
    found = scaled_matmul(quantize_tiles(x), quantize_blocks(w, dtype=b_dtype))
    assert found[1].isnan().all()
    assert found[[0, 2]].eq(256).all()


def test_panels_of_rows_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = quantize_tiles(torch.randn(150, 130), power_of_two=False)
    w = quantize_blocks(torch.randn(64, 130))
    whole = scaled_matmul(x, w)
    monkeypatch.setattr("counterflow.fp8.products.reference._PANEL", 64 * 64)
    assert torch.equal(scaled_matmul(x, w), whole)


@pytest.mark.parametrize("which", ON_CPU)
@pytest.mark.parametrize("layout", list(QUANTISERS))
@settings(max_examples=12, deadline=None)
@given(
    counts=st.lists(st.integers(0, 150), min_size=1, max_size=4),
    n=st.integers(1, 140),
    seed=st.integers(0, 2**32),
)
def test_a_grouped_product_is_the_dense_one_of_each_group(
    which: str, layout: str, counts: list[int], n: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(counts), 200, generator=generator)
    w = QUANTISERS[layout](torch.randn(len(counts), n, 200, generator=generator))
    a = quantize_tiles(x)
    found = grouped_matmul(a, w, counts, backend=which)
    assert found.shape == (len(x), n)
    assert found.dtype == torch.bfloat16
    start = 0
    for e, count in enumerate(counts):
        rows = slice(start, start + count)
        dense = scaled_matmul(
            Quantized(a.values[rows], a.scales[rows]),
            Quantized(w.values[e], w.scales[e]),
            backend=which,
        )
        assert torch.equal(found[rows], dense)
        start += count


@pytest.mark.parametrize("which", ON_CPU)
@settings(max_examples=12, deadline=None)
@given(
    counts=st.lists(st.integers(0, 200), min_size=1, max_size=4),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    power_of_two=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_a_product_grouped_along_k_adds_the_dense_one_of_each_group(
    which: str, counts: list[int], sizes: tuple[int, int], power_of_two: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, g = (torch.randn(sum(counts), size, generator=generator) for size in sizes)
    a, b = (quantize_columns(y, counts, power_of_two=power_of_two) for y in (x, g))
    before = torch.randn(len(counts), *sizes, generator=generator)
    into = before.clone()
    assert grouped_matmul_along_k(a, b, counts, accumulate=into, backend=which) is into
    start = 0
    for e, count in enumerate(counts):
        rows = slice(start, start + count)
        parts = [quantize_columns(y[rows], power_of_two=power_of_two) for y in (x, g)]
        dense = scaled_matmul(*parts, out_dtype=torch.float32, backend=which)
        assert torch.equal(into[e], before[e] + dense)
        start += count


@pytest.mark.parametrize("which", ON_CPU)
def test_a_product_is_added_to_what_is_there_in_float32(which: str) -> None:
    torch.manual_seed(0)
    a, b = quantize_tiles(torch.randn(70, 256)), quantize_tiles(torch.randn(30, 256))
    before = torch.randn(70, 30) * 1000
    into = before.clone()
    assert scaled_matmul(a, b, accumulate=into, backend=which) is into
    assert torch.equal(into, before + scaled_matmul(a, b, out_dtype=torch.float32, backend=which))


@pytest.mark.parametrize("which", ON_CPU)
def test_products_of_nothing(which: str) -> None:
    def empty(*shape: int) -> Tensor:
        return torch.zeros(shape)

    w = quantize_blocks(empty(2, 3, 200))
    assert grouped_matmul(quantize_tiles(empty(0, 200)), w, [0, 0], backend=which).shape == (0, 3)
    x, none = quantize_tiles(empty(5, 200)), quantize_tiles(empty(0, 200))
    assert scaled_matmul(none, x, backend=which).shape == (0, 5)
    assert scaled_matmul(x, none, backend=which).shape == (5, 0)
    a, b = quantize_columns(empty(0, 3), [0, 0]), quantize_columns(empty(0, 4), [0, 0])
    into = torch.ones(2, 3, 4)
    assert grouped_matmul_along_k(a, b, [0, 0], accumulate=into, backend=which) is into
    assert into.eq(1).all()
    bare = quantize_tiles(empty(3, 0))
    assert scaled_matmul(bare, bare, out_dtype=torch.float32).eq(0).all()


@pytest.mark.parametrize("power_of_two", [True, False])
@pytest.mark.parametrize("outliers", [1, 100, 1000])
def test_products_are_near_those_of_the_unquantised_inputs(
    outliers: float, power_of_two: bool
) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(256, 1024).bfloat16(), torch.randn(256, 1024).bfloat16()
    x[:, ::200] *= outliers
    exact = x.double() @ w.double().t()
    a = quantize_tiles(x, power_of_two=power_of_two)
    for b in (quantize_blocks(w, power_of_two=power_of_two), quantize_tiles(w)):
        assert relative_difference(scaled_matmul(a, b), exact) < 1e-3


def test_one_scale_for_a_tensor_loses_small_rows_beside_outlier_channels() -> None:
    # Rows as of activation gradients, whose sizes span three orders; six channels are 1000 times
    # larger. Those channels meet weights of zero, so that what is compared is all the rest.
    torch.manual_seed(0)
    x = torch.randn(256, 1024) * 10 ** (-3 * torch.rand(256, 1))
    x[:, ::200] *= 1000
    w = torch.randn(128, 1024)
    w[:, ::200] = 0
    x, w = x.bfloat16(), w.bfloat16()
    exact = x.double() @ w.double().t()
    size = x.double().norm(dim=1, keepdim=True)  # so that each row counts alike

    def difference(q: Quantized) -> float:
        return relative_difference(scaled_matmul(q, quantize_blocks(w)) / size, exact / size)

    assert difference(quantize_tiles(x)) < 1e-3
    assert difference(quantize_tensor(x)) > 0.1


def tiles(*shape: int, dtype: torch.dtype = E4M3) -> Quantized:
    return quantize_tiles(torch.ones(shape), dtype=dtype)


def _scales(q: Quantized, scales: Tensor) -> Quantized:
    return Quantized(q.values, scales)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "values that are not FP8": (
        lambda: scaled_matmul(Quantized(torch.ones(2, 128), torch.ones(2, 1)), tiles(2, 128)),
        "operand a has values of torch.float32",
    ),
    "scales that are not float32": (
        lambda: scaled_matmul(tiles(2, 128), _scales(tiles(2, 128), torch.ones(2, 1).half())),
        "operand b has scales of torch.float16",
    ),
    "scales of another layout": (
        lambda: scaled_matmul(tiles(4, 256), _scales(tiles(3, 256), torch.ones(2, 3))),
        r"operand b has scales \[2, 3\].*\[3, 2\] or \[1, 2\] or \[1, 1\]",
    ),
    "scales of the transpose": (
        lambda: scaled_matmul(_scales(tiles(4, 256), torch.ones(2, 4)), tiles(3, 256)),
        "operand a has scales",
    ),
    "inner sizes that differ": (
        lambda: scaled_matmul(tiles(2, 128), tiles(2, 256)),
        r"a is \[2, 128\] and b \[2, 256\]",
    ),
    "a vector": (
        lambda: scaled_matmul(tiles(128), tiles(2, 128)),
        "operand a must be a matrix",
    ),
    "a dense product of stacked matrices": (
        lambda: scaled_matmul(tiles(2, 128), tiles(3, 2, 128)),
        "operand b must be a matrix",
    ),
    "another output dtype": (
        lambda: scaled_matmul(tiles(2, 128), tiles(2, 128), out_dtype=torch.float16),
        "out_dtype is bfloat16 or float32",
    ),
    "accumulation in BF16": (
        lambda: scaled_matmul(
            tiles(2, 128), tiles(3, 128), accumulate=torch.zeros(2, 3, dtype=torch.bfloat16)
        ),
        r"accumulate must be float32 \[2, 3\]",
    ),
    "accumulation into another shape": (
        lambda: scaled_matmul(tiles(2, 128), tiles(3, 128), accumulate=torch.zeros(3, 2)),
        r"accumulate must be float32 \[2, 3\]",
    ),
    "accumulation on another device": (
        lambda: scaled_matmul(
            tiles(2, 128), tiles(3, 128), accumulate=torch.zeros(2, 3, device="meta")
        ),
        "accumulate is on meta",
    ),
    "operands on two devices": (
        lambda: scaled_matmul(tiles(2, 128), Quantized(*(x.to("meta") for x in tiles(3, 128)))),
        "a is on cpu, b on meta",
    ),
    "scales on another device": (
        lambda: scaled_matmul(
            tiles(2, 128), _scales(tiles(3, 128), torch.ones(3, 1, device="meta"))
        ),
        "operand b has values on cpu, scales on meta",
    ),
    "counts that do not add up": (
        lambda: grouped_matmul(tiles(5, 128), tiles(2, 3, 128), [2, 2]),
        "do not add up to the 5 rows",
    ),
    "a count for each matrix missing": (
        lambda: grouped_matmul(tiles(5, 128), tiles(2, 3, 128), [5]),
        "1 counts for 2 matrices",
    ),
    "a negative count": (
        lambda: grouped_matmul(tiles(5, 128), tiles(2, 3, 128), [6, -1]),
        "cannot be negative",
    ),
    "grouped with one matrix": (
        lambda: grouped_matmul(tiles(5, 128), tiles(3, 128), [5]),
        r"operand b must be matrices \[groups, rows, K\]",
    ),
    "columns that are not padded by groups": (
        lambda: grouped_matmul_along_k(
            tiles(4, 256), tiles(3, 256), [100, 100, 56], accumulate=torch.zeros(3, 4, 3)
        ),
        "have 384 columns, but a and b have 256: quantise both with quantize_columns",
    ),
    "gradients of another shape": (
        lambda: grouped_matmul_along_k(
            tiles(4, 256), tiles(3, 256), [100, 100], accumulate=torch.zeros(4, 3)
        ),
        r"accumulate must be float32 \[2, 4, 3\]",
    ),
    "scales that change along a register": (
        lambda: scaled_matmul(
            quantize_tiles(torch.arange(1.0, 513).reshape(1, 512)),
            tiles(3, 512),
            backend=Emulation(interval=512),
        ),
        "scales of a change every 128; take interval=128",
    ),
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_is_refused(what: str) -> None:
    call, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_backend_has_the_products_as_methods() -> None:
    torch.manual_seed(0)
    a, b = quantize_tiles(torch.randn(6, 200)), quantize_blocks(torch.randn(2, 5, 200))
    reference = backend("reference")
    assert torch.equal(reference.grouped(a, b, [4, 2]), grouped_matmul(a, b, [4, 2]))
