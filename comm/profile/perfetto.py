"""Measured and simulated tracks in one file that Perfetto (ui.perfetto.dev) opens.

A process is a rank. Its threads are, from the top, each with the simulated one right below it:
actions, computation, communication, and communication that nothing computed behind. Where bars of a
track would overlap, the later ones take further threads of the same name.

The format counts microseconds; they have three decimals here, so they are the whole ns of the
traces, less the first one's start: a number of microseconds since 1970 would have no room for them.
"""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

from .classify import RULES, Rule
from .comparison import COMPUTING, COPYING, TRANSFER, WAITING
from .intervals import clip, subtract, union
from .lineup import LineUp, line_up
from .measured import measured_rows, measured_runs
from .phases import PHASE_PATTERN
from .phases_against import pairs_of
from .report import Report
from .rows import Row, RowRun, simulated_row
from .simulated import Simulated
from .trace import Interval, Trace

ACTIONS = "actions"
COMPUTE = "compute"
COMMUNICATION = "communication"
EXPOSED = "exposed communication"
COPIES = "copies"
WAITS = "waits"
_TRACKS = (ACTIONS, COMPUTE, COMMUNICATION, EXPOSED, COPIES, WAITS)
_TRACK_OF = {
    COMPUTING: COMPUTE,
    TRANSFER: COMMUNICATION,
    WAITING: COMMUNICATION,
    COPYING: COPIES,
}
# A thread's number must differ from those of all other ranks.
_NUMBERS_A_TRACK = 1000
_NUMBERS_A_RANK = 100 * _NUMBERS_A_TRACK


class Bar(NamedTuple):
    """A bar, ns on its rank's clock; `simulated` ones have tracks of their own."""

    track: str
    simulated: bool
    start: int
    end: int
    name: str


def write_perfetto(
    path: str | Path,
    traces: Sequence[Trace],
    reports: Sequence[Report],
    simulated: Simulated | None = None,
    *,
    offsets: Sequence[int] | None = None,
    rules: Sequence[Rule] = RULES,
    phase_pattern: str = PHASE_PATTERN,
) -> None:
    """Write what was measured, and below it what was simulated, for Perfetto.

    A simulated row begins where the measured one does, in every training step; with `offsets` those
    of all ranks begin together, so that between ranks they lie as they were simulated. In a trace
    that marks phases and no actions, a simulated pair lies below each measured one.

    Args:
        path: .json, or one that ends in .gz to have it compressed.
        traces: of the ranks of one run, one at least.
        reports: of each of these; what lies outside their windows is left out.
        simulated: what was predicted; None for the measured tracks alone.
        offsets: for each trace what to add to its times, so that all have one clock, ns.
        rules: what kernels do, by name.
        phase_pattern: regular expression that the whole name of a phase fits.

    Raises:
        ValueError: traces and simulation have nothing in common, as of `against`.
        OSError: the file cannot be written.
    """
    beside: Iterable[tuple[int, Bar]] = ()
    if simulated is None:
        runs = [
            measured_runs(trace, rules, phase_pattern, report.window)
            for trace, report in zip(traces, reports, strict=True)
        ]
    else:
        lined = line_up(simulated, traces, reports, offsets, rules, phase_pattern)
        runs = [row.runs for row in lined.bare]
        if lined.matched:
            beside = _by_rows(lined, together=offsets is not None)
        else:
            beside = _by_pairs(simulated, lined)
    bars = [
        list(_measured(trace, of, report.window))
        for trace, of, report in zip(traces, runs, reports, strict=True)
    ]
    for number, bar in beside:
        bars[number].append(bar)
    shifts = [0] * len(traces) if offsets is None else offsets
    file = Path(path)
    if file.suffix == ".gz":
        with gzip.open(file, "wt", encoding="utf-8") as out:
            _write(out, traces, bars, shifts)
    else:
        with file.open("w", encoding="utf-8") as out:
            _write(out, traces, bars, shifts)


def _measured(trace: Trace, runs: Sequence[RowRun], window: Interval) -> Iterator[Bar]:
    for row in measured_rows(trace, runs, window):
        for action in row.actions:
            yield Bar(ACTIONS, False, action.start, action.end, action.name)
    yield from _run_bars(runs, simulated=False)


def _row_bars(row: Row, shift: int) -> Iterator[Bar]:
    """The bars of a simulated row, so much later than simulated."""
    for action in row.actions:
        yield Bar(ACTIONS, True, action.start + shift, action.end + shift, action.name)
    # Without phases there is nothing to tell but the actions.
    for bar in _run_bars([run for run in row.runs if run.phase], simulated=True):
        yield bar._replace(start=bar.start + shift, end=bar.end + shift)


