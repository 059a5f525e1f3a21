"""Transfer and waiting of matched collectives: the minimum-over-ranks method of `ranks`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .matching import Matched


@dataclass(frozen=True)
class Share:
    """One rank's part in some collectives that were matched across ranks. Times are ns.

    Attributes:
        rank: whose.
        count: collectives that it took part in.
        transfer: sum over them of the shortest duration of any rank.
        skew: sum of what it took beyond that: its waiting for ranks that came later.
        last: how many it was the last to arrive at: it had the shortest duration, and somebody a
            longer one.
        held_up: sum over those of all other ranks' skew: time of ranks that it cost. Ranks that
            arrive last together share it, the first of them what is left over of whole ns: over
            all ranks the sum is that of their skew.
    """

    rank: int
    count: int
    transfer: int
    skew: int
    last: int
    held_up: int


@dataclass(frozen=True)
class PhaseAcross:
    """One phase's collectives on all ranks.

    Attributes:
        name: of the phase, such as "dispatch(F)"; for what belongs to none, the collective's kind.
        count: collectives matched.
        transfer: sum of their shortest durations, ns.
        shares: by rank, of the ranks that take part.
    """

    name: str
    count: int
    transfer: int
    shares: tuple[Share, ...]

    @property
    def skew(self) -> int:
        """Waiting of all ranks together, ns."""
        return sum(share.skew for share in self.shares)


def shares_of(matched: Iterable[Matched]) -> dict[int, Share]:
    """Each rank's part in the collectives that it takes part in, by rank."""
    sums: dict[int, list[int]] = {}
    for one in matched:
        durations = {rank: part.duration for rank, part in one.parts.items()}
        shortest = min(durations.values())
        waited = sum(durations.values()) - shortest * len(durations)
        num_last = list(durations.values()).count(shortest)
        left_over = waited % num_last
        for rank, duration in durations.items():
            mine = sums.setdefault(rank, [0] * 5)
            mine[0] += 1
            mine[1] += shortest
            mine[2] += duration - shortest
            if duration == shortest and waited:
                mine[3] += 1
                mine[4] += waited // num_last + left_over
                left_over = 0
    return {rank: Share(rank, *sums[rank]) for rank in sorted(sums)}


def by_phase(matched: Iterable[Matched]) -> tuple[PhaseAcross, ...]:
    """Transfer and waiting by phase, in the order of first appearance."""
    phases: dict[str, list[Matched]] = {}
    for one in matched:
        phases.setdefault(one.first.name, []).append(one)
    return tuple(
        PhaseAcross(
            name,
            len(parts),
            sum(min(part.duration for part in one.parts.values()) for one in parts),
            tuple(shares_of(parts).values()),
        )
        for name, parts in phases.items()
    )
