"""What the steps of a schedule take, for many layouts at once.

What `costs.phases_of` composes for one layout, with an array in the place of each number: which
phases a chunk has, and on which lanes, is the same for all layouts of a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..parallel.schedule import Op
from ..parallel.schedule.interleaving import PUBLISHED_ORDER
from ..parallel.simulate.phases import (
    BACKWARD,
    BEFORE,
    COMMUNICATION,
    COMPUTE,
    FORWARD,
    NAMES,
    WEIGHTS,
    lane_of,
)
from .clock_batch import StepKind
from .times import LayerTimes

Floats = NDArray[np.float64]
Chunk = tuple[int, ...]
"""The layers of a stage in the order of the forward, each as an index into a table of layers."""

_Layer = Mapping[str, Floats]
_BACKWARD_ORDER = tuple(name for name in PUBLISHED_ORDER if name not in FORWARD)
_SINGLE = {Op.F: FORWARD, Op.I: BACKWARD, Op.W: tuple(WEIGHTS)}


def table_of(layers: Sequence[LayerTimes]) -> Floats:
    """Times of layers, ms: [layers, 2 (alone, paired), NAMES]."""
    return np.array(
        [[[times[name] for name in NAMES] for times in (one.alone, one.paired)] for one in layers]
    )


class ChunkTimes:
    """Times of steps, ms, by the chunks that they run. Arrays are [layouts].

    Args:
        tables: [layouts, layers, 2, NAMES], the tables of each layout.
        overlap: phases run on two lanes; without, one after the other, at their times alone.
        overhead_ms: that a step takes besides its phases.
    """

    def __init__(self, tables: Floats, *, overlap: bool, overhead_ms: float) -> None:
        columns = np.ascontiguousarray(tables.transpose(1, 2, 3, 0))
        self._alone, self._paired = (
            [dict(zip(NAMES, layer[way], strict=True)) for layer in columns] for way in (0, 1)
        )
        self._overlap, self._overhead_ms = overlap, overhead_ms
        self._zero = np.zeros(len(tables))
        self._known: dict[tuple[Op | None, Chunk, Chunk], Floats] = {}

    def of(self, kind: StepKind, chunk: Chunk, backward: Chunk) -> Floats:
        """Of one kind of step.

        Args:
            kind: of the step.
            chunk: of its stage; of a pair, of the forward's.
            backward: of a pair, of the backward's.
        """
        key = (kind.op, chunk, backward if kind.op is None else ())
        if key not in self._known:
            self._known[key] = self._step(*key) + self._overhead_ms
        return self._known[key]

    def _step(self, op: Op | None, chunk: Chunk, backward: Chunk) -> Floats:
        alone, paired = self._alone, self._paired
        if op is None and self._overlap:
            beside = min(len(chunk), len(backward))
            forward = [paired[i] for i in chunk[:beside]] + [alone[i] for i in chunk[beside:]]
            return self._lanes(forward, [paired[i] for i in backward[::-1]])
        if op is None:
            return self._step(Op.F, chunk, ()) + self._step(Op.B, backward, ())
        if op is Op.B and self._overlap:
            return self._lanes([], [paired[i] for i in chunk[::-1]])
        names = _SINGLE.get(op, _BACKWARD_ORDER)
        return sum((alone[i][name] for i in chunk for name in names), self._zero)

    def _lanes(self, forward: Sequence[_Layer], backward: Sequence[_Layer]) -> Floats:
        """As `simulate.phases.compose` in the published order; when the last phase ends."""
        free = {COMPUTE: self._zero, COMMUNICATION: self._zero}
        reached = {FORWARD: self._zero, BACKWARD: self._zero}  # by the layers before, each way
        for layer in range(max(len(forward), len(backward))):
            ended: dict[str, Floats] = {}
            for name in PUBLISHED_ORDER:
                way = FORWARD if name in FORWARD else BACKWARD
                layers = forward if way is FORWARD else backward
                if layer >= len(layers):
                    continue
                lane = lane_of(name)
                ready = ended[BEFORE[name]] if name in BEFORE else reached[way]
                ended[name] = free[lane] = np.maximum(free[lane], ready) + layers[layer][name]
            for way in reached:
                reached[way] = ended.get(way[-1], reached[way])
        return np.maximum(free[COMPUTE], free[COMMUNICATION])
