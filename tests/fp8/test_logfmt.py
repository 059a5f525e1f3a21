"""LogFMT: codes nearest in the numbers themselves, and what they cost in error."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from counterflow.fp8 import E4M3, E5M2, TILE, dequantize, quantize_tiles
from counterflow.fp8.logfmt import LogCode, code_bytes, decode_logfmt, encode_logfmt

BITS = pytest.mark.parametrize("bits", [8, 10])
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def codes_of(code: LogCode) -> list[list[int]]:
    """The codes of [R, D], read byte by byte."""
    rows = code.codes.tolist()
    if code.bits == 8:
        return rows
    found = []
    for row in rows:
        codes = []
        for i in range(0, len(row), 5):
            four = int.from_bytes(bytes(row[i : i + 5]), "little")
            codes += [four >> 10 * k & 0x3FF for k in range(4)]
        found.append(codes[: code.columns])
    return found


def value(code: int, least: float, step: float, bits: int) -> float:
    """What a code stands for, by the formula, as a float32."""
    sign, number = divmod(code, 1 << (bits - 1))
    if number == 0:
        return 0.0
    magnitude = min(least * math.exp(step * (number - 1)), torch.finfo(torch.float32).max)
    return (-1 if sign else 1) * float(torch.tensor(magnitude, dtype=torch.float32))


def check(x: Tensor, bits: int) -> None:
    """Hold x's codes against every code that there is."""
    code = encode_logfmt(x, bits)
    back = decode_logfmt(code)
    tiles = -(-x.shape[1] // TILE)
    assert code.codes.shape == (len(x), code_bytes(x.shape[1], bits))
    assert code.least.shape == code.steps.shape == (len(x), tiles)
    assert back.shape == x.shape
    codes = codes_of(code)
    for r, row in enumerate(x.float().tolist()):
        for t in range(tiles):
            least, step = float(code.least[r, t]), float(code.steps[r, t])
            tile = row[t * TILE : (t + 1) * TILE]
            check_span([abs(v) for v in tile], least, step, bits)
            every = [value(c, least, step, bits) for c in range(1 << bits)]
            for c, number in enumerate(tile, start=t * TILE):
                decoded, mine = float(back[r, c]), codes[r][c]
                # One ulp: exp is the library's here and torch's there.
                assert math.isclose(decoded, every[mine], rel_tol=2**-23, abs_tol=2**-149)
                nearest = min(abs(v - number) for v in every)
                assert abs(decoded - number) <= nearest + abs(number) * 2**-23
                assert mine < 1 << (bits - 1) or number < 0  # zero has one code
                assert mine or decoded == 0


def check_span(magnitudes: list[float], least: float, step: float, bits: int) -> None:
    """exp(min) and step, from a tile's magnitudes."""
    nonzero = [m for m in magnitudes if m]
    if not nonzero:
        assert (least, step) == (0, 0)
        return
    low = max(min(nonzero), max(nonzero) / 2**32)
    assert math.isclose(least, low, rel_tol=2**-23, abs_tol=2**-149)
    # min is what was stored of it, which matters where that is subnormal.
    expected = (math.log(max(nonzero)) - math.log(least)) / (2 ** (bits - 1) - 2)
    assert math.isclose(step, expected, rel_tol=2**-22, abs_tol=2**-50)


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@BITS
@settings(max_examples=40, deadline=None)
@given(row=st.lists(FLOATS, min_size=1, max_size=6))
def test_any_numbers_get_the_codes_nearest_to_them(bits: int, row: list[float]) -> None:
    check(torch.tensor([row]), bits)


@BITS
@settings(max_examples=6, deadline=None)
@given(
    columns=st.sampled_from([1, 2, 3, 5, 127, 129, 131]),
    seed=st.integers(0, 999),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_rows_of_any_length_get_the_codes_nearest_to_them(
    bits: int, columns: int, seed: int, dtype: torch.dtype
) -> None:
    x = gaussian(1, columns, seed) * gaussian(1, columns, seed + 1).mul(4).exp2()
    check(x.to(dtype), bits)


@BITS
def test_the_codes_own_values_and_what_lies_between_two_get_the_nearest(bits: int) -> None:
    least, largest, last = 2.0**-3, 5.0, 2 ** (bits - 1) - 1
    step = float(torch.tensor(math.log(largest / least) / (last - 1), dtype=torch.float32))
    values = [0.0] + [value(k, least, step, bits) for k in range(1, last)] + [largest]
    middles = [(a + b) / 2 for a, b in pairwise(values)]
    # In every tile the least and the largest magnitude are these.
    for numbers, places in ((values[1:-1], range(1, last)), (middles[1:-1], range(1, last - 1))):
        for start in range(0, len(numbers), TILE - 2):
            some = numbers[start : start + TILE - 2]
            x = torch.tensor([[least, largest, *some]], dtype=torch.float32)
            check(x, bits)
            found = codes_of(encode_logfmt(x, bits))[0][2:]
            for mine, k in zip(found, places[start : start + TILE - 2], strict=True):
                assert mine == k if numbers is values else mine in (k, k + 1)


@BITS
def test_rounding_is_to_the_nearest_number_not_to_the_nearest_logarithm(bits: int) -> None:
    # Between the middle of two logarithms and the middle of the two numbers, which is higher.
    last = 2 ** (bits - 1) - 1
    least, largest = 1.0, 2.0**32
    factor = math.exp(math.log(largest / least) / (last - 1))
    between = least * (math.sqrt(factor) + (1 + factor) / 2) / 2
    code = encode_logfmt(torch.tensor([[least, largest, between]]), bits)
    assert math.log(between / least) > math.log(factor) / 2  # nearer to K = 2 by its logarithm
    assert codes_of(code)[0] == [1, last, 1]


@BITS
def test_zeros_have_the_code_of_all_zeros(bits: int) -> None:
    code = encode_logfmt(torch.tensor([[0.0, -0.0, 1.0, -1.0] + [0.0] * 124 + [0.0] * 40]), bits)
    half = 1 << (bits - 1)
    assert codes_of(code)[0] == [0, 0, 1, half + 1] + [0] * 164
    assert code.least.tolist() == [[1.0, 0.0]]
    assert code.steps.tolist() == [[0.0, 0.0]]
    assert decode_logfmt(code).tolist()[0] == [0.0, 0.0, 1.0, -1.0] + [0.0] * 164


@BITS
@pytest.mark.parametrize("number", [1 / 3, 1.7e38, 2.0**-149, 3.4028234e38])
def test_a_tile_of_one_magnitude_comes_back_exactly(bits: int, number: float) -> None:
    x = torch.tensor([[number, -number, 0.0, number]])
    assert torch.equal(decode_logfmt(encode_logfmt(x, bits)), x)


@BITS
def test_the_span_ends_2_to_the_32_under_the_largest(bits: int) -> None:
    x = torch.tensor([[2.0**40, 2.0**8, 2.0**7 + 1, 2.0**7, -(2.0**6), 2.0**-100]])
    code = encode_logfmt(x, bits)
    assert code.least.item() == 2.0**8
    assert codes_of(code)[0][1:] == [1, 1, 0, 0, 0]  # halfway to zero is zero
    assert decode_logfmt(code).tolist()[0][1:] == [256.0, 256.0, 0.0, 0.0, 0.0]


@BITS
@pytest.mark.parametrize("strange", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_makes_its_tile_nan(bits: int, strange: float) -> None:
    x = torch.ones(1, 300)
    x[0, 7], x[0, 9] = strange, 0.0
    code = encode_logfmt(x, bits)
    assert code.least[0].isnan().tolist() == code.steps[0].isnan().tolist() == [True, False, False]
    back = decode_logfmt(code)
    assert bool(back[0, :TILE].isnan().all())
    assert torch.equal(back[0, TILE:], x[0, TILE:])


@BITS
def test_ends_of_a_tile_come_back_and_the_largest_float32_is_not_exceeded(bits: int) -> None:
    x = gaussian(200, TILE) * 2.0 ** torch.linspace(-100, 120, 200)[:, None]
    x[0, 0], x[1, 0] = torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max
    back = decode_logfmt(encode_logfmt(x, bits))
    top = x.abs().argmax(1, keepdim=True)
    found, right = back.gather(1, top).double(), x.gather(1, top).double()
    assert bool(((found - right).abs() <= 3e-6 * right.abs()).all())
    assert bool(back.isfinite().all())


def relative_error(found: Tensor, x: Tensor) -> float:
    return float((found - x).double().norm() / x.double().norm())


def test_on_gaussian_tiles_8_bits_are_nearer_than_fp8_and_10_near_to_bf16() -> None:
    # The paper's claim, of rows in dispatch: one tile spans about exp(6), so LogFMT-8's steps are
    # about 5 % wide and E4M3's 6 to 12 %.
    x = gaussian(400, 512)
    eight, ten = (relative_error(decode_logfmt(encode_logfmt(x, bits)), x) for bits in (8, 10))
    e4m3, e5m2 = (relative_error(dequantize(quantize_tiles(x, dtype=d)), x) for d in (E4M3, E5M2))
    assert eight < 0.75 * e4m3
    assert eight < 0.4 * e5m2
    # Two bits more are a quarter of the step. BF16's step is 2**-8 to 2**-7, about half of
    # LogFMT-10's 1.2 %.
    assert ten == pytest.approx(eight * 126 / 510, rel=0.05)
    assert ten < 3 * relative_error(x.bfloat16().float(), x)


@BITS
@pytest.mark.parametrize("shape", [(0, 130), (3, 0), (5,), (2, 3, 131)])
def test_leading_dimensions_are_rows_and_may_be_empty(bits: int, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    code = encode_logfmt(x, bits)
    back = decode_logfmt(code)
    assert back.shape == shape
    if x.numel():
        flat = decode_logfmt(encode_logfmt(x.reshape(-1, shape[-1]), bits))
        assert torch.equal(back.view_as(flat), flat)


@BITS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_float32_is_rounded_to_the_dtype_asked_for(bits: int, dtype: torch.dtype) -> None:
    code = encode_logfmt(gaussian(3, 200).double() + 2.0**-40, bits)
    assert torch.equal(decode_logfmt(code, dtype), decode_logfmt(code).to(dtype))
    assert torch.equal(encode_logfmt(gaussian(3, 200), bits).codes, code.codes)


def test_the_bytes_of_a_row() -> None:
    assert [code_bytes(n, 8) for n in (1, 4, 7168)] == [1, 4, 7168]
    assert [code_bytes(n, 10) for n in (1, 4, 5, 7168)] == [5, 5, 10, 8960]


def test_what_cannot_be_encoded_or_decoded_is_refused() -> None:
    x = torch.ones(2, 130)
    for call in (lambda: encode_logfmt(x, 9), lambda: code_bytes(3, 9)):
        with pytest.raises(ValueError, match="8 or 10 bits here, not 9"):
            call()
    for strange in (x.int(), x.to(E4M3)):
        with pytest.raises(ValueError, match=f"is encoded, got {strange.dtype}"):
            encode_logfmt(strange, 8)
    with pytest.raises(ValueError, match="a single number has no tiles"):
        encode_logfmt(torch.tensor(1.0), 8)
    good = encode_logfmt(x, 10)
    wrong: list[dict[str, Any]] = [
        {"columns": 140},
        {"bits": 8},
        {"least": good.least[:, :1]},
        {"steps": good.steps[:1]},
    ]
    for change in wrong:
        with pytest.raises(ValueError, match=r"columns of LogFMT-\d+ are \[\.\.\., "):
            decode_logfmt(good._replace(**change))
    with pytest.raises(ValueError, match="uint8 with float32 `least` and `steps`"):
        decode_logfmt(good._replace(codes=good.codes.int()))
