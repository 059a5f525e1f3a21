"""The three elementary layers: matrix product, norm, embedding. They start uninitialised.

Initial values are a function of a parameter's name (see `initialise`), so nothing here draws
random numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..parallel.chunk import WeightGradQueue
from ..parallel.deferred import linear


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype of what must not be computed below float32: norms, rotation, routing, losses."""
    return torch.promote_types(dtype, torch.float32)


class Linear(nn.Module):
    """`x @ weight.T`, its weight gradient left to a queue.

    Attributes:
        weight: [out_features, in_features].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(out_features, in_features, dtype=dtype, device=device)
        )

    def forward(self, x: Tensor, queue: WeightGradQueue | None = None) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return linear(x, self.weight, None, queue)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}"


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 at least.

    Attributes:
        weight: [size].
    """

    def __init__(
        self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size], same dtype."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)  # computes in float32

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class Embedding(nn.Module):
    """Rows of a table.

    Attributes:
        weight: [vocabulary, hidden].
    """

    def __init__(
        self, vocab_size: int, size: int, *, dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, size, dtype=dtype, device=device))

    def forward(self, tokens: Tensor) -> Tensor:
        """[...] int64 -> [..., hidden]."""
        return F.embedding(tokens, self.weight)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]} x {self.weight.shape[1]}"
