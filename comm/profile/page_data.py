"""The timeline of the page as compact arrays: what its script draws. All numbers are whole ns.

The tables of the page come from the reports and are exact. A picture has room for some number of
bars only: beyond it, neighbours of one phase that together are shorter than a resolution become one
bar, and what lies deeper than some lanes is left out. The data say how much of this was done.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple, TypedDict

from .classify import bare_name
from .page_ran import Ran
from .report import Report

MOST_BARS = 120_000  # of all ranks together; each is some 16 bytes of the page
MOST_RANKS = 64  # have rows in the picture: a canvas ends at some 16,000 pixels
MOST_LANES = 6  # of bars that run at once in one row

_SCREEN = 2000  # pixels; neighbours shorter than one of them, all in view, may be of any phase
_NAME = 400  # characters of a kernel's name that are shown


class Lane(TypedDict):
    """Bars that follow each other.

    Attributes:
        gap: from the end of the bar before (of the first, from the beginning of the picture), ns.
        time: how long each lasts, ns.
        kernel, label: numbers in those tables; of an exposed stretch, `kernel` is the label of
            what computed next.
        count: of bars of several things, how many these are.
    """

    gap: list[int]
    time: list[int]
    kernel: list[int]
    label: list[int]
    count: dict[int, int]


class Rank(TypedDict):
    """A rank in the picture.

    Attributes:
        name: what it is called.
        start, end: its window, ns.
        rows: lanes of "compute", "communication", "copy" and "exposed".
        resolution: neighbours that together last at most this are one bar, ns; 0 if there are none.
        deeper: things left out, because too many ran at once.
    """

    name: str
    start: int
    end: int
    rows: dict[str, list[Lane]]
    resolution: int
    deeper: int


class Timeline(TypedDict):
    """What the script draws. Times count from the beginning of the picture.

    Attributes:
        end: of the picture, ns.
        aligned: a moment is at the same place on all ranks.
        ranks: from above downwards.
        kernels: name, short name, group, role, library, blocks and lane.
        labels: phase and layer.
    """

    end: int
    aligned: bool
    ranks: list[Rank]
    kernels: list[Hashable]
    labels: list[Hashable]


class Bar(NamedTuple):
    """One thing that ran as it is drawn, or several; then the kernel is that of the longest.

    Attributes:
        start, end: ns since the beginning of the picture.
        kernel: number of what is said about the kernel.
        label: number of the phase and layer.
        things: how many.
        longest: time of the longest of them, ns.
    """

    start: int
    end: int
    kernel: int
    label: int
    things: int
    longest: int


class Numbers:
    """Numbers values in the order of their first use."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}

    def of(self, value: Hashable) -> int:
        return self._numbers.setdefault(value, len(self._numbers))

    def values(self) -> list[Hashable]:
        return list(self._numbers)


