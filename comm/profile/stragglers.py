"""Ranks that the others wait for, and where they lose the time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low

from .matching import Matched
from .report import Report
from .skew import PhaseAcross, Share

_LEAST_PART = 100  # waiting below a 100th of the time, per rank that waits, is no matter


@dataclass(frozen=True)
class Straggler:
    """A rank that others wait for more than for most.

    Attributes:
        rank: its number.
        phase: of the collectives in which others waited for it longest.
        held_up: time of other ranks that it cost, ns, and in that phase.
        phase_held_up: of it, in that phase.
        compute_excess: how much longer it computes than the median rank, ns.
        compute_phase: where most of that excess is; "" if no phase has any.
        sentence: all of this for a reader.
    """

    rank: int
    phase: str
    held_up: int
    phase_held_up: int
    compute_excess: int
    compute_phase: str
    sentence: str


def stragglers(
    matched: Iterable[Matched],
    shares: Mapping[int, Share],
    phases: Sequence[PhaseAcross],
    reports: Mapping[int, Report],
) -> tuple[Straggler, ...]:
    """Those that stand out, who cost most first.

    Of the n ranks that run collectives together, itself among them, one stands out if they wait
    for it for more than 2 / (n + 1) of all their waiting, nearly twice its even share, and the
    others on average for more than a hundredth of its window.

    Args:
        matched: collectives across ranks.
        shares: of them, by rank.
        phases: the same by phase.
        reports: by rank.
    """
    together: defaultdict[int, set[int]] = defaultdict(set)
    for group in {tuple(one.parts) for one in matched}:
        for rank in group:
            together[rank].update(group)
    found: list[Straggler] = []
    for rank, ranks in together.items():
        held_up = shares[rank].held_up
        total = sum(shares[other].skew for other in ranks)
        start, end = reports[rank].window
        matters = held_up * _LEAST_PART > (end - start) * (len(ranks) - 1)
        if held_up * (len(ranks) + 1) > 2 * total and matters:
            found.append(_straggler(shares[rank], phases, reports))
    return tuple(sorted(found, key=lambda one: (-one.held_up, one.rank)))


def excess(times: Mapping[int, int]) -> dict[int, int]:
    """How much longer each time is than the (lower) median."""
    median = median_low(times.values())
    return {rank: time - median for rank, time in times.items()}


def _straggler(
    share: Share,
    phases: Sequence[PhaseAcross],
    reports: Mapping[int, Report],
) -> Straggler:
    rank = share.rank
    costs = {each.name: own.held_up for each in phases for own in each.shares if own.rank == rank}
    phase = max(costs, key=costs.__getitem__)
    more = excess({other: report.totals.compute for other, report in reports.items()})[rank]
    compute_phase, phase_more = _most_excess(rank, reports)
    sentence = (
        f"Rank {rank} arrives last at {share.last} of its {share.count} collectives and costs the "
        f"others {share.held_up / 1e6:.3f} ms of waiting in all, "
        f"{costs[phase] / 1e6:.3f} ms of it in {phase}"
    )
    if more > 0:
        sentence += f"; it computes {more / 1e6:.3f} ms longer than the median rank"
        if compute_phase:
            sentence += f", {phase_more / 1e6:.3f} ms longer in {compute_phase}"
    else:
        sentence += (
            "; it does not compute longer than the median rank, so look at what else delays it: "
            "its host, its copies, or a rank that it waits for itself"
        )
    return Straggler(
        rank,
        phase,
        share.held_up,
        costs[phase],
        more,
        compute_phase if more > 0 else "",
        f"{sentence}.",
    )


def _most_excess(rank: int, reports: Mapping[int, Report]) -> tuple[str, int]:
    """The phase in which it computes longest beyond the median of the ranks that have it."""
    times: defaultdict[str, dict[int, int]] = defaultdict(dict)
    for other, report in reports.items():
        for phase in report.phases:
            times[phase.name][other] = phase.compute
    found = [
        (excess(by_rank)[rank], name)
        for name, by_rank in times.items()
        if rank in by_rank and len(by_rank) > 1
    ]
    most, name = max(found, default=(0, ""))
    return (name, most) if most > 0 else ("", 0)
