"""Clocks of different hosts, laid on one axis by the collectives that ranks ran together.

A collective in which every rank needs something of every other ends on all of them at about the
same time, so the median difference of ends tells how far two clocks are apart. It also bounds it:
on no rank can it end before it has started on another. These bounds are hard; where no offset
satisfies all of them, a clock jumped or drifted while the trace was taken. Collectives that were
matched by their order, of ranks that may be of several groups, are no such evidence: where they
contradict each other it is they that are doubted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import NamedTuple

from .matching import Collective, Matched
from .trace import Interval, Trace

_LATE_ENOUGH = 10**18  # ns since 1970, in 2001: times beyond it are times of day already
_ROUNDING = 1_000  # ns; some writers of traces round to whole microseconds


@dataclass(frozen=True)
class Clock:
    """How one trace's times are laid on the first trace's. All in ns.

    Attributes:
        rank: whose trace.
        offset: what to add to its times.
        uncertainty: nine in ten of the collectives agree with the offset to this; None if it does
            not come from collectives but from the times of day that the traces tell.
        collectives: how many it comes from; the first's counts all of its own.
        bounds: the least and the largest offset that no collective contradicts; None if there is
            none, or no collective.
        off_by: the offset beyond what the traces' own times of day ask for, which is how far these
            are apart; None if they tell none, or no collective does.
        jumps: times on its own axis at which no single offset holds any longer.
    """

    rank: int
    offset: int
    uncertainty: int | None
    collectives: int
    bounds: tuple[int, int] | None
    off_by: int | None
    jumps: tuple[int, ...] = ()


class _Link(NamedTuple):
    """How one rank's clock stands to that of a rank that it ran collectives with."""

    offset: int
    uncertainty: int
    collectives: int
    bounds: tuple[int, int] | None
    jumps: tuple[int, ...]


def align(
    traces: Mapping[int, Trace], matched: Sequence[Matched], doubtful: Sequence[Matched] = ()
) -> tuple[tuple[Clock, ...], tuple[str, ...]]:
    """Each rank's clock, and what is odd about them, in sentences.

    A rank without a collective in common with the first is laid on it through other ranks, and
    where that takes doubtful collectives that contradict each other, by the times of day.

    Args:
        traces: by rank, the first being the one whose times stay.
        matched: collectives across these ranks, each surely of one group.
        doubtful: collectives whose ranks may be of several groups.
    """
    base = next(iter(traces))
    links = _links(base, matched)
    for rank, link in _links(base, doubtful, links).items():
        if not link.jumps or time_of_day_offset(traces[base], traces[rank]) is None:
            links.setdefault(rank, link._replace(bounds=None, jumps=()))
    clocks = tuple(
        _clock(rank, links.get(rank), time_of_day_offset(traces[base], trace))
        for rank, trace in traces.items()
    )
    by_order = any(not one.by_sequence for one in matched)
    notes = [
        *_jump_notes(clocks, traces, by_order),
        *_disagreements(clocks),
        *_apart(clocks, traces),
        *(note for rank, trace in traces.items() for note in _impossible(rank, trace)),
    ]
    return clocks, tuple(notes)


def time_of_day_offset(first: Trace, other: Trace) -> int | None:
    """What to add to the other's times by the times of day that both tell, ns; None if not told."""
    first_zero, other_zero = _zero(first), _zero(other)
    return None if first_zero is None or other_zero is None else other_zero - first_zero


def _zero(trace: Trace) -> int | None:
    """Time of day of the trace's zero, ns since 1970."""
    if trace.clock_ns:
        return trace.clock_ns
    # Times that are of day already need nothing added.
    return 0 if trace.activities and trace.activities[0].start > _LATE_ENOUGH else None


def _window(trace: Trace) -> Interval | None:
    ranges = (trace.activities, trace.annotations)
    starts = [each[0].start for each in ranges if each]
    if not starts:
        return None
    return min(starts), max(one.end for each in ranges for one in each)


def _clock(rank: int, link: _Link | None, by_day: int | None) -> Clock:
    if link is None:
        return Clock(rank, by_day or 0, None, 0, None, None)
    off_by = None if by_day is None else link.offset - by_day
    return Clock(rank, *link[:4], off_by, link.jumps)


def _links(
    base: int, matched: Sequence[Matched], known: Mapping[int, _Link] | None = None
) -> dict[int, _Link]:
    """How each rank that can be reached stands to the base, through as few ranks as possible.

    Args:
        base: the rank whose times stay.
        matched: collectives.
        known: ranks whose link is known from others already.
    """
    pairs: defaultdict[int, list[Mapping[int, Collective]]] = defaultdict(list)
    for one in matched:
        if one.first.binds:
            for rank in one.parts:
                pairs[rank].append(one.parts)
    links = dict(known or {base: _Link(0, 0, len(pairs[base]), (0, 0), ())})
    reached = list(links)
    for near in reached:
        common: defaultdict[int, list[tuple[Interval, Interval]]] = defaultdict(list)
        for parts in pairs[near]:
            for rank, part in parts.items():
                if rank not in links:
                    common[rank].append((parts[near].interval, part.interval))
        for rank, intervals in common.items():
            links[rank] = _through(links[near], _link(intervals))
        reached.extend(common)
    return links


