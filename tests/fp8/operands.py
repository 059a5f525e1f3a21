"""Operands for tests of products: any codes with any scales, and quantised random matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st

from counterflow.fp8 import (
    E4M3,
    E5M2,
    Quantized,
    quantize_blocks,
    quantize_tensor,
    quantize_tiles,
)

QUANTISERS: dict[str, Callable[..., Quantized]] = {
    "tiles": quantize_tiles,
    "blocks": quantize_blocks,
    "tensor": quantize_tensor,
}


def any_codes(
    rows: int, columns: int, dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    """Every finite code alike, so that subnormals, zeros and the largest come up in each row."""
    codes = torch.randint(0, 256, (rows, columns), generator=generator).to(torch.uint8)
    limit = 0x7E if dtype == E4M3 else 0x7B  # the largest finite code
    finite = (codes & 0x7F) <= limit
    return codes.where(finite, 0x01).view(dtype)


@st.composite
def operands(draw: Any, rows: int, columns: int, spread: int = 12) -> Quantized:
    """A matrix of any codes, in either format, with scales of any layout and kind.

    Args:
        spread: scales are up to 2**spread and down to 2**-spread.
    """
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([E4M3, E5M2]))
    values = any_codes(rows, columns, dtype, generator)
    tiles, blocks = -(-columns // 128), -(-rows // 128)
    shape = draw(st.sampled_from([(rows, tiles), (blocks, tiles), (1, 1)]))
    exponents = torch.randint(-spread, spread + 1, shape, generator=generator)
    scales = torch.ldexp(torch.ones(shape), exponents)
    if draw(st.booleans()):
        scales *= 1 + torch.rand(shape, generator=generator)
    if draw(st.booleans()):  # codes that are spread less, of a kind real tensors have
        values = torch.randn(rows, columns, generator=generator).mul(16).to(dtype)
    return Quantized(values, scales)
