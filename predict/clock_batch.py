"""When the rows of one schedule end, for many sets of times at once.

What `parallel.schedule.clock.run` does for one set of times, with an array in the place of each
number: a walk over the steps costs about as much for hundreds of sets as it does for one. Messages
do not queue.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..parallel.schedule import Op, Pair, Schedule, Step
from ..parallel.schedule.graph import MISSING

Floats = NDArray[np.float64]

_MOST_BYTES = 64 << 20  # of the ends of all steps


class StepKind(NamedTuple):
    """What steps that take the same time have in common.

    Attributes:
        op: of a single action; None for a pair.
        stage: of the action, or of the pair's forward.
        backward: the stage of the pair's backward; 0 for a single action.
    """

    op: Op | None
    stage: int
    backward: int = 0


class BatchClock:
    """The clock of one schedule.

    Attributes:
        kinds: of its steps.
        most: how many sets of times are run at once, at most; more are run in turns.
    """

    def __init__(self, schedule: Schedule) -> None:
        graph = schedule.graph
        rank_of, first = graph.rank_of, graph.first
        numbers: dict[StepKind, int] = {}
        kind_of = [
            numbers.setdefault(_kind(step), len(numbers)) for row in schedule.rows for step in row
        ]
        self.kinds = tuple(numbers)
        self.most = max(1, _MOST_BYTES // (8 * max(1, graph.num_steps)))
        self._num_steps = graph.num_steps
        self._last = [after - 1 if start < after else None for start, after in pairwise(first)]
        # Per step, in an order in which they can run: itself, its kind, the step before it in its
        # row, and those of other ranks that it needs. What it needs of its own rank ended earlier.
        self._walk = [
            (
                step,
                kind_of[step],
                step - 1 if step != first[rank_of[step]] else None,
                [n for n in graph.needs[step] if n != MISSING and rank_of[n] != rank_of[step]],
            )
            for step in graph.order
        ]

    def row_ends(self, durations: Floats, send: Floats) -> Floats:
        """When the rows end.

        Args:
            durations: [kinds, sets], of each kind of steps.
            send: [sets], from the end of a step until another rank has its message.

        Returns:
            [ranks, sets]; 0 for a rank without steps.
        """
        sets = durations.shape[1]
        if sets <= self.most:
            return self._run(durations, send)
        turns = range(0, sets, self.most)
        return np.concatenate(
            [self._run(durations[:, i : i + self.most], send[i : i + self.most]) for i in turns],
            axis=1,
        )

    def _run(self, durations: Floats, send: Floats) -> Floats:
        sets = durations.shape[1]
        taken = list(np.ascontiguousarray(durations))
        ends = list(np.empty((self._num_steps, sets)))
        arrival, start = np.empty(sets), np.empty(sets)
        nothing = np.zeros(sets)
        add, maximum = np.add, np.maximum
        for step, kind, before, needs in self._walk:
            ready = nothing if before is None else ends[before]
            for need in needs:
                add(ends[need], send, out=arrival)
                ready = maximum(ready, arrival, out=start)
            add(ready, taken[kind], out=ends[step])
        return np.array([nothing if last is None else ends[last] for last in self._last])


def _kind(step: Step) -> StepKind:
    if isinstance(step, Pair):
        return StepKind(None, step.forward.stage, step.backward.stage)
    return StepKind(step.op, step.stage)
