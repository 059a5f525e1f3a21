"""Formats of rows on their way."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from counterflow.comm.dispatch.names import PayloadName
from counterflow.comm.dispatch.payload import Payload
from counterflow.fp8 import dequantize, quantize_tiles
from counterflow.fp8.logfmt import decode_logfmt, encode_logfmt

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def rows(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(5, 130, generator=torch.Generator().manual_seed(0)).double().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_rows_come_back_as_they_were(dtype: torch.dtype) -> None:
    payload, x = Payload("exact"), rows(dtype)
    assert torch.equal(payload.decode(payload.encode(x), 130, dtype), x)
    assert payload.summed(dtype) == dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_bf16_rows_are_rounded_once(dtype: torch.dtype) -> None:
    payload, x = Payload("bf16"), rows(dtype)
    assert torch.equal(payload.decode(payload.encode(x), 130, dtype), x.bfloat16().to(dtype))
    assert payload.summed(dtype) == torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_rows_are_tiles_and_are_summed_in_bf16(dtype: torch.dtype) -> None:
    payload, x = Payload("fp8"), rows(dtype)
    parts = payload.encode(x)
    assert [part.dtype for part in parts] == [torch.uint8, torch.float32]
    values, scales = quantize_tiles(x)
    tiles = payload.tiles(parts)
    assert tiles is not None
    assert torch.equal(tiles.values.float(), values.float())
    assert torch.equal(tiles.scales, scales)
    assert torch.equal(payload.decode(parts, 130, dtype), dequantize(tiles, dtype))
    assert payload.summed(dtype) == torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["exact", "bf16", "fp8", "logfmt8", "logfmt10"])
def test_the_bytes_of_a_row_are_those_of_its_parts(name: Any, dtype: torch.dtype) -> None:
    payload = Payload(name)
    parts = payload.encode(rows(dtype))
    assert payload.row_bytes(130, dtype) == sum(part[0].numel() * part.itemsize for part in parts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "bits"), [("logfmt8", 8), ("logfmt10", 10)])
def test_logfmt_rows_are_codes_and_two_numbers_a_tile(name: Any, bits: int, dtype: Any) -> None:
    payload, x = Payload(name), rows(dtype)
    parts = payload.encode(x)
    assert [part.dtype for part in parts] == [torch.uint8, torch.float32, torch.float32]
    expected = decode_logfmt(encode_logfmt(x, bits), dtype)
    assert torch.equal(payload.decode(parts, 130, dtype), expected)
    assert payload.tiles(parts) is None


def test_sums_travel_in_logfmt10_and_otherwise_as_they_are() -> None:
    x = rows(torch.float32)
    payload = Payload("logfmt10")
    assert payload.summed(torch.bfloat16) == torch.float32
    sums = payload.decode_sums(payload.encode_sums(x), 130)
    assert torch.equal(sums, decode_logfmt(encode_logfmt(x, 10)))
    assert not torch.equal(sums, x)
    names: list[PayloadName] = ["exact", "bf16", "fp8", "logfmt8"]
    for name in names:
        (sent,) = Payload(name).encode_sums(x)
        assert Payload(name).decode_sums([sent], 130) is x
    assert Payload("logfmt8").summed(torch.float32) == torch.bfloat16


def test_an_fp8_row_has_little_more_than_half_the_bytes_of_a_bf16_row() -> None:
    fp8, bf16 = (Payload(name).row_bytes(7168, torch.bfloat16) for name in ("fp8", "bf16"))
    assert fp8 == 7168 + 4 * 56
    assert fp8 / bf16 < 0.52
