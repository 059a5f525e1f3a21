"""A row's difference from its prediction by phase: how wrong each was, and what that added."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from .comparison import RankDifference


class PhaseShare(NamedTuple):
    """All stretches of a row that belong to one phase.

    Attributes:
        name: of the phase; of what has none the part, such as "standing".
        measured, simulated: lengths in the row, ns. Time in which several things ran counts for
            the first that `comparison` names, so that the lengths add up to the row.
    """

    name: str
    measured: int
    simulated: int

    @property
    def difference(self) -> int:
        """What it added to the row."""
        return self.measured - self.simulated

    @property
    def ratio(self) -> float | None:
        """Measured to simulated; None where nothing was simulated for it."""
        return self.measured / self.simulated if self.simulated else None


def by_phase(rank: RankDifference) -> tuple[PhaseShare, ...]:
    """The row by phase, the largest difference first; the differences add up to the row's."""
    found: defaultdict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for part in rank.parts:
        name = part.phase or part.part
        measured, simulated = found[name]
        found[name] = measured + part.measured, simulated + part.simulated
    shares = (PhaseShare(name, *both) for name, both in found.items())
    return tuple(sorted(shares, key=lambda share: (-abs(share.difference), share.name)))
