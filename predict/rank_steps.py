"""What each rank has to do in each step: the phases, the rows that it gets, and its noise.

Shapes: g expert groups of R ranks each.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..parallel.schedule import Action, Op, Pair, Schedule, Step
from .jitter import Noise
from .loads import Floats
from .programs import Program, has_experts, lay_out
from .routing import Drawn, GroupRouting
from .times import LayerTimes


class Steps:
    """What ranks have to do in a step: its phases, and how many rows each rank has.

    A chunk's rows are the same in its forward and its backward; they are kept in between.
    """

    def __init__(
        self,
        schedule: Schedule,
        stages: Sequence[Sequence[LayerTimes]],
        order: tuple[str, ...],
        overlap: bool,
        routing: GroupRouting | None,
        seed: int,
    ) -> None:
        self._stages, self._order, self._overlap = stages, order, overlap
        self._programs: dict[object, Table] = {}
        self._routing = routing if routing is not None and routing.is_random else None
        self._seed = seed
        counts = [sum(map(has_experts, stage)) for stage in stages]
        self._experts = [range(sum(counts[:s]), sum(counts[: s + 1])) for s in range(len(counts))]
        self._drawn: dict[tuple[int, int], Drawn] = {}
        self._forward_only = not schedule.has_backward

    def table(self, step: Step) -> Table:
        """The phases of a step."""
        if isinstance(step, Pair):
            key: object = (step.forward.stage, step.backward.stage)
        else:
            key = (step.op, step.stage)
        if key not in self._programs:
            laid_out = lay_out(self._stages, step, self._order, overlap=self._overlap)
            self._programs[key] = Table(laid_out)
        return self._programs[key]

    def loads(self, step: Step, groups: int) -> tuple[Drawn | None, Drawn | None]:
        """Of a step's forward and of its backward; None where there is none, or it is even."""
        if self._routing is None:
            return None, None
        if isinstance(step, Pair):
            return self._of(step.forward, groups), self._of(step.backward, groups)
        drawn = self._of(step, groups)
        return (drawn, None) if step.op is Op.F else (None, drawn)

    def _of(self, action: Action, groups: int) -> Drawn | None:
        layers = self._experts[action.stage]
        if not layers:
            return None
        key = (action.stage, action.microbatch)
        if key not in self._drawn:
            assert self._routing is not None  # `loads` asks for it
            drawn = self._routing.draw(layers, action.microbatch, groups, self._seed)
            if self._forward_only:
                return drawn
            self._drawn[key] = drawn
        # Nothing of a chunk comes after its B or W.
        return self._drawn.pop(key) if action.op in (Op.B, Op.W) else self._drawn[key]


class Table:
    """A program, with the base times of its computation as arrays.

    Attributes:
        program: the phases.
        rows: of each phase, its row in `durations` if it computes.
    """

    def __init__(self, laid_out: Program) -> None:
        self.program = laid_out
        computing = [phase for phase in laid_out.phases if phase.computes]
        self._fixed = np.array([phase.ms * (1 - phase.routed) for phase in computing])
        self._fixed = self._fixed[:, None, None]
        self._routed: list[tuple[list[int], list[int], Floats]] = []
        for backward in (False, True):
            found = [
                (row, phase.experts, phase.ms * phase.routed)
                for row, phase in enumerate(computing)
                if phase.routed and phase.backward is backward
            ]
            rows, layers = [row for row, _, _ in found], [layer for _, layer, _ in found]
            proportional = np.array([ms for _, _, ms in found])[:, None, None]
            self._routed.append((rows, layers, proportional))
        self._mean = np.array([phase.ms for phase in computing])[:, None, None]

    def durations(
        self, loads: tuple[Drawn | None, Drawn | None], shape: tuple[int, int], noise: Noise, p: int
    ) -> Floats:
        """[phases that compute, g, R] or, where all ranks are alike, [phases that compute, 1, 1].

        Args:
            loads: of the forward and the backward.
            shape: (g, R).
            noise: of times.
            p: pipeline rank.
        """
        times = self._mean
        if any(drawn is not None for drawn in loads):
            times = np.empty((len(self._mean), *shape))
            times[:] = self._mean
            for drawn, (rows, layers, proportional) in zip(loads, self._routed, strict=True):
                if rows and drawn is not None:
                    times[rows] = self._fixed[rows] + proportional * drawn.rows[layers]
        return noise.computation(times, p)
