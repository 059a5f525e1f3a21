"""What the attention core keeps for its backward: less than torch would.

The core's operator keeps queries, keys, values and its output. Here the first three can be made
again from the compressed latents, and the output is kept in E5M6, once, for the core and for the
linear layer after it (arXiv 2412.19437, sections 3.2.3 and 3.3.3). Whatever else an operator keeps,
such as the logarithms of its sums, is left to it.

Which tensor is which is told by its memory: an operator that is not fused keeps other tensors, its
scores among them, whose shape may be that of the output.

Shapes: B sequences, L positions, H heads, d a head's size, W = H * v where v are a head's values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..fp8.carried import carry
from ..fp8.e5m6 import pack_e5m6, unpack_e5m6


class Expanded(NamedTuple):
    """Queries, keys and values of all heads, [B, H, L, d], [B, H, L, d], [B, H, L, v]."""

    query: Tensor
    key: Tensor
    value: Tensor


def keeping_less(
    operator: Callable[[Expanded], Tensor],
    expanded: Expanded,
    size: int,
    *,
    remake: Callable[[], Expanded] | None,
    e5m6: bool,
) -> Tensor:
    """The output of all heads, side by side: [B, L, W].

    Args:
        operator: attention, as [B, H, L, d], d >= v, of which the first v numbers count.
        expanded: what it is called with.
        size: v.
        remake: makes `expanded` again, the same bits; None keeps what the operator keeps of it.
        e5m6: keep the output in E5M6, and let the result carry how it is made again from that.
    """
    kept = _Kept(expanded, remake)
    with torch.autograd.graph.saved_tensors_hooks(kept.put, kept.get):
        out_BHLd = operator(expanded)
    out_BLW = beside(out_BHLd, size)
    if e5m6 and out_BLW.requires_grad:
        packed, dtype = pack_e5m6(out_BLW.detach()), out_BLW.dtype
        kept.replace(out_BHLd, lambda: unpack_e5m6(packed, dtype), size)
        carry(out_BLW, remake=lambda: unpack_e5m6(packed, dtype))
    kept.boxes.clear()  # from here on they belong to autograd's graph
    return out_BLW


def beside(out_BHLd: Tensor, size: int) -> Tensor:
    """The first `size` numbers of all heads, side by side: [B, L, H * size]."""
    return out_BHLd[..., :size].transpose(1, 2).flatten(2)


def widened(x: Tensor, size: int) -> Tensor:
    """[..., n] -> [..., size], filled up with zeros; x itself if nothing is to be filled."""
    missing = size - x.shape[-1]
    return F.pad(x, (0, missing)) if missing else x


@dataclass
class _Box:
    """A tensor that the operator keeps, or what makes it."""

    content: Tensor | Callable[[], Tensor]


class _Kept:
    """What the graph holds in place of the tensors that one call of the operator keeps.

    The graph holds this object too, which therefore must not hold what need not be kept.

    Attributes:
        boxes: of what was kept so far and is not made again from the latents.
    """

    def __init__(self, expanded: Expanded, remake: Callable[[], Expanded] | None) -> None:
        self.boxes: list[_Box] = []
        self._remake = remake
        self._remade: dict[int, Tensor] = {}
        self._places: dict[_Memory, int] = {}
        if remake is not None:
            self._places = {_Memory.of(x): place for place, x in enumerate(expanded)}

    def put(self, x: Tensor) -> _Box:
        """The box for a tensor that the operator keeps."""
        place = self._places.get(_Memory.of(x))
        if place is not None:
            return _Box(lambda: self._input(place))
        box = _Box(x.detach())  # an output with its graph would keep itself alive
        self.boxes.append(box)
        return box

    def get(self, box: _Box) -> Tensor:
        """What is in a box."""
        return box.content if isinstance(box.content, Tensor) else box.content()

    def replace(self, out_BHLd: Tensor, unpack: Callable[[], Tensor], size: int) -> None:
        """Empty the boxes that hold the output, which `unpack` gives as [B, L, H * size]."""
        heads, wide = out_BHLd.shape[1], out_BHLd.shape[3]

        def unpacked() -> Tensor:
            out_BHLv = unpack().unflatten(-1, (heads, size)).transpose(1, 2)
            return widened(out_BHLv, wide)

        memory = _Memory.of(out_BHLd)
        for box in self.boxes:
            if isinstance(box.content, Tensor) and _Memory.of(box.content) == memory:
                box.content = unpacked

    def _input(self, place: int) -> Tensor:
        """A query, key or value; all three are made at once and given away one by one."""
        if place not in self._remade and self._remake is not None:
            with torch.no_grad():
                self._remade = dict(enumerate(self._remake()))
        return self._remade.pop(place)


class _Memory(NamedTuple):
    """Which numbers in memory a tensor is; two that are alive at once are the same if this is."""

    address: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, x: Tensor) -> _Memory:
        return cls(x.data_ptr(), x.dtype, tuple(x.shape), x.stride())
