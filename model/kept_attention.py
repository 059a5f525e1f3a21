"""What the attention core keeps for its backward: less than torch would.

The core's operator keeps queries, keys, values and its output. Here the first three can be made
again from the compressed latents, and the output is kept in E5M6, once, for the core and for the
linear layer after it (arXiv 2412.19437, sections 3.2.3 and 3.3.3). Whatever else an operator keeps,
such as the logarithms of its sums, is left to it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..fp8.e5m6 import Packed, pack_e5m6, unpack_e5m6


class Expanded(NamedTuple):
    """Queries, keys and values of all heads, [B, H, L, d], [B, H, L, d], [B, H, L, v]."""

    query: Tensor
    key: Tensor
    value: Tensor


class KeptAttention:
    """Stands between one call of the attention operator and what it wants to keep.

    Args:
        expanded: what the operator is called with.
        remake: makes queries, keys and values again; None keeps them as they are.
        e5m6: whether the output is to be kept in E5M6; then `pack` must be called with it.
    """

    def __init__(
        self, expanded: Expanded, remake: Callable[[], Expanded] | None, *, e5m6: bool
    ) -> None:
        self._remake = remake
        self._e5m6 = e5m6
        self._sizes = expanded.value.shape[1], expanded.value.shape[3]
        self._watched: dict[tuple[int, torch.Size], int] = {}
        self._inputs: set[tuple[int, torch.Size]] = set()
        self._remade: dict[int, Tensor] = {}
        self._packed: Packed | None = None
        self._dtype = expanded.value.dtype

    def watching(self, expanded: Expanded) -> AbstractContextManager[Any]:
        """The context in which the operator is called with `expanded` (values maybe padded)."""
        self._inputs = {_identity(x) for x in expanded}
        if self._remake is not None:
            self._watched = {_identity(x): i for i, x in enumerate(expanded)}
        self._shapes = [x.shape for x in expanded]
        return torch.autograd.graph.saved_tensors_hooks(self._put, self._get)

    def pack(self, out_BLW: Tensor) -> Callable[[], Tensor]:
        """Keep the output, [B, L, H * v], in E5M6; returns what makes it from that."""
        packed = pack_e5m6(out_BLW.detach())
        self._packed, dtype = packed, self._dtype
        return lambda: unpack_e5m6(packed, dtype)

    def _put(self, x: Tensor) -> object:
        """What stands for a tensor that the operator keeps: itself, or which of ours it is."""
        which = self._watched.get(_identity(x))
        if which is not None:
            return which
        out_shape = (*self._shapes[0][:3], self._shapes[2][3])
        if self._e5m6 and tuple(x.shape) == out_shape and _identity(x) not in self._inputs:
            return "output"
        return x.detach()  # an output with its graph would keep itself alive

    def _get(self, kept: object) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if isinstance(kept, int):
            return self._input(kept)
        assert self._packed is not None, "pack was not called with the output"
        heads, size = self._sizes
        out = unpack_e5m6(self._packed, self._dtype).unflatten(-1, (heads, size)).transpose(1, 2)
        return F.pad(out, (0, self._shapes[2][3] - size))

    def _input(self, which: int) -> Tensor:
        """A query, key or value; all three are made at once and given away one by one."""
        if which not in self._remade:
            assert self._remake is not None
            with torch.no_grad():
                made = self._remake()
            padding = self._shapes[2][3] - made.value.shape[-1]
            self._remade = dict(enumerate(made._replace(value=F.pad(made.value, (0, padding)))))
        return self._remade.pop(which)


def _identity(x: Tensor) -> tuple[int, torch.Size]:
    return x.data_ptr(), x.shape
