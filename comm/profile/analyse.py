"""What one rank's trace shows: how much communication was exposed, in which phase, behind what.

Everything is a union of intervals within one window, so that what runs side by side counts once and
the numbers add up exactly. Copies within a device or to the host neither hide communication nor
are hidden by it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from .bandwidth import moved
from .by_collective import with_collectives
from .classify import RULES, Class, Rule, classify_all
from .devices import of_device
from .exposure import exposed_stretches
from .infer import phases_of
from .intervals import intersection, length, subtract, union
from .kernel_table import COMMUNICATION, COMPUTE, COPY, IN_NO_RULE, UNKNOWN
from .phase_times import phase_times
from .phases import PHASE_PATTERN, Phases, started_moves
from .pieces import Piece, is_waiting, pieces_of
from .report import Kernels, Report, Totals
from .sm import sm_split
from .trace import Activity, Interval, Trace, TraceError
from .window import activities_within, first_end, window_of


class Sets(NamedTuple):
    """What ran, as disjoint sorted intervals.

    Attributes:
        compute, comm, copy: where something of the group ran.
        transfer: where communication ran that does not merely wait.
        exposed: `comm` without `compute`.
    """

    compute: list[Interval]
    comm: list[Interval]
    copy: list[Interval]
    transfer: list[Interval]
    exposed: list[Interval]


def analyse(
    trace: Trace,
    rules: Sequence[Rule] = RULES,
    window: Interval | str | None = None,
    *,
    phase_pattern: str = PHASE_PATTERN,
    device: int | None = None,
) -> Report:
    """A report of one rank's trace.

    Args:
        trace: of one rank.
        rules: what kernels do, by name; the first that fits counts.
        window: what to look at: from when to when, ns; or the name of a range that the program
            marked, such as "ProfilerStep#12", which stands for the time from the first start to
            the last end of what was launched within it (on a CPU: the range itself). By default
            all that ran; of a trace that breaks off, up to where the first of its busy lanes
            ends. Whatever runs within the window counts, also what was launched outside.
        phase_pattern: regular expression that the whole name of a phase fits, without " layer N".
        device: index of the GPU, of several in one trace; None for that with most activities.
            Whoever takes the report on, beside the trace, gives `of_device` of it here and there.

    Raises:
        TraceError: nothing ran in the trace.
        ValueError: the window is empty, unknown or not one range; the pattern is wrong; nothing
            ran on the device.
    """
    if not trace.activities:
        raise TraceError(
            f"{trace.source}: no kernels and no operators, so there is nothing to analyse; record "
            "with activities CPU and CUDA, and leave the profiler before the trace is written"
        )
    trace = of_device(trace, device)
    classes = classify_all((activity.name for activity in trace.activities), rules)
    phases = with_collectives(trace, classes, phases_of(trace, classes, phase_pattern))
    bounds = window_of(trace, window, phases.runs)
    activities, runs = activities_within(trace.activities, phases.of, bounds)
    pieces = pieces_of(trace, activities, runs, classes, phases, bounds)
    sets = _sets(pieces)
    totals = _totals(sets, bounds)
    kernels = _kernels(activities, classes)
    by_phase, by_layer = phase_times(
        pieces, activities, runs, classes, phases, sets.compute, bounds
    )
    missing = (
        *trace.missing,
        *phases.missing,
        *_cut_short(trace, window, bounds),
        *_missing(trace, phases, pieces, kernels, totals),
    )
    return Report(
        source=trace.source,
        rank=trace.rank,
        on_gpu=trace.on_gpu,
        window=bounds,
        totals=totals,
        phases=by_phase,
        layers=by_layer,
        streams=_streams(pieces),
        kernels=kernels,
        unknown=tuple(kernel for kernel in kernels if kernel.group == UNKNOWN),
        sm_split=sm_split(trace.num_sms, activities, classes) if trace.on_gpu else None,
        exposed=exposed_stretches(pieces, sets.exposed, sets.transfer, phases.runs),
        missing=missing,
        compute_intervals=tuple(sets.compute),
        comm_intervals=tuple(sets.comm),
        exposed_intervals=tuple(sets.exposed),
    )


def _sets(pieces: Sequence[Piece]) -> Sets:
    def of(group: str) -> list[Interval]:
        return union((piece.start, piece.end) for piece in pieces if piece.group == group)

    compute, comm = of(COMPUTE), of(COMMUNICATION)
    transfer = union(
        (piece.start, piece.end)
        for piece in pieces
        if piece.group == COMMUNICATION and not piece.waits
    )
    return Sets(compute, comm, of(COPY), transfer, subtract(comm, compute))


def _totals(sets: Sets, window: Interval) -> Totals:
    span = window[1] - window[0]
    compute, comm = length(sets.compute), length(sets.comm)
    exposed = length(sets.exposed)
    return Totals(
        span=span,
        compute=compute,
        comm=comm,
        overlapped=length(intersection(sets.comm, sets.compute)),
        exposed=exposed,
        idle=span - length(union([*sets.compute, *sets.comm, *sets.copy])),
        copy=length(sets.copy),
        waiting=comm - length(sets.transfer),
    )


def _streams(pieces: Iterable[Piece]) -> tuple[tuple[str, int, int], ...]:
    """Name, busy computing and communicating of each lane, the busiest first."""
    lanes: dict[str, tuple[list[Interval], list[Interval]]] = {}
    for piece in pieces:
        compute, comm = lanes.setdefault(piece.lane, ([], []))
        if piece.group == COMPUTE:
            compute.append((piece.start, piece.end))
        elif piece.group == COMMUNICATION:
            comm.append((piece.start, piece.end))
    found = [
        (lane, length(union(compute)), length(union(comm)))
        for lane, (compute, comm) in lanes.items()
    ]
    return tuple(sorted(found, key=lambda lane: (-lane[1] - lane[2], lane[0])))


def _kernels(activities: Iterable[Activity], classes: Mapping[str, Class]) -> tuple[Kernels, ...]:
    by_name: dict[str, list[Activity]] = {}
    for activity in activities:
        by_name.setdefault(activity.name, []).append(activity)
    found = [_kernel(classes[name], same) for name, same in by_name.items()]
    return tuple(sorted(found, key=lambda kernel: (-kernel.busy, kernel.name)))


def _kernel(known: Class, same: Sequence[Activity]) -> Kernels:
    """What activities of one name have in common."""
    grids = {activity.grid for activity in same if activity.grid is not None}
    blocks = [x * y * z for x, y, z in grids]
    exchanges = [activity.exchange for activity in same if activity.exchange is not None]
    sent = [exchange.sent_bytes for exchange in exchanges if exchange.sent_bytes is not None]
    size, bus = moved(activity.exchange for activity in same)
    collectives = {exchange.collective for exchange in exchanges} - {""}
    # One kernel serves several collectives; what all of these say they are is the better name.
    role = collectives.pop() if len(collectives) == 1 and not is_waiting(known) else known.role
    return Kernels(
        name=same[0].name,
        group=known.group,
        role=role,
        library=known.library,
        count=len(same),
        busy=sum(activity.end - activity.start for activity in same),
        blocks=(min(blocks), max(blocks)) if blocks else None,
        sent_bytes=sum(sent) if sent else None,
        algorithm_bytes=size,
        bus_bytes=bus,
    )


def _cut_short(trace: Trace, window: Interval | str | None, bounds: Interval) -> Iterator[str]:
    """What a trace that breaks off does to the window, in a sentence."""
    if not trace.broken:
        return
    last = max(activity.end for activity in trace.activities)
    end, lane = first_end(trace)
    begin = trace.begin
    lost = f"from {(end - begin) / 1e6:.3f} ms on, where {lane} ends,"
    if window is None:
        yield (
            f"THE TRACE BREAKS OFF: {lost} streams may lack activities that come later in the "
            f"file, so the {(last - end) / 1e6:.3f} ms from there on are left out; phases may lack "
            "marks that come later, too"
        )
    elif bounds[1] > end:
        yield (
            f"THE TRACE BREAKS OFF: {lost} streams may lack activities that come later in the "
            "file, and the window reaches beyond, so that what it tells as exposed may be hidden"
        )


def _missing(
    trace: Trace,
    phases: Phases,
    pieces: Sequence[Piece],
    kernels: Sequence[Kernels],
    totals: Totals,
) -> list[str]:
    """What the report cannot tell, in sentences."""
    found: list[str] = []
    if not trace.on_gpu:
        found.append(
            "Operators of a CPU nest: times by name count what an operator calls as well; all "
            "other times count once."
        )
        started = sorted({phases.runs[index].name for index in started_moves(phases)})
        if started:
            found.append(
                f"Computation of {', '.join(started)} is the host's: the thread that computes "
                "prepares and starts what another thread moves, which alone is communication."
            )
    busy = sum(kernel.busy for kernel in kernels)
    unknown = [kernel for kernel in kernels if kernel.group == UNKNOWN]
    if unknown and busy:
        share = 100 * sum(kernel.busy for kernel in unknown) / busy
        found.append(
            f"{share:.2f} % of the time of what ran {IN_NO_RULE}, {len(unknown)} "
            f"of {len(kernels)}, and counts as computation, most of it {unknown[0].name[:80]!r}; "
            "if one communicates, name it in a file of rules."
        )
    if not totals.comm:
        found.append(
            "Nothing in the window is known to communicate: either nothing does, or its names are "
            "in no rule; name them in a file of rules."
        )
    outside = sum(piece.end - piece.start for piece in pieces if piece.run < 0)
    if phases.runs and outside:
        share = 100 * outside / sum(piece.end - piece.start for piece in pieces)
        found.append(f"{share:.2f} % of the time of what ran belongs to no phase.")
    return found
