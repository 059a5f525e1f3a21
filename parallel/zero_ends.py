"""Where in a rank's row each of its stages begins and ends its part of a step, and how much goes in
one message then. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from .schedule import Op, Step, actions

# Of the gradients in a bucket: large enough for a network's bandwidth, small enough that the first
# bucket leaves before the last is packed.
BUCKET_BYTES = 32 << 20


class StageEnds(NamedTuple):
    """Stages by the index of a step in the row, in the order of the row.

    Attributes:
        begins: stages whose first action is in this step, which is where parameters are read first.
        ends: stages whose last backward is in this step, B, I or W: their gradients are complete.
    """

    begins: Mapping[int, tuple[int, ...]]
    ends: Mapping[int, tuple[int, ...]]


def stage_ends(row: Sequence[Step]) -> StageEnds:
    """Find them in a rank's row."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for index, step in enumerate(row):
        for action in actions(step):
            first.setdefault(action.stage, index)
            if action.op is not Op.F:
                last[action.stage] = index
    return StageEnds(_by_index(first), _by_index(last))


class StageCalls:
    """Whom to call around the first and last actions of stages.

    Args:
        row: of this rank.
        on_begin, on_end: called with a stage, see `Pipeline.step`; None for nobody.
    """

    def __init__(
        self,
        row: Sequence[Step],
        on_begin: Callable[[int], object] | None,
        on_end: Callable[[int], object] | None,
    ) -> None:
        self._ends = stage_ends(row)
        self._on_begin, self._on_end = on_begin, on_end

    def before(self, index: int) -> None:
        """Step `index` of the row is due."""
        if self._on_begin is not None:
            for stage in self._ends.begins.get(index, ()):
                self._on_begin(stage)

    def after(self, index: int) -> None:
        """Step `index` of the row is done."""
        if self._on_end is not None:
            for stage in self._ends.ends.get(index, ()):
                self._on_end(stage)


def _by_index(index_of: Mapping[int, int]) -> dict[int, tuple[int, ...]]:
    stages: dict[int, tuple[int, ...]] = {}
    for stage, index in sorted(index_of.items(), key=lambda item: (item[1], item[0])):
        stages[index] = (*stages.get(index, ()), stage)
    return stages
