"""Records: a token's row, weights and expert slots side by side as bytes, one message a hop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .sizes import record_starts


@dataclass(frozen=True)
class RecordFormat:
    """How a record's parts lie in its bytes; each begins at a multiple of its item's size.

    Attributes:
        parts: (dtype, columns) of each part.
    """

    parts: tuple[tuple[torch.dtype, int], ...]

    @classmethod
    def of(cls, parts: Sequence[Tensor]) -> RecordFormat:
        """The format of records with rows of these [M, columns] tensors."""
        return cls(tuple((part.dtype, part.shape[1]) for part in parts))

    @cached_property
    def _starts(self) -> list[int]:
        return record_starts([(dtype.itemsize, columns) for dtype, columns in self.parts])

    @property
    def width(self) -> int:
        """Bytes of a record."""
        return self._starts[-1]

    def part(self, records: Tensor, index: int) -> Tensor:
        """Part `index` of records [M, width] uint8: a view [M, columns] of its dtype."""
        dtype, columns = self.parts[index]
        start = self._starts[index]
        return records[:, start : start + columns * dtype.itemsize].view(dtype)
