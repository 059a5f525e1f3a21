"""Sums of rows in a fixed order: the one kind of arithmetic in a dispatcher."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Bags:
    """Which rows make up each sum, and in which order they are added.

    Attributes:
        index_M: int64, rows in the order of adding, bag after bag.
        offsets_B: int64, where in index_M each of B bags begins.
    """

    index_M: Tensor
    offsets_B: Tensor

    @classmethod
    def of(cls, index_M: Tensor, sizes_B: Tensor) -> Bags:
        """Bags of these sizes."""
        return cls(index_M, sizes_B.cumsum(0) - sizes_B)

    def every(self, step: int) -> Bags:
        """Bags of `step` neighbouring bags each."""
        return self if step == 1 else Bags(self.index_M, self.offsets_B[::step])

    def sum(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """The sum of each bag, an empty one's being zero: [B, D] of `dtype`.

        Rows of less than 32 bits are added in float32 and rounded once.

        Args:
            rows: [rows, D] floating.
        """
        if not len(self.offsets_B) or not len(self.index_M):
            return rows.new_zeros((len(self.offsets_B), rows.shape[1]), dtype=dtype)
        # On the CPU torch's bag rounds ties of bfloat16 up instead of to even.
        if dtype.itemsize > rows.dtype.itemsize or (rows.is_cpu and rows.dtype == torch.bfloat16):
            rows = rows.to(torch.promote_types(dtype, torch.float32))
        elif rows.dtype == torch.float16 and dtype == torch.bfloat16:
            rows = rows.float()
        # mode 0 is the sum; each bag is added by one thread, in order.
        return torch.embedding_bag(rows.contiguous(), self.index_M, self.offsets_B, mode=0)[0].to(
            dtype
        )
