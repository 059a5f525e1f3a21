"""What can be told only across ranks: who waits for whom, whose clock is off, who has more to do.

A collective's kernel runs from the moment its rank arrives until the data has moved, so on the rank
that arrives first it holds its wait for the others too. The rank with the shortest kernel arrived
last and waited for nobody: its duration is taken as the transfer, and what a kernel of the same
collective on another rank took beyond it, as waiting (skew). Durations need no common clock, so
this works across hosts as it is. Its limits: the shortest still includes what the last to arrive
waited for within the protocol, so that transfer is at most what is told and skew at least; and a
rank that arrives last because it waited for a third one is told as late itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .classify import RULES, Rule
from .clocks import Clock, align
from .collectives import collectives_of
from .imbalance import Imbalance, imbalance_of
from .matching import Matched, Matching, Unmatched, is_of_one_group, match
from .phases import PHASE_PATTERN
from .report import Report
from .skew import PhaseAcross, Share, by_phase, shares_of
from .stragglers import Straggler, excess, stragglers
from .trace import Interval, Trace, TraceError

_MOST_NAMES = 4  # in a sentence


@dataclass(frozen=True)
class RankAcross:
    """One rank among the others. Times are ns.

    Attributes:
        rank: its number, as its trace says or as it was given one.
        source: its trace.
        compute: length of the union of what computed.
        compute_excess: how much longer that is than the median rank's; negative if shorter.
        share: its part in all matched collectives.
    """

    rank: int
    source: str
    compute: int
    compute_excess: int
    share: Share


@dataclass(frozen=True)
class RanksReport:
    """What the traces of several ranks show together.

    Attributes:
        ranks: in ascending order, one for each trace that was compared.
        world_size: ranks of the run; None if no trace tells.
        missing_ranks: ranks of the run without a trace; where its size is not told, those below
            the largest.
        matched: collectives that were found on all their ranks that have a trace.
        by_sequence: of them, those matched by process group and sequence number; the others were
            matched by their order within a phase and layer.
        transfer, skew: over all of them, of all ranks together, ns.
        unmatched: what was left out, and why.
        phases: transfer and skew by phase, in the order of first appearance.
        stragglers: those that others wait for most first; empty if none stands out, or nothing
            tells which ranks make a group.
        clocks: by rank, how its trace's times are laid on the first's.
        imbalance: of routing; None if nothing tells it.
        notes: what could not be told, or only in part, and what to do, in sentences.
    """

    ranks: tuple[RankAcross, ...]
    world_size: int | None
    missing_ranks: tuple[int, ...]
    matched: int
    by_sequence: int
    transfer: int
    skew: int
    unmatched: tuple[Unmatched, ...]
    phases: tuple[PhaseAcross, ...]
    stragglers: tuple[Straggler, ...]
    clocks: tuple[Clock, ...]
    imbalance: Imbalance | None
    notes: tuple[str, ...]


def compare_ranks(
    traces: Sequence[Trace],
    reports: Sequence[Report],
    rules: Sequence[Rule] = RULES,
    *,
    phase_pattern: str = PHASE_PATTERN,
) -> RanksReport:
    """What the traces of several ranks show together.

    Args:
        traces: of at least two ranks.
        reports: `analyse` of each of them, in the same order.
        rules, phase_pattern: that the reports were made with.

    Raises:
        TraceError: fewer than two traces of different ranks.
        ValueError: not one report a trace.
    """
    if len(traces) != len(reports):
        raise ValueError(f"{len(traces)} traces and {len(reports)} reports: each trace has one")
    picked, notes = _by_rank(traces)
    if len(picked) < 2:
        found = f"one, of rank {next(iter(picked))}" if picked else "none"
        raise TraceError(
            f"comparing ranks takes traces of two ranks or more, and here is {found}: give those "
            "of other ranks too, or the folder that holds all"
        )
    trace_of = {rank: traces[place] for rank, place in picked.items()}
    report_of = {rank: reports[place] for rank, place in picked.items()}
    matching = match(
        {rank: collectives_of(trace, rules, phase_pattern) for rank, trace in trace_of.items()}
    )
    world_size, missing, missing_notes = _missing(trace_of)
    groups = _groups(trace_of)
    certain, doubtful = (
        [one for one in matching.matched if is_of_one_group(one, world_size, groups) == of_one]
        for of_one in (True, False)
    )
    clocks, clock_notes = align(trace_of, certain, doubtful)
    matched = _within(report_of, matching.matched)
    notes += [*missing_notes, *_matching_notes(matching, trace_of), *clock_notes]
    nothing = {rank: Share(rank, 0, 0, 0, 0, 0) for rank in picked}
    shares = nothing | shares_of(matched)
    phases = by_phase(matched)
    sure = _within(report_of, certain)
    if len(sure) < len(matched):
        notes.append(
            "No rank is called a straggler for collectives whose process group nothing tells: the "
            "ranks may be of several groups, and only those of one wait for each other."
        )
    more = excess({rank: report.totals.compute for rank, report in report_of.items()})
    return RanksReport(
        ranks=tuple(
            RankAcross(rank, one.source, report_of[rank].totals.compute, more[rank], shares[rank])
            for rank, one in trace_of.items()
        ),
        world_size=world_size,
        missing_ranks=missing,
        matched=len(matched),
        by_sequence=sum(one.by_sequence for one in matched),
        transfer=sum(share.transfer for share in shares.values()),
        skew=sum(share.skew for share in shares.values()),
        unmatched=matching.unmatched,
        phases=phases,
        stragglers=stragglers(sure, shares_of(sure), by_phase(sure), report_of),
        clocks=clocks,
        imbalance=imbalance_of(matched, report_of),
        notes=tuple(notes),
    )


def _by_rank(traces: Sequence[Trace]) -> tuple[dict[int, int], list[str]]:
    """Which trace is whose: its place by rank, ranks ascending. A rank has one trace."""
    picked: dict[int, int] = {}
    notes: list[str] = []
    nameless: list[int] = []
    for place, trace in enumerate(traces):
        if trace.rank is None:
            nameless.append(place)
        elif trace.rank in picked:
            first = traces[picked[trace.rank]].source
            notes.append(
                f"{first} and {trace.source} are both of rank {trace.rank}: the first is compared. "
                "Traces of several steps are compared one step at a time."
            )
        else:
            picked[trace.rank] = place
    free = (number for number in range(len(traces)) if number not in dict(picked))
    for place in nameless:
        picked[next(free)] = place
    if nameless:
        notes.append(
            "These traces do not tell their rank and were given the numbers that were free, in "
            "order: " + ", ".join(traces[place].source for place in nameless) + "."
        )
    return dict(sorted(picked.items())), notes


def _groups(traces: Mapping[int, Trace]) -> frozenset[tuple[int, ...]]:
    """All process groups that there are; none if a trace does not tell its own."""
    if not all(trace.groups for trace in traces.values()):
        return frozenset()
    return frozenset(group for trace in traces.values() for group in trace.groups)


def _missing(traces: Mapping[int, Trace]) -> tuple[int | None, tuple[int, ...], list[str]]:
    """The run's size, the ranks without a trace, and what that means."""
    sizes = {trace.world_size for trace in traces.values() if trace.world_size is not None}
    notes: list[str] = []
    if len(sizes) > 1:
        notes.append(
            f"Traces tell different world sizes, {_listed(sorted(sizes))}: they are of different "
            "runs, or of a run that was resized."
        )
    world_size = max(sizes, default=None)
    known = max(world_size or 0, max(traces) + 1)
    missing = tuple(rank for rank in range(known) if rank not in traces)
    if missing:
        notes.append(
            "Whoever arrived last may be among the ranks without a trace, so that transfer may be "
            "less and waiting more than is told."
        )
    return world_size, missing, notes


