"""Feed-forward layers: one dense (or shared) expert, and a rank's routed experts stacked.

Shapes: N rows grouped by expert, D hidden, I inner size, E experts of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn

from ..fp8.swiglu import swiglu_mlp
from ..parallel.chunk import WeightGradQueue
from .build import Build
from .grouped import grouped_linear
from .linear import Linear


class MLP(nn.Module):
    """SwiGLU feed-forward: down(silu(gate(x)) * up(x))."""

    def __init__(self, size: int, inner: int, build: Build) -> None:
        super().__init__()
        self.gate_proj = Linear(size, inner, build)
        self.up_proj = Linear(size, inner, build)
        self.down_proj = Linear(inner, size, build)
        self._up_call = build.call()  # of gate and up, side by side

    def forward(self, x: Tensor, queue: WeightGradQueue | None = None) -> Tensor:
        """[..., D] -> [..., D]."""
        up_call, down_call = self._up_call, self.down_proj.call
        if up_call is None or down_call is None:
            inner = F.silu(self.gate_proj(x, queue)) * self.up_proj(x, queue)
            return self.down_proj(inner, queue)
        return swiglu_mlp(
            x,
            [self.gate_proj.weight, self.up_proj.weight],
            self.down_proj.weight,
            replace(up_call, queue=queue),
            replace(down_call, queue=queue),
        )

    def set_name(self, name: str) -> None:
        """What errors call this layer."""
        if self._up_call is not None:
            self._up_call = replace(self._up_call, name=f"{name}.gate_proj and up_proj")


class Experts(nn.Module):
    """The routed experts of one rank, computed as grouped matrix products.

    Attributes:
        gate_up_proj: [E, 2 I, D]; gate in the first I rows, up in the others.
        down_proj: [E, D, I].
        local: which of the model's experts these are, in order.
    """

    def __init__(self, local: Sequence[int], size: int, inner: int, build: Build) -> None:
        super().__init__()
        self.local = local
        count = len(local)
        self.gate_up_proj = build.weight(count, 2 * inner, size, fp8=True)
        self.down_proj = build.weight(count, size, inner, fp8=True)
        self._up_call, self._down_call = build.call(), build.call()

    def forward(
        self,
        rows_ND: Tensor,
        weights_N: Tensor,
        counts: Sequence[int],
        queue: WeightGradQueue | None = None,
    ) -> Tensor:
        """Each row by its expert's weights, times the router's weight of the row: [N, D].

        Args:
            rows_ND: grouped by expert; in FP8, tiles that they carry are taken as they are.
            weights_N: float32 at least.
            counts: the rows of each expert.
            queue: for weight gradients.
        """
        up_call, down_call = self._up_call, self._down_call
        if up_call is None or down_call is None:
            gate, up = grouped_linear(rows_ND, self.gate_up_proj, counts, queue).chunk(2, dim=-1)
            out_ND = grouped_linear(F.silu(gate) * up, self.down_proj, counts, queue)
            return (out_ND * weights_N.unsqueeze(-1)).to(out_ND.dtype)
        return swiglu_mlp(
            rows_ND,
            [self.gate_up_proj],
            self.down_proj,
            replace(up_call, queue=queue, counts=counts),
            replace(down_call, queue=queue, counts=counts),
            weights_N,
        )

    def set_name(self, name: str) -> None:
        """What errors call this layer."""
        if self._up_call is not None and self._down_call is not None:
            self._up_call = replace(self._up_call, name=f"{name}.gate_up_proj")
            self._down_call = replace(self._down_call, name=f"{name}.down_proj")

    def extra_repr(self) -> str:
        count, size, inner = self.down_proj.shape
        return f"{count} experts (from {self.local[0]}), {size} -> {inner} -> {size}"
