"""Costs from what the steps of a schedule were measured to take."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import TypeAlias

from ..schedule import Pair, Schedule, Step
from .costs import Costs

# What steps have one cost: kind and stage, or of a pair both stages.
_Kind: TypeAlias = tuple[str, int] | tuple[str, int, int]


def measured_costs(
    schedule: Schedule, durations: Iterable[tuple[Step, float]], unit: str = "ms"
) -> Costs:
    """The median of what each kind of step took, by stage; of a pair, by its two stages.

    Args:
        schedule: whose steps were measured.
        durations: its steps and how long each was busy; of one run or several, in any order.
        unit: of the times.

    Returns:
        Costs of this schedule's steps, without messages and without what follows the rows.

    Raises:
        ValueError: a kind of step that the schedule has was not measured; the message names one.
    """
    times: dict[_Kind, list[float]] = {}
    for step, time in durations:
        times.setdefault(_kind(step), []).append(time)
    medians = {kind: median(of) for kind, of in times.items()}
    for row in schedule.rows:
        for step in row:
            if _kind(step) not in medians:
                raise ValueError(f"no step such as {step} was measured")
    pairs = max((t for kind, t in medians.items() if kind[0] == "pair"), default=0.0)

    def by_stage(op: str, missing: float = 0.0) -> list[float]:
        return [medians.get((op, stage), missing) for stage in range(schedule.num_stages)]

    def pair(forward: int, backward: int) -> float:
        return medians.get(("pair", forward, backward), 0.0)

    # A stage may have its forwards in pairs only; some time is needed for the one of which it has
    # none.
    forwards = by_stage("F", missing=pairs)
    return Costs(
        F=forwards, I=by_stage("I"), W=by_stage("W"), B=by_stage("B"), pair=pair, unit=unit
    )


def _kind(step: Step) -> _Kind:
    if isinstance(step, Pair):
        return "pair", step.forward.stage, step.backward.stage
    return step.op.value, step.stage
