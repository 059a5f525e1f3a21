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

# Of all that is exposed: of shorter stretches it is not asked what was before.
_LEAST_SHARE = 0.01


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
    least = _LEAST_SHARE * sum(end - start for start, end in exposed)
    by_lane: dict[str, list[Piece]] = {}
    for piece in pieces:
        by_lane.setdefault(piece.lane, []).append(piece)
    found: list[Exposed] = []
    for (interval, owner), moved in zip(owned, transferring, strict=True):
        run = owner.run
        name, layer = (runs[run].name, runs[run].layer) if run >= 0 else ("", None)
        place = bisect_left(starts, interval[1])
        following = computing[place].run if place < len(computing) else -1
        next_phase = runs[following].name if following >= 0 else ""
        long = interval[1] - interval[0]
        before = _waited_before(by_lane[owner.lane], interval) if long >= least else 0
        found.append(Exposed(interval, name, layer, next_phase, long - moved, before))
    return tuple(sorted(found, key=lambda one: (one.interval[0] - one.interval[1], one.interval)))


def _waited_before(lane: Sequence[Piece], stretch: Interval) -> int:
    """How long a lane waited before a stretch, since it last stood idle for longer than that."""
    start, idle = stretch[0], stretch[1] - stretch[0]
    busy_from, waited = start, 0
    for piece in reversed(lane[: bisect_left(lane, start, key=lambda one: one.start)]):
        if busy_from - piece.end > idle:
            break
        busy_from = min(busy_from, piece.start)
        if piece.waits:
            waited += min(piece.end, start) - piece.start
    return waited


def _owned(pieces: Sequence[Piece], exposed: Sequence[Interval]) -> list[tuple[Interval, Piece]]:
    """The exposed intervals in parts, each with what communicated first in it."""
    parts: list[tuple[Interval, Piece]] = []
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
            if parts and parts[-1][1].run == piece.run and parts[-1][0][1] == part[0]:
                parts[-1] = ((parts[-1][0][0], part[1]), parts[-1][1])
            else:
                parts.append((part, piece))
    return parts
