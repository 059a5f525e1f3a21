"""From timed phases to those of a kind of layer: which rounds count, and what lanes come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..parallel.schedule.interleaving import PUBLISHED_ORDER
from ..parallel.simulate.phases import (
    BACKWARD,
    COMMUNICATION,
    FORWARD,
    NAMES,
    compose,
    duration,
    lane_of,
)
from ..predict.layout import Kind

COMMUNICATING = tuple(name for name in NAMES if lane_of(name) == COMMUNICATION)
WITHOUT_CORE = 0.05
FEWEST = 5  # rounds, for a median
_MOST_STRETCH = 64.0
_Times = dict[str, float]


@dataclass
class Round:
    """What one round has found, in ms.

    Attributes:
        phases: by context, "apart", "alone" or "paired", then by kind and phase.
        totals: of a forward "F", a backward "B" and a "pair".
        wall, computed: of all that computes on the host, the time and the processor time.
    """

    phases: dict[str, dict[tuple[Kind, str], float]] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)
    wall: float = 0.0
    computed: float = 0.0

    @property
    def without_core(self) -> float:
        """Share of the computing time in which others had this process's core."""
        return max(0.0, 1 - self.computed / self.wall) if self.wall else 0.0


def quiet(rounds: Sequence[Round], without_core: Sequence[float]) -> list[Round]:
    """The rounds in which every rank had a core to itself, or the few nearest to that.

    Args:
        rounds: of this rank.
        without_core: of each round, the greatest of all ranks.
    """
    order = sorted(range(len(rounds)), key=lambda index: without_core[index])
    enough = sum(share <= WITHOUT_CORE for share in without_core)
    return [rounds[index] for index in order[: max(enough, FEWEST)]]


@dataclass(frozen=True)
class PhaseResults:
    """What phases take, ms by kind of layer, each of `simulate.phases.NAMES`.

    Attributes:
        alone, paired: as of `predict.times.LayerTimes`.
        pair_gaps, overhead_ms: as of `predict.calibration.Calibration`; 1 and 0 where something
            communicates, as that was stretched.
        totals: a forward, a backward and a pair of the measured stage as they were.
    """

    alone: Mapping[Kind, Mapping[str, float]]
    paired: Mapping[Kind, Mapping[str, float]]
    pair_gaps: float
    overhead_ms: float
    totals: Mapping[str, float]


def fitted(
    phases: Mapping[str, Mapping[tuple[Kind, str], float]],
    totals: Mapping[str, float],
    *,
    local: bool,
) -> PhaseResults:
    """Times by kind, communication stretched so that the lanes come to the measured totals.

    Args:
        phases: ms by (kind, phase): "apart" of what communicates, each after the other, "alone"
            and "paired" of what computes.
        totals: ms of the stage's forward "F", backward "B" and "pair".
        local: every rank has all experts, so that rows are only reordered, in the time of mlp.
    """
    tables: dict[str, dict[Kind, _Times]] = {}
    for context in ("alone", "paired"):
        table = tables[context] = {}
        for source in ("apart", context):
            for (kind, phase), ms in phases[source].items():
                times = table.setdefault(kind, dict.fromkeys(NAMES, 0.0))
                if local and phase in COMMUNICATING:
                    times[f"mlp({phase[-2]})"] += ms
                else:
                    times[phase] += ms
    alone, paired = tables["alone"], tables["paired"]
    for table in (alone, paired):  # tokens have no gradient: all of that backward is its weights'
        times = table["embedding"]
        times["mlp(W)"], times["mlp(B)"] = times["mlp(W)"] + times["mlp(B)"], 0.0
    for kind, times in alone.items():
        paired.setdefault(kind, dict(times))  # nothing runs beside a head
    _stretch(alone, FORWARD, totals["F"])  # what is left over is in no phase
    overhead = max(0.0, totals["F"] - composed(alone, FORWARD))
    gaps = max(1.0, _stretch(paired, PUBLISHED_ORDER, totals["pair"] - overhead))
    return PhaseResults(alone, paired, gaps, overhead, dict(totals))


def composed(table: Mapping[Kind, Mapping[str, float]], order: Sequence[str]) -> float:
    """What the measured stage takes with these times: a step with the phases of `order`, ms."""
    layers = [table[kind] for kind in ("dense", "moe") if kind in table]
    beside = sum(table["embedding"][name] for name in order)
    forward = layers if FORWARD[0] in order else []
    backward = layers[::-1] if BACKWARD[0] in order else []
    return duration(compose(order, forward, backward)) + beside


def _stretch(table: dict[Kind, _Times], order: Sequence[str], total: float) -> float:
    """Stretch communication so that a step with the phases of `order` takes `total`, ms.

    Returns:
        `total` to what the phases then come to: other than 1 where nothing communicates.
    """
    moe = table.get("moe", {})
    apart = {name: moe[name] for name in order if moe and name in COMMUNICATING}
    low, high = 0.0, _MOST_STRETCH
    for _ in range(40 if any(apart.values()) else 0):
        middle = (low + high) / 2
        moe.update({name: ms * middle for name, ms in apart.items()})
        low, high = (middle, high) if composed(table, order) < total else (low, middle)
    return total / composed(table, order)
