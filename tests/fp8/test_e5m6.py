"""E5M6: bit for bit the scalar definition, and two numbers in three bytes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from counterflow.fp8 import TILE
from counterflow.fp8.e5m6 import LARGEST_E5M6, Packed, pack_e5m6, unpack_e5m6
from tests import number_formats as scalar

FORM = scalar.E5M6
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def codes_of(packed: Packed) -> list[list[int]]:
    """The codes of [R, D], read byte by byte; all NaNs as one."""
    rows = []
    for row in packed.values.tolist():
        codes = []
        for i in range(0, len(row), 3):
            both = int.from_bytes(bytes(row[i : i + 3]), "little")
            codes += [both & 0xFFF, both >> 12]
        rows.append(
            [
                scalar.NAN_CODE if math.isnan(FORM.value(code)) else code
                for code in codes[: packed.columns]
            ]
        )
    return rows


def packed_from(codes: list[int]) -> Packed:
    """One row of codes with scales of 1."""
    row: list[int] = []
    for low, high in zip(codes[::2], [*codes[1::2], 0], strict=False):
        row += (low | high << 12).to_bytes(3, "little")
    tiles = -(-len(codes) // TILE)
    return Packed(torch.tensor([row], dtype=torch.uint8), torch.ones(1, tiles), len(codes))


def holds(x: Tensor) -> bool:
    """Whether x is packed by the definition, and unpacked to what the codes stand for."""
    packed = pack_e5m6(x)
    back = unpack_e5m6(packed)
    columns = x.shape[1]
    assert packed.values.shape == (len(x), 3 * ((columns + 1) // 2))
    assert packed.scales.shape == (len(x), -(-columns // TILE))
    assert packed.columns == columns
    found, right = codes_of(packed), True
    for r, row in enumerate(x.float().tolist()):
        for t, start in enumerate(range(0, columns, TILE)):
            part = slice(start, start + TILE)
            codes, scale = scalar.quantized(row[part], FORM)
            right &= found[r][part] == codes
            right &= str(float(packed.scales[r, t])) == str(scale)
            exact = [math.nan if c == scalar.NAN_CODE else FORM.value(c) * scale for c in codes]
            expected = torch.tensor(exact, dtype=torch.float64).float()
            right &= str(back[r, part].tolist()) == str(expected.tolist())
    return right


def test_every_code_is_unpacked_as_defined() -> None:
    found = unpack_e5m6(packed_from(list(range(1 << 12)))).view(-1).tolist()
    assert str(found) == str([FORM.value(code) for code in range(1 << 12)])
    assert float(FORM.largest) == LARGEST_E5M6


@pytest.mark.parametrize("sign", [1, -1])
def test_each_boundary_between_codes_rounds_as_defined(sign: int) -> None:
    interesting = [*scalar.boundaries(FORM), 0.0, 2.0**-149, 2.0**-30, 2.0**-126]
    rows = [interesting[i : i + TILE - 1] for i in range(0, len(interesting), TILE - 1)]
    # The largest value in front makes the scale 1.
    x = sign * torch.tensor([[LARGEST_E5M6, *row] + [0.0] * (127 - len(row)) for row in rows])
    assert bool((pack_e5m6(x).scales == 1).all())
    assert holds(x)


@pytest.mark.parametrize("exponent", [-149, -140, -127, -126, -112, -111, -30, -1, 0, 15, 60, 127])
def test_amax_at_and_beside_the_largest_and_powers_of_two_gets_the_defined_scale(
    exponent: int,
) -> None:
    # 65024 is 127/64 * 2 ** 15.
    amax = [math.ldexp(m, exponent) for m in (1.0, 1.5, 127 / 64, 1 + 2**-23)]
    amax = [float(torch.tensor(a)) for a in amax if float(torch.tensor(a))]
    near = [x for a in amax for x in (a, *scalar.beside(a)) if x > 0]
    assert holds(torch.tensor([[a, -a / 3, 0.0] for a in near]))


def test_zeros_subnormals_the_largest_and_what_is_not_finite() -> None:
    tiny, largest = 2.0**-149, torch.finfo(torch.float32).max
    rows = [
        [0.0] * TILE,
        [-0.0, 0.0],
        [tiny, -tiny, 3 * tiny],
        [largest, -largest, 1.0, 0.0, -1e-30],
        *([1.0] * TILE + [strange] + [2.0] * 127 + [3.0] for strange in (math.inf, math.nan)),
        [-math.inf, 1.0, -0.0],
    ]
    for row in rows:
        assert holds(torch.tensor([row]))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(FLOATS, min_size=1, max_size=9),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_any_numbers_are_as_defined(row: list[float], dtype: torch.dtype) -> None:
    assert holds(torch.tensor([row]).to(dtype))


@settings(max_examples=20, deadline=None)
@given(
    rows=st.sampled_from([1, 3]),
    columns=st.sampled_from([1, 2, 3, 127, 128, 129, 255, 300]),
    seed=st.integers(0, 999),
    turn=st.booleans(),
)
def test_any_shape_is_as_defined(rows: int, columns: int, seed: int, turn: bool) -> None:
    random = torch.Generator().manual_seed(seed)
    x = (
        torch.randn(rows, columns, generator=random)
        * torch.randn(rows, columns, generator=random).mul(5).exp2()
    )
    x = x.t().contiguous().t() if turn else x
    assert holds(x)
    assert holds(torch.as_strided(x, (1, columns), (1, 1)))  # a row of one column's strides


@pytest.mark.parametrize("shape", [(0, 130), (3, 0), (5,), (2, 3, 301)])
def test_leading_dimensions_are_rows_and_may_be_empty(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    back = unpack_e5m6(pack_e5m6(x))
    assert back.shape == shape
    assert back.is_contiguous()
    flat = x.reshape(-1, shape[-1]) if x.numel() else x
    if x.numel():
        assert torch.equal(back.view_as(flat), unpack_e5m6(pack_e5m6(flat)))


def test_packing_again_changes_no_number_and_slices_can_be_unpacked() -> None:
    x = torch.randn(6, 301, generator=torch.Generator().manual_seed(1)).bfloat16()
    packed = pack_e5m6(x)
    back = unpack_e5m6(packed)
    assert torch.equal(unpack_e5m6(pack_e5m6(back)), back)
    some = Packed(packed.values[1::2], packed.scales[1::2], 301)
    assert torch.equal(unpack_e5m6(some), back[1::2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_numbers_are_rounded_once_to_the_dtype_asked_for(dtype: torch.dtype) -> None:
    x = torch.randn(3, 200, generator=torch.Generator().manual_seed(2))
    packed = pack_e5m6(x)
    assert torch.equal(unpack_e5m6(packed, dtype), unpack_e5m6(packed).to(dtype))
    wide = x.double() + 2.0**-40
    assert torch.equal(pack_e5m6(wide).values, pack_e5m6(wide.float()).values)


def test_seven_bits_are_an_error_of_2_to_the_minus_7_at_most() -> None:
    x = torch.randn(50, 256, generator=torch.Generator().manual_seed(3))
    packed = pack_e5m6(x)
    # Half of the last of six bits of mantissa; of subnormals, steps of 2**-20.
    bound = packed.scales.repeat_interleave(TILE, dim=1) * 2.0**-21
    assert bool(((unpack_e5m6(packed) - x).abs() <= torch.maximum(x.abs() / 128, bound)).all())


def test_a_tile_takes_196_bytes() -> None:
    assert pack_e5m6(torch.ones(10, 256)).nbytes() == 10 * 2 * (128 * 3 // 2 + 4)


def test_what_is_not_floating_or_of_another_layout_is_refused() -> None:
    for strange in (torch.ones(3).int(), torch.ones(3).to(torch.float8_e4m3fn)):
        with pytest.raises(ValueError, match=f"packed as E5M6, got {strange.dtype}"):
            pack_e5m6(strange)
    with pytest.raises(ValueError, match="a single number has no tiles"):
        pack_e5m6(torch.tensor(1.0))
    good = pack_e5m6(torch.ones(2, 130))
    wrong: list[dict[str, Any]] = [
        {"columns": 132},
        {"columns": 128},
        {"values": good.values[:1]},
        {"scales": good.scales[:, :1]},
    ]
    for change in wrong:
        with pytest.raises(ValueError, match=r"columns of packed E5M6 are \[\.\.\., "):
            unpack_e5m6(good._replace(**change))
    for change in ({"values": good.values.int()}, {"scales": good.scales.double()}):
        with pytest.raises(ValueError, match="uint8 with float32 scales"):
            unpack_e5m6(good._replace(**change))