def timeline(
    reports: Sequence[Report],
    ran: Iterable[Iterable[Ran]],
    names: Sequence[str],
    offsets: Sequence[int],
    *,
    most_bars: int = MOST_BARS,
) -> Timeline:
    """What the script draws.

    Args:
        reports: one a rank, in the order in which they are drawn.
        ran: what ran on each of them; taken rank by rank, so that it need not all exist at once.
        names: of the ranks.
        offsets: for each rank, what to add to its times so that all are on one clock, ns.
        most_bars: of all ranks together, as a target.
    """
    kernels, labels = Numbers(), Numbers()
    labels.of(("", None))
    zeros, aligned = _zeros(reports, offsets)
    share = max(1, most_bars // max(1, len(reports)))
    ranks = [
        _rank(name, report, of_rank, zero, kernels, labels, share)
        for name, report, of_rank, zero in zip(names, reports, ran, zeros, strict=True)
    ]
    ends = [report.window[1] - zero for report, zero in zip(reports, zeros, strict=True)]
    return {
        "end": max(1, *ends),
        "aligned": aligned,
        "ranks": ranks,
        "kernels": kernels.values(),
        "labels": labels.values(),
    }


def _zeros(reports: Sequence[Report], offsets: Sequence[int]) -> tuple[list[int], bool]:
    """What is 0 in the picture, on the clock of each rank, and whether that is one moment.

    Ranks whose windows do not meet were not recorded together, or their clocks have nothing in
    common: then each begins at 0.
    """
    starts = [report.window[0] + by for report, by in zip(reports, offsets, strict=True)]
    ends = [report.window[1] + by for report, by in zip(reports, offsets, strict=True)]
    if len(reports) > 1 and max(starts) < min(ends):
        return [min(starts) - by for by in offsets], True
    return [report.window[0] for report in reports], len(reports) <= 1


def _rank(
    name: str,
    report: Report,
    ran: Iterable[Ran],
    zero: int,
    kernels: Numbers,
    labels: Numbers,
    most_bars: int,
) -> Rank:
    start, end = report.window
    rows: dict[str, list[Bar]] = {"compute": [], "communication": [], "copy": []}
    known: dict[Hashable, int] = {}
    for run in ran:
        if run.end <= start or run.start >= end:
            continue
        what = (run.group, *run[4:])
        kernel = known.get(what)
        if kernel is None:
            about = (_short(run.name), bare_name(run.name), run.group, *run[5:])
            kernel = known[what] = kernels.of(about)
        begins, ends = max(run.start, start) - zero, min(run.end, end) - zero
        bar = Bar(begins, ends, kernel, labels.of(run.label), 1, ends - begins)
        rows[run.group if run.group in rows else "compute"].append(bar)
    exposed = _exposed(report, zero, labels)
    total = sum(map(len, rows.values())) + len(exposed)
    lanes = {group: _lanes(bars) for group, bars in rows.items() if bars}
    lanes["exposed"] = [exposed] if exposed else []
    drawn = sum(bar.things for row in lanes.values() for lane in row for bar in lane)
    resolution = _merge(lanes, most_bars, end - start)
    return {
        "name": name,
        "start": start - zero,
        "end": end - zero,
        "rows": {group: list(map(_arrays, row)) for group, row in lanes.items()},
        "resolution": resolution,
        "deeper": total - drawn,
    }


def _short(name: str) -> str:
    return name if len(name) <= _NAME else f"{name[:_NAME]}…"


def _exposed(report: Report, zero: int, labels: Numbers) -> list[Bar]:
    """Exposed stretches as bars whose `kernel` is the number of the phase that computed next.

    Stretches of two phases may be at one time; the picture shows that one only once.
    """
    bars: list[Bar] = []
    last = report.window[0]
    for stretch in sorted(report.exposed, key=lambda stretch: stretch.interval):
        start, end = max(last, stretch.interval[0]), stretch.interval[1]
        if start < end:
            label = labels.of((stretch.phase, stretch.layer))
            after = labels.of((stretch.next_phase, None))
            bars.append(Bar(start - zero, end - zero, after, label, 1, end - start))
            last = end
    return bars


def _lanes(bars: Iterable[Bar]) -> list[list[Bar]]:
    """Bars in as few lanes as hold them one after the other; what does not fit is left out."""
    lanes: list[list[Bar]] = []
    # Of those that start together the longest comes first: operators hold those that they call.
    for bar in sorted(bars, key=lambda bar: (bar.start, -bar.end)):
        lane = next((lane for lane in lanes if lane[-1].end <= bar.start), None)
        if lane is not None:
            lane.append(bar)
        elif len(lanes) < MOST_LANES:
            lanes.append([bar])
    return lanes


def _merge(lanes: dict[str, list[list[Bar]]], most: int, span: int) -> int:
    """Merge neighbours, in place, until there are at most `most` bars; return the resolution.

    The resolution grows by factors of two, and with it what was merged before, so that all rounds
    together cost little more than the first. It ends where a bar a lane is left, at the latest.
    """
    rows = list(lanes.values())
    resolution = 0
    while sum(len(lane) for row in rows for lane in row) > most and resolution < 2 * span:
        # The first is some part of what an even spread would take: finer ones would merge little.
        resolution = 2 * resolution or max(256, span // (16 * most))
        for row in rows:
            row[:] = [_merged(lane, resolution, resolution * _SCREEN > span) for lane in row]
    return resolution


def _merged(lane: Sequence[Bar], resolution: int, any_label: bool) -> list[Bar]:
    """Bars of a lane with neighbours made one that together last at most `resolution`."""
    found: list[Bar] = []
    last: Bar | None = None
    for bar in lane:
        if (
            last is not None
            and bar.end - last.start <= resolution
            and (any_label or bar.label == last.label)
        ):
            main = last if last.longest >= bar.longest else bar
            things = last.things + bar.things
            last = Bar(last.start, bar.end, main.kernel, main.label, things, main.longest)
        else:
            if last is not None:
                found.append(last)
            last = bar
    if last is not None:
        found.append(last)
    return found


def _arrays(lane: Sequence[Bar]) -> Lane:
    ends = [0, *(bar.end for bar in lane)]
    return {
        "gap": [bar.start - end for bar, end in zip(lane, ends, strict=False)],
        "time": [bar.end - bar.start for bar in lane],
        "kernel": [bar.kernel for bar in lane],
        "label": [bar.label for bar in lane],
        "count": {index: bar.things for index, bar in enumerate(lane) if bar.things > 1},
    }
