"""Simulated steps to make pictures of."""

from __future__ import annotations

from counterflow.parallel.schedule import build
from counterflow.parallel.simulate import Costs, Phases, Result, simulate
from counterflow.parallel.simulate.phases import NAMES

UNIT = Costs(F=1, I=1, W=1, pair=3)
WITH_ALL = Costs(
    phases=Phases(dict.fromkeys(NAMES, 1.5), layers=2),
    send=0.25,
    message=3,
    bandwidth=2,
    reduce=3,
    mirror=2,
    optimizer=1,
    unit="ms",
)


def simulated(name: str, ranks: int, microbatches: int, costs: Costs = UNIT) -> Result:
    """A named schedule, simulated."""
    return simulate(build(name, ranks=ranks, microbatches=microbatches), costs)
