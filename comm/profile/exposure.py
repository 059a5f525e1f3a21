"""Where communication was exposed, stretch by stretch."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from .intervals import lengths_within
from .kernel_table import COMMUNICATION, COMPUTE
from .phases import Run
from .pieces import Piece
from .report import Exposed
from .trace import Interval


def exposed_stretches(
    pieces: Sequence[Piece],
    exposed: Sequence[Interval],
    transfer: Sequence[Interval],
    runs: Sequence[Run],
) -> tuple[Exposed, ...]:
    """The exposed intervals, cut where another run of a phase communicates; the longest first.

    Where several communicate at once, a stretch belongs to the one that began first, so that the
    stretches are disjoint and their lengths add up to what is exposed.

    Args:
        pieces: what ran, in the order of its start.
        exposed: where communication ran and no computation did.
        transfer: where communication ran that does not merely wait.
        runs: of phases, that pieces refer to.
    """
    computing = [piece for piece in pieces if piece.group == COMPUTE]
    starts = [piece.start for piece in computing]
    owned = _owned(pieces, exposed)
    transferring = lengths_within(transfer, [interval for interval, _ in owned])
    found: list[Exposed] = []
    for (interval, owner), moved in zip(owned, transferring, strict=True):
        name, layer = (runs[owner].name, runs[owner].layer) if owner >= 0 else ("", None)
        place = bisect_left(starts, interval[1])
        following = computing[place].run if place < len(computing) else -1
        next_phase = runs[following].name if following >= 0 else ""
        waiting = interval[1] - interval[0] - moved
        found.append(Exposed(interval, name, layer, next_phase, waiting))
    return tuple(sorted(found, key=lambda one: (one.interval[0] - one.interval[1], one.interval)))


def _owned(pieces: Sequence[Piece], exposed: Sequence[Interval]) -> list[tuple[Interval, int]]:
    """The exposed intervals in parts, each with the run that communicated first in it."""
    parts: list[tuple[Interval, int]] = []
    place, owned_to = 0, 0
    for piece in pieces:
        if piece.group != COMMUNICATION or piece.end <= owned_to:
            continue
        start, owned_to = max(piece.start, owned_to), piece.end
        while place < len(exposed) and exposed[place][1] <= start:
            place += 1
        ahead = place
        while ahead < len(exposed) and exposed[ahead][0] < owned_to:
            part = (max(exposed[ahead][0], start), min(exposed[ahead][1], owned_to))
            ahead += 1
            if parts and parts[-1][1] == piece.run and parts[-1][0][1] == part[0]:
                parts[-1] = ((parts[-1][0][0], part[1]), piece.run)
            else:
                parts.append((part, piece.run))
    return parts
