"""Feed-forward layers: one dense (or shared) expert, and a rank's routed experts stacked.

Shapes: N rows grouped by expert, D hidden, I inner size, E experts of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..parallel.chunk import WeightGradQueue
from .grouped import grouped_linear
from .linear import Linear


class MLP(nn.Module):
    """SwiGLU feed-forward: down(silu(gate(x)) * up(x))."""

    def __init__(
        self, size: int, inner: int, *, dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.gate_proj = Linear(size, inner, dtype=dtype, device=device)
        self.up_proj = Linear(size, inner, dtype=dtype, device=device)
        self.down_proj = Linear(inner, size, dtype=dtype, device=device)

    def forward(self, x: Tensor, queue: WeightGradQueue | None = None) -> Tensor:
        """[..., D] -> [..., D]."""
        inner = F.silu(self.gate_proj(x, queue)) * self.up_proj(x, queue)
        return self.down_proj(inner, queue)


class Experts(nn.Module):
    """The routed experts of one rank, computed as grouped matrix products.

    Attributes:
        gate_up_proj: [E, 2 I, D]; gate in the first I rows, up in the others.
        down_proj: [E, D, I].
        local: which of the model's experts these are, in order.
    """

    def __init__(
        self,
        local: Sequence[int],
        size: int,
        inner: int,
        *,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.local = local
        count = len(local)
        self.gate_up_proj = nn.Parameter(
            torch.empty(count, 2 * inner, size, dtype=dtype, device=device)
        )
        self.down_proj = nn.Parameter(torch.empty(count, size, inner, dtype=dtype, device=device))

    def forward(
        self, rows_ND: Tensor, counts: Sequence[int], queue: WeightGradQueue | None = None
    ) -> Tensor:
        """[N, D] -> [N, D], each row by its expert's weights; `counts` has the rows of each."""
        gate, up = grouped_linear(rows_ND, self.gate_up_proj, counts, queue).chunk(2, dim=-1)
        return grouped_linear(F.silu(gate) * up, self.down_proj, counts, queue)

    def extra_repr(self) -> str:
        count, size, inner = self.down_proj.shape
        return f"{count} experts (from {self.local[0]}), {size} -> {inner} -> {size}"
