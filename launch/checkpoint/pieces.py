"""What a checkpoint holds, as values: pieces of named tensors, and numbers beside them.

Every tensor is saved by the name it has in the whole run, flattened in row-major order. A rank
holds stretches of it: all, its experts', or its ZeRO-1 share. Where the stretches begin and end is
not part of the state, so a run of another layout reads the same names with stretches of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """A stretch of a named tensor's elements that this rank holds.

    Replicas of a tensor hold equal pieces: the same stretches, the same values.

    Attributes:
        name: of the tensor, the same on all ranks: "parameters/model.norm.weight".
        shape: of the whole tensor.
        offset: of the first element, in the flattened whole.
        data: the elements, [n], contiguous; saving reads them, loading writes into them.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    data: Tensor

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)


class Stretch(NamedTuple):
    """`length` elements from `local` on in a rank's flattened tensor; `whole`: where in the whole.

    A rank's tensor is told as stretches in ascending order of `local`, without gaps.
    """

    local: int
    whole: int
    length: int


@dataclass(frozen=True)
class Held:
    """How a rank's tensor lies in the whole one.

    Attributes:
        shape: of the whole tensor.
        stretches: of the rank's tensor, which together cover it.
    """

    shape: tuple[int, ...]
    stretches: tuple[Stretch, ...]

    @classmethod
    def entire(cls, tensor: Tensor) -> Held:
        """A tensor that this rank has whole."""
        return cls(tuple(tensor.shape), (Stretch(0, 0, tensor.numel()),))

    @classmethod
    def rows(cls, tensor: Tensor, rows: Sequence[int], num_rows: int) -> Held:
        """A tensor [n, ...] whose row i is row `rows[i]` of a whole one with `num_rows` rows."""
        size = tensor[0].numel() if len(rows) else 0
        stretches: list[Stretch] = []
        for i, row in enumerate(rows):
            last = stretches[-1] if stretches else None
            if last and last.whole + last.length == row * size:
                stretches[-1] = last._replace(length=last.length + size)
            else:
                stretches.append(Stretch(i * size, row * size, size))
        return cls((num_rows, *tensor.shape[1:]), tuple(stretches))

    def pieces(self, name: str, flat: Tensor, start: int = 0) -> Iterator[Piece]:
        """The pieces in `flat`, which is the rank's flattened tensor from element `start` on.

        Args:
            name: of the whole tensor.
            flat: [n], contiguous; all of the rank's tensor, or a share of it.
            start: of that share within the rank's flattened tensor.
        """
        end = start + flat.numel()
        for stretch in self.stretches:
            first, last = max(start, stretch.local), min(end, stretch.local + stretch.length)
            if first < last:
                offset = stretch.whole + first - stretch.local
                yield Piece(name, self.shape, offset, flat[first - start : last - start])


@dataclass(frozen=True)
class State:
    """Everything that a checkpoint holds, as one rank has it.

    Attributes:
        pieces: tensors; over all ranks they cover every name's whole.
        values: plain JSON, the same on every rank: step, data position, what the run is.
        own: plain JSON of this rank alone, such as random states; read again only by a run of as
            many ranks.
    """

    pieces: Sequence[Piece]
    values: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Any] = field(default_factory=dict)
