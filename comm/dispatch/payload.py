"""In which format rows travel (arXiv 2412.19437, section 3.2.2; 2505.09343, section 3.2).

A spread, which hands each expert a token's row, may go in FP8 with its scales or in LogFMT; a
gather, whose rows are summed on the way, goes in BF16 at least, or in LogFMT of 10 bits.

Shapes: M rows, D columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from ...fp8 import E4M3, Quantized, dequantize, quantize_tiles
from ...fp8.formats import tiles_in
from ...fp8.logfmt import LogCode, code_bytes, decode_logfmt, encode_logfmt
from .names import PayloadName

# Bits of a value in those payloads that go in LogFMT.
LOGFMT_BITS = {"logfmt8": 8, "logfmt10": 10}


@dataclass(frozen=True)
class Payload:
    """The format of rows on their way.

    Attributes:
        name: "exact", the tensors' own dtype; "bf16"; "fp8": spreads in E4M3 with float32 scales of
            1x128 tiles, gathers in BF16; "logfmt8": the same with LogFMT of 8 bits for E4M3;
            "logfmt10": both ways in LogFMT of 10 bits, summed in float32 and encoded again for
            each hop.

    Raises:
        ValueError: another name.
    """

    name: PayloadName = "exact"

    def __post_init__(self) -> None:
        if self.name not in get_args(PayloadName):
            raise ValueError(
                f"there is no payload {self.name!r}; choose from {', '.join(get_args(PayloadName))}"
            )

    def encode(self, x_MD: Tensor) -> list[Tensor]:
        """Rows as the parts [M, columns] that a spread sends."""
        if self.name == "fp8":
            values, scales = quantize_tiles(x_MD)
            return [values.view(torch.uint8), scales]
        if self.name in LOGFMT_BITS:
            return self._encode_logfmt(x_MD)
        return [x_MD.to(self.summed(x_MD.dtype)).contiguous()]

    def decode(self, parts: list[Tensor], hidden: int, dtype: torch.dtype) -> Tensor:
        """Rows [M, hidden] of `dtype` from parts that `encode` made."""
        if self.name in LOGFMT_BITS:
            return self._decode_logfmt(parts, hidden, dtype)
        tiles = self.tiles(parts)
        return parts[0].to(dtype) if tiles is None else dequantize(tiles, dtype)

    def tiles(self, parts: list[Tensor]) -> Quantized | None:
        """The same parts as tiles of FP8, if that is what they are."""
        if self.name != "fp8":
            return None
        values, scales = parts
        return Quantized(values.view(E4M3), scales)

    def summed(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype to which a gather of rows of `dtype` rounds sums on their way."""
        if self.name == "logfmt10":
            return torch.float32
        return dtype if self.name == "exact" else torch.bfloat16

    def encode_sums(self, x_MD: Tensor) -> list[Tensor]:
        """Sums of the dtype `summed` as the parts [M, columns] that a gather sends."""
        return self._encode_logfmt(x_MD) if self.name == "logfmt10" else [x_MD]

    def decode_sums(self, parts: list[Tensor], hidden: int) -> Tensor:
        """Sums [M, hidden] from parts that `encode_sums` made."""
        if self.name == "logfmt10":
            return self._decode_logfmt(parts, hidden, torch.float32)
        return parts[0]

    def row_bytes(self, hidden: int, dtype: torch.dtype) -> int:
        """Bytes of a row of `hidden` values of `dtype` in a spread, without metadata."""
        if self.name == "fp8":
            return hidden + 4 * tiles_in(hidden)
        if self.name in LOGFMT_BITS:
            return code_bytes(hidden, LOGFMT_BITS[self.name]) + 8 * tiles_in(hidden)
        return hidden * self.summed(dtype).itemsize

    def _encode_logfmt(self, x_MD: Tensor) -> list[Tensor]:
        code = encode_logfmt(x_MD, LOGFMT_BITS[self.name])
        return [code.codes, code.least, code.steps]

    def _decode_logfmt(self, parts: list[Tensor], hidden: int, dtype: torch.dtype) -> Tensor:
        codes, least, steps = parts
        return decode_logfmt(LogCode(codes, least, steps, LOGFMT_BITS[self.name], hidden), dtype)