def _run_bars(runs: Iterable[RowRun], *, simulated: bool) -> Iterator[Bar]:
    """What ran, by phase: each time that a phase was run, as the union of what ran of it."""
    found: defaultdict[tuple[str, str], list[Interval]] = defaultdict(list)
    instances: defaultdict[tuple[str, str, int], list[Interval]] = defaultdict(list)
    for run in runs:
        if run.start == run.end:
            continue
        name = run.phase or run.part
        if run.layer is not None:
            name += f" layer {run.layer}"
        if run.instance < 0:
            found[WAITS, name].append((run.start, run.end))
        else:
            if run.phase and run.part == WAITING:
                name += f" {WAITING}"
            instances[_TRACK_OF[run.part], name, run.instance].append((run.start, run.end))
    computing = union(
        interval for (track, _, _), of in instances.items() if track == COMPUTE for interval in of
    )
    for (track, name, _), of in instances.items():
        ran = union(of)
        for start, end in ran:
            yield Bar(track, simulated, start, end, name)
        if track == COMMUNICATION:
            for start, end in subtract(ran, clip(computing, (ran[0][0], ran[-1][1]))):
                yield Bar(EXPOSED, simulated, start, end, name)
    for (track, name), of in found.items():
        for start, end in union(of):
            yield Bar(track, simulated, start, end, name)


def _by_rows(lined: LineUp, *, together: bool) -> Iterator[tuple[int, Bar]]:
    """Below each measured row the simulated one: the number of the trace, and a bar."""
    begin: dict[str, int] = {}
    for m in lined.matched:
        for row in m.rows:
            begin[row.step] = min(begin.get(row.step, row.start + m.offset), row.start + m.offset)
    earliest = min(row.start for row in lined.predicted)
    for m, predicted in zip(lined.matched, lined.predicted, strict=True):
        for row in m.rows:
            if together:
                shift = begin[row.step] - m.offset - earliest
            else:
                shift = row.start - predicted.start
            for bar in _row_bars(predicted, shift):
                yield m.number, bar


def _by_pairs(simulated: Simulated, lined: LineUp) -> Iterator[tuple[int, Bar]]:
    """Below each measured pair of a trace without actions the first simulated one."""
    pairs = [action for row in simulated.rows for action in row if action.is_pair and action.phases]
    if not pairs:
        return
    predicted = simulated_row(pairs[:1], lined.ns_per_unit)
    for index, found in enumerate(lined.phases):
        for pair in pairs_of(found):
            for bar in _row_bars(predicted, pair.start - predicted.start):
                yield index, bar


def _write(
    out: TextIO, traces: Sequence[Trace], bars: Sequence[Iterable[Bar]], shifts: Sequence[int]
) -> None:
    """One object; an event a line."""
    first = min(
        (bar.start + shift for of, shift in zip(bars, shifts, strict=True) for bar in of), default=0
    )
    about = {"traces": [trace.source for trace in traces], "first_ns": first}
    out.write('{"displayTimeUnit":"ms","otherData":' + json.dumps(about) + ',"traceEvents":[\n')
    separator = ""
    for index, (trace, of, shift) in enumerate(zip(traces, bars, shifts, strict=True)):
        for event in _events(index, trace, sorted(of), first - shift):
            out.write(separator + event)
            separator = ",\n"
    out.write("\n]}\n")


def _events(index: int, trace: Trace, bars: Iterable[Bar], first: int) -> Iterator[str]:
    """The events of one process, each as JSON; `first` is the time that they count from.

    The bars come track by track, by their start.
    """
    # Process 0 and thread 0 have a meaning of their own to some readers.
    process = index + 1
    rank = index if trace.rank is None else trace.rank
    yield _meta("process_name", process, 0, {"name": f"rank {rank}"})
    yield _meta("process_sort_index", process, 0, {"sort_index": rank})
    free: dict[int, list[int]] = {}  # of each track, until when each of its threads is taken
    for track, simulated, start, end, name in bars:
        number = (2 * _TRACKS.index(track) + simulated) * _NUMBERS_A_TRACK
        threads = free.setdefault(number, [])
        place = next((at for at, until in enumerate(threads) if until <= start), len(threads))
        if place == len(threads):
            shown = f"{track}, {'simulated' if simulated else 'measured'}"
            thread = process * _NUMBERS_A_RANK + number + place
            yield _meta("thread_name", process, thread, {"name": shown})
            yield _meta("thread_sort_index", process, thread, {"sort_index": number + place})
        threads[place : place + 1] = [end]
        thread = process * _NUMBERS_A_RANK + number + place
        yield (
            f'{{"ph":"X","name":{json.dumps(name)},"pid":{process},"tid":{thread},'
            f'"ts":{_microseconds(start - first)},"dur":{_microseconds(end - start)}}}'
        )


def _meta(name: str, process: int, thread: int, args: dict[str, object]) -> str:
    return json.dumps({"ph": "M", "name": name, "pid": process, "tid": thread, "args": args})


def _microseconds(ns: int) -> str:
    """Exactly, in decimals."""
    return f"{ns // 1000}.{ns % 1000:03d}"