def _within(reports: Mapping[int, Report], matched: Iterable[Matched]) -> list[Matched]:
    """Collectives that run, on each of their ranks, within the window that its report is of."""

    def inside(rank: int, interval: Interval) -> bool:
        start, end = reports[rank].window
        return interval[0] <= end and interval[1] >= start

    return [
        one
        for one in matched
        if all(inside(rank, part.interval) for rank, part in one.parts.items())
    ]


def _matching_notes(matching: Matching, traces: Mapping[int, Trace]) -> list[str]:
    reasons = dict.fromkeys(one.reason for one in matching.unmatched)
    notes = [_left_out(reason, matching.unmatched) for reason in reasons]
    if not matching.matched:
        notes.append("No collective was found on two ranks: nothing tells who waits for whom.")
    if not all(one.by_sequence for one in matching.matched):
        notes.append(
            "Collectives without process group and sequence number were matched by their order "
            "within a phase and layer; where the ranks of a group are not told, all that have it "
            "are taken as one."
        )
    if len({trace.on_gpu for trace in traces.values()}) > 1:
        notes.append(
            "Some traces have kernels and some only operators: their collectives do not compare."
        )
    return notes


def _left_out(reason: str, unmatched: Iterable[Unmatched]) -> str:
    """What was left out for one reason, in a sentence."""
    concerned = [one for one in unmatched if one.reason == reason]
    names = list(dict.fromkeys(one.name for one in concerned))
    shown = ", ".join(names[:_MOST_NAMES]) + (" and others" if len(names) > _MOST_NAMES else "")
    ranks = {rank for one in concerned for rank, _ in one.counts}
    most = max(
        sum(count for one in concerned for rank, count in one.counts if rank == whose)
        for whose in ranks
    )
    return (
        f"Up to {most} collectives a rank were not compared, on ranks {_listed(sorted(ranks))}, of "
        f"{shown}: {reason}."
    )


def _listed(numbers: Iterable[int]) -> str:
    """Numbers for a sentence, neighbours together: "1, 3 to 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