def _link(intervals: Iterable[tuple[Interval, Interval]]) -> _Link:
    """From the intervals of the same collectives on two ranks: the second's offset to the first."""
    intervals = sorted(intervals, key=lambda both: both[1])
    differences = [near[1] - far[1] for near, far in intervals]
    offset = median_low(differences)
    low, high = intervals[0][0][0] - intervals[0][1][1], intervals[0][0][1] - intervals[0][1][0]
    jumps: list[int] = []
    for near, far in intervals:
        least, most = near[0] - far[1], near[1] - far[0]
        if least > high + _ROUNDING or most < low - _ROUNDING:
            jumps.append(far[0])
            low, high = least, most
        else:
            low, high = max(low, least), min(high, most)
    bounds = None
    if not jumps:
        low, high = min(low, high), max(low, high)
        bounds, offset = (low, high), min(max(offset, low), high)
    distances = sorted(abs(difference - offset) for difference in differences)
    nine_tenths = (9 * len(distances) + 9) // 10 - 1
    return _Link(offset, distances[nine_tenths], len(intervals), bounds, tuple(jumps))


def _through(near: _Link, far: _Link) -> _Link:
    """A link to the base, from one to a rank whose own link to the base is known."""
    bounds = None
    if near.bounds is not None and far.bounds is not None:
        bounds = near.bounds[0] + far.bounds[0], near.bounds[1] + far.bounds[1]
    return _Link(
        near.offset + far.offset,
        near.uncertainty + far.uncertainty,
        far.collectives,
        bounds,
        far.jumps,
    )


def _jump_notes(clocks: Sequence[Clock], traces: Mapping[int, Trace], by_order: bool) -> list[str]:
    jumped = [clock for clock in clocks if clock.jumps]
    if not jumped:
        return []
    if len(jumped) == len(clocks) - 1 and len(jumped) > 1:
        whose = f"Rank {clocks[0].rank}'s clock, or every other,"
    else:
        whose = " and ".join(f"Rank {clock.rank}'s clock" for clock in jumped)
    first = jumped[0]
    moment = (first.jumps[0] - traces[first.rank].begin) / 1e6
    doubt = "; or collectives matched by order do not belong together" if by_order else ""
    return [
        f"{whose} jumped or drifted against rank {clocks[0].rank}'s: no single offset lets all "
        f"collectives end after they began elsewhere, for rank {first.rank} first at "
        f"{moment:.3f} ms of its trace{doubt}. Its place on a common axis is rough; transfer, "
        "skew and all totals need no common clock and hold, but for a collective across the jump."
    ]


def _disagreements(clocks: Sequence[Clock]) -> list[str]:
    """Times of day that collectives rule out, or that they miss by far more than they scatter."""
    notes: list[str] = []
    for clock in clocks:
        if clock.off_by is None or clock.uncertainty is None:
            continue
        by_day = clock.offset - clock.off_by
        possible = clock.bounds is None or clock.bounds[0] <= by_day <= clock.bounds[1]
        if not possible:
            way = "behind" if clock.off_by > 0 else "ahead of"
            notes.append(
                f"Rank {clock.rank}'s time of day is {abs(clock.off_by) / 1e6:.3f} ms {way} rank "
                f"{clocks[0].rank}'s, more than the collectives that they share allow: the traces "
                "are laid side by side by these collectives, to "
                f"{clock.uncertainty / 1e6:.3f} ms."
            )
    return notes


def _apart(clocks: Sequence[Clock], traces: Mapping[int, Trace]) -> list[str]:
    """Ranks that no collective joins to the first: by what they are laid beside it, and whether
    they then have any time in common."""
    base = clocks[0].rank
    first = _window(traces[base])
    notes: list[str] = []
    for clock in clocks[1:]:
        if clock.collectives:
            continue
        known = time_of_day_offset(traces[base], traces[clock.rank]) is not None
        how = "by the times of day that both traces tell" if known else "as they are"
        note = (
            f"No collective tells for certain how rank {clock.rank}'s clock stands to rank "
            f"{base}'s: its times are taken {how}"
        )
        other = _window(traces[clock.rank])
        if first and other:
            start, end = other[0] + clock.offset, other[1] + clock.offset
            if end <= first[0] or start >= first[1]:
                note += (
                    ", and then the two have no time in common: they are of different steps, or "
                    "their clocks count from different moments. What one rank shows by itself "
                    "holds, and durations across ranks"
                )
        notes.append(note + ".")
    return notes


def _impossible(rank: int, trace: Trace) -> list[str]:
    """Kernels of one stream run in turn: none ends before one that started earlier has ended."""
    if not trace.on_gpu:
        return []
    latest: dict[tuple[int, str], int] = {}
    count = 0
    for one in trace.activities:
        lane = (one.device, one.lane)
        before = latest.get(lane, one.end)
        count += one.end < before - _ROUNDING
        latest[lane] = max(before, one.end)
    if not count:
        return []
    return [
        f"Rank {rank}: {count} kernels end before an earlier one of their stream does, which a "
        "stream does not do: the trace's clock jumped, or CUDA graphs ran branches side by side. "
        "Overlaps near them are doubtful."
    ]
