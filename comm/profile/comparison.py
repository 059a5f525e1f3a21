"""What a run's trace says beside its simulation. Times are whole nanoseconds.

A rank's row, from the start of its first action to the end of its last, is cut into stretches. With
clocks that agree, the row is taken from the first action of any rank to the end of the last of any:
then its length is the makespan. Each stretch belongs to an action or lies before, between or after
the actions, and each has one part, the first that applies of

    computing    something computes, whatever else runs
    transfer     only communication runs, and something in it moves data
    waiting      only notifications, barriers or waits for a message run
    copying      only copies or fills run
    standing     nothing runs

The simulated row is cut in the same way, so that its length and the measured one are both the sum
of their parts, and the difference of the two is the sum of the parts' differences: exactly, because
simulated times are rounded to whole nanoseconds before they are cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

COMPUTING = "computing"
TRANSFER = "transfer"
WAITING = "waiting"
COPYING = "copying"
STANDING = "standing"
PARTS = (COMPUTING, TRANSFER, WAITING, COPYING, STANDING)

# Kinds of a stretch that belongs to no action. Those of actions are "F", "B", "I", "W", "pair".
BEFORE = "before"
BETWEEN = "between"
AFTER = "after"
OUTSIDE = (BEFORE, BETWEEN, AFTER)


class ActionTime(NamedTuple):
    """One action of a rank's row, over the training steps of the trace.

    Attributes:
        rank: of the trace.
        name: such as "0F3" or "(0F7;7B3)".
        kind: "F", "B", "I", "W" or "pair".
        stage: such as "0"; of a pair the forward's and the backward's, "0;7".
        measured: median over the steps; an action's time is from the start of its first activity to
            the end of its last, without waits for messages that end before anything else ran.
        simulated: its simulated duration.
        starts: when it starts in its row, measured (median) and simulated.
    """

    rank: int
    name: str
    kind: str
    stage: str
    measured: int
    simulated: int
    starts: tuple[int, int]


@dataclass(frozen=True)
class KindTime:
    """Actions of one kind and stage, over all ranks: medians of their times.

    Attributes:
        kind, stage: as of `ActionTime`.
        count: actions in a training step.
        measured, simulated: medians.
    """

    kind: str
    stage: str
    count: int
    measured: int
    simulated: int

    @property
    def ratio(self) -> float | None:
        """Measured to simulated; None where nothing was simulated for it."""
        return self.measured / self.simulated if self.simulated else None


@dataclass(frozen=True)
class PhaseTime:
    """One phase, a run of which is one layer's: medians over all runs of all ranks.

    Attributes:
        name: such as "dispatch(F)".
        kind: of the actions that it was part of, as of `ActionTime`; "" where the trace marks none.
        lane: "compute" or "communication": of which of the two the phase mostly is.
        count: runs that were measured.
        measured: busy time of a run: its computation, or its transfer.
        waiting: of a run, notifications and barriers, which `measured` leaves out.
        exposed: of a run's communication, waiting included, how much nothing computed behind.
        simulated: time of a simulated run; None if the simulation has no such phase.
        simulated_exposed: of it, how much is communication that nothing computes behind.
    """

    name: str
    kind: str
    lane: str
    count: int
    measured: int
    waiting: int
    exposed: int
    simulated: int | None
    simulated_exposed: int | None

    @property
    def ratio(self) -> float | None:
        """Measured to simulated; None where nothing was simulated for it."""
        return self.measured / self.simulated if self.simulated else None


class Part(NamedTuple):
    """Stretches of a row that are of one kind, part and phase.

    Attributes:
        kind: of the action, "F", "B", "I", "W" or "pair"; of what lies in none BEFORE, BETWEEN or
            AFTER.
        part: one of PARTS.
        phase: of what runs; "" where it belongs to none, or nothing runs.
        measured, simulated: lengths in all.
    """

    kind: str
    part: str
    phase: str
    measured: int
    simulated: int

    @property
    def difference(self) -> int:
        """How much longer it was than simulated."""
        return self.measured - self.simulated


@dataclass(frozen=True)
class RankDifference:
    """One rank's row in the training step of median length (of two, the shorter).

    `measured - simulated == sum(part.difference for part in parts)`.

    Attributes:
        rank: of the trace.
        pipeline_rank: of the simulation.
        step: the training step, as the trace names it, or a number from 0; or such as "pair 2".
        measured, simulated: the row's length.
        parts: the largest difference first.
    """

    rank: int
    pipeline_rank: int
    step: str
    measured: int
    simulated: int
    parts: tuple[Part, ...]

    @property
    def difference(self) -> int:
        """How much longer the row was than simulated."""
        return self.measured - self.simulated

    @property
    def busy(self) -> int:
        """Measured time in actions."""
        return sum(part.measured for part in self.parts if part.kind not in OUTSIDE)


@dataclass(frozen=True)
class Comparison:
    """What was measured, beside what was simulated.

    Attributes:
        source: the file of the simulation.
        schedule: its name.
        unit: of the simulation's times, such as "ms"; "" if it had none that is a time.
        ns_per_unit: what one of them is.
        fitted: that was not told, but chosen so that the median action or phase agrees.
        steps: training steps that were compared.
        actions: of every rank, in the order of the simulated rows.
        kinds: by kind and stage.
        phases: by kind and phase.
        together: rows are from the first start to the last end of any rank: the makespan.
        ranks: what explains the difference of each rank's row. Of traces without marked actions it
            is that of a pair, if pairs of as many layers were simulated; empty otherwise.
        pair: measured and simulated time of one layer of a pair, of a trace that marks phases and
            no actions; None otherwise.
        findings: what explains the difference, in sentences, the largest first.
        missing: what could not be compared, and why, in sentences.
    """

    source: str
    schedule: str
    unit: str
    ns_per_unit: float
    fitted: bool
    steps: int
    actions: tuple[ActionTime, ...]
    kinds: tuple[KindTime, ...]
    phases: tuple[PhaseTime, ...]
    together: bool
    ranks: tuple[RankDifference, ...]
    pair: tuple[int, int] | None
    findings: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def longest(self) -> RankDifference | None:
        """The rank whose row took longest; of several, the one with most time in actions."""
        return max(self.ranks, key=lambda rank: (rank.measured, rank.busy), default=None)
