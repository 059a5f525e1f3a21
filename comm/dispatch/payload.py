"""In which format rows travel (arXiv 2412.19437, section 3.2.2).

A spread, which hands each expert a token's row, may go in FP8 with its scales; a gather, whose rows
are summed on the way, goes in BF16 at least.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from ...fp8 import TILE, dequantize_tiles, quantize_tiles
from .names import PayloadName


class Tiles(NamedTuple):
    """Rows as they travelled in FP8.

    Attributes:
        values_ND: [N, D] float8_e4m3fn.
        scales_Nd: [N, ceil(D / 128)] float32, powers of two.
    """

    values_ND: Tensor
    scales_Nd: Tensor


@dataclass(frozen=True)
class Payload:
    """The format of rows on their way.

    Attributes:
        name: "exact", the tensors' own dtype; "bf16"; or "fp8": spreads in E4M3 with float32
            scales of 1x128 tiles, gathers in BF16.

    Raises:
        ValueError: another name.
    """

    name: PayloadName = "exact"

    def __post_init__(self) -> None:
        if self.name not in get_args(PayloadName):
            raise ValueError(
                f"there is no payload {self.name!r}; choose from {', '.join(get_args(PayloadName))}"
            )

    def encode(self, x: Tensor) -> list[Tensor]:
        """Rows [M, D] as the parts [M, columns] that a spread sends."""
        if self.name == "fp8":
            values, scales = quantize_tiles(x)
            return [values.view(torch.uint8), scales]
        return [x.to(self.summed(x.dtype)).contiguous()]

    def decode(self, parts: list[Tensor], dtype: torch.dtype) -> Tensor:
        """Rows [M, D] of `dtype` from parts that `encode` made."""
        tiles = self.tiles(parts)
        return parts[0].to(dtype) if tiles is None else dequantize_tiles(*tiles, dtype)

    def tiles(self, parts: list[Tensor]) -> Tiles | None:
        """The same parts as tiles, if that is what they are."""
        if self.name != "fp8":
            return None
        values, scales = parts
        return Tiles(values.view(torch.float8_e4m3fn), scales)

    def summed(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which a gather sends rows of `dtype`."""
        return dtype if self.name == "exact" else torch.bfloat16

    def row_bytes(self, hidden: int, dtype: torch.dtype) -> int:
        """Bytes of a row of `hidden` values of `dtype` in a spread, without metadata."""
        if self.name == "fp8":
            return hidden + 4 * -(-hidden // TILE)
        return hidden * self.summed(dtype).itemsize
