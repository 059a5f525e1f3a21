"""The simulation inside a plan, in the form of `counterflow simulate --json`.

`counterflow profile --against` lays a measured run beside it. Times are ms.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

from ..parallel.schedule import Pair, Step
from ..parallel.simulate import Memory, memory_of
from ..parallel.simulate.phases import PhaseSpan
from ..predict.costs import phases_of
from .simulate_command import Answer as Simulated
from .simulate_json import to_json

if TYPE_CHECKING:
    from ..predict.prediction import Prediction

_DIGITS = 6  # a phase is told to the nanosecond


def simulation(prediction: Prediction) -> dict[str, object]:
    """One object with the keys of `simulate --json`; phases are of each stage's own layers."""
    result = prediction.result
    shown = to_json(Simulated(result.schedule, result, memory_of(result, Memory()), None))
    stages, overlap = prediction.stages, prediction.layout.overlap
    made: dict[Hashable, tuple[PhaseSpan, ...]] = {}
    rows: list[list[list[list[object]]]] = []
    for row in result.spans:
        rows.append([])
        for step, start, end in row:
            kind = _kind(step)
            if kind not in made:
                made[kind] = phases_of(stages, step, overlap=overlap)
            rows[-1].append(_placed(made[kind], start, end))
    return {**shown, "unit": "ms", "phases": rows}


def _kind(step: Step) -> Hashable:
    """What the phases of a step depend on: it, but for the micro-batch."""
    if isinstance(step, Pair):
        return step.forward.stage, step.backward.stage
    return step.op, step.stage


def _placed(phases: tuple[PhaseSpan, ...], start: float, end: float) -> list[list[object]]:
    """Phases from a step's start, none of them beyond its end, and none that takes no time."""
    return [
        [
            phase.name,
            phase.layer,
            phase.lane,
            round(start + phase.start, _DIGITS),
            round(min(start + phase.end, end), _DIGITS),
        ]
        for phase in phases
        if phase.end > phase.start
    ]
