"""The reports of some ranks as one. Lengths are sums over the ranks, so that they stay exact."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..comm.profile.kernel_table import COMMUNICATION, WAIT
from ..comm.profile.report import Exposed, Kernels, Phase, Report, Totals

_NS = 1_000_000  # in a millisecond


class Stretch(NamedTuple):
    """A stretch of exposed communication, and whose: `begin` is when that rank's trace begins."""

    rank: int | None
    begin: int
    exposed: Exposed


@dataclass(frozen=True)
class Summary:
    """Some ranks together.

    Attributes:
        num_ranks: how many.
        totals, phases, layers, kernels, unknown: as of `Report`, summed over the ranks; windows
            are from the earliest start to the latest end, counted from each trace's begin.
        window: likewise.
        exposed: of all ranks, the longest first.
        missing: of all ranks, each sentence once, with the ranks unless it is of all.
    """

    num_ranks: int
    window: tuple[int, int]
    totals: Totals
    phases: tuple[Phase, ...]
    layers: tuple[Phase, ...]
    kernels: tuple[Kernels, ...]
    unknown: tuple[Kernels, ...]
    exposed: tuple[Stretch, ...]
    missing: tuple[str, ...]

    def ms(self, total_ns: int) -> float:
        """The mean of the ranks, in milliseconds, of what was summed over them."""
        return total_ns / self.num_ranks / _NS

    @property
    def exposed_waiting(self) -> int:
        """Of the exposed communication, where only notifications and barriers run."""
        return sum(stretch.exposed.waiting for stretch in self.exposed)

    @property
    def waiting_known(self) -> bool:
        """Whether any kernel that only waits ran; without one, waiting cannot be told."""
        return any(k.group == COMMUNICATION and k.role == WAIT for k in self.kernels)

    @property
    def unknown_percent(self) -> float | None:
        """Share of kernels that no rule names in the time of all kernels; None without any."""
        return percent(sum(k.busy for k in self.unknown), sum(k.busy for k in self.kernels))


def summarise(reports: Sequence[Report], begins: Sequence[int]) -> Summary:
    """The reports of some ranks as one.

    Args:
        reports: of at least one rank.
        begins: when each of their traces begins, ns.
    """
    pairs = list(zip(reports, begins, strict=True))
    stretches = [
        Stretch(report.rank, begin, exposed)
        for report, begin in pairs
        for exposed in report.exposed
    ]
    return Summary(
        num_ranks=len(reports),
        window=_hull([(report.window, begin) for report, begin in pairs]),
        totals=Totals(*map(sum, zip(*(report.totals for report in reports), strict=True))),
        phases=_phases([(phase, begin) for report, begin in pairs for phase in report.phases]),
        layers=_phases([(phase, begin) for report, begin in pairs for phase in report.layers]),
        kernels=_kernels(kernel for report in reports for kernel in report.kernels),
        unknown=_kernels(kernel for report in reports for kernel in report.unknown),
        exposed=tuple(sorted(stretches, key=_shortness)),
        missing=tuple(_missing(reports)),
    )


def percent(part: float, whole: float) -> float | None:
    """A share; None of nothing."""
    return 100 * part / whole if whole else None


def _shortness(stretch: Stretch) -> int:
    start, end = stretch.exposed.interval
    return start - end


def _missing(reports: Sequence[Report]) -> Iterator[str]:
    of: dict[str, list[str]] = {}
    for report in reports:
        name = report.source if report.rank is None else f"rank {report.rank}"
        for line in dict.fromkeys(report.missing):
            of.setdefault(line, []).append(name)
    for line, names in of.items():
        yield line if len(names) == len(reports) else f"{', '.join(names)}: {line}"


def _hull(windows: Sequence[tuple[tuple[int, int], int]]) -> tuple[int, int]:
    """From the earliest start to the latest end, each counted from its trace's begin."""
    return (
        min(start - begin for (start, _), begin in windows),
        max(end - begin for (_, end), begin in windows),
    )


def _phases(phases: Iterable[tuple[Phase, int]]) -> tuple[Phase, ...]:
    """One entry a phase and layer; those that ranks have in common keep the first one's order."""
    alike: dict[tuple[str, int | None], list[tuple[Phase, int]]] = {}
    for phase, begin in phases:
        alike.setdefault((phase.name, phase.layer), []).append((phase, begin))
    return tuple(_as_one(group) for group in alike.values())


def _as_one(group: Sequence[tuple[Phase, int]]) -> Phase:
    phases = [phase for phase, _ in group]
    behind: Counter[str] = Counter()
    for phase in phases:
        behind.update(phase.behind)
    sent = [phase.sent_bytes for phase in phases if phase.sent_bytes is not None]
    return Phase(
        name=phases[0].name,
        layer=phases[0].layer,
        count=sum(phase.count for phase in phases),
        window=_hull([(phase.window, begin) for phase, begin in group]),
        compute=sum(phase.compute for phase in phases),
        comm=sum(phase.comm for phase in phases),
        exposed=sum(phase.exposed for phase in phases),
        waiting=sum(phase.waiting for phase in phases),
        behind=dict(behind.most_common()),
        inferred=any(phase.inferred for phase in phases),
        sent_bytes=sum(sent) if len(sent) == len(phases) else None,
        waiting_known=any(phase.waiting_known for phase in phases),
        algorithm_bytes=_sum(phase.algorithm_bytes for phase in phases),
        bus_bytes=_sum(phase.bus_bytes for phase in phases),
    )


def _sum(numbers: Iterable[int | None]) -> int | None:
    """None where any is not told."""
    told = list(numbers)
    known = [number for number in told if number is not None]
    return sum(known) if len(known) == len(told) else None


def _kernels(kernels: Iterable[Kernels]) -> tuple[Kernels, ...]:
    """One entry a name, those with most time first."""
    alike: dict[tuple[str, str, str], list[Kernels]] = {}
    for kernel in kernels:
        alike.setdefault((kernel.name, kernel.group, kernel.role), []).append(kernel)
    summed: list[Kernels] = []
    for group in alike.values():
        blocks = [kernel.blocks for kernel in group if kernel.blocks is not None]
        sent = [kernel.sent_bytes for kernel in group if kernel.sent_bytes is not None]
        summed.append(
            replace(
                group[0],
                count=sum(kernel.count for kernel in group),
                busy=sum(kernel.busy for kernel in group),
                blocks=(min(b[0] for b in blocks), max(b[1] for b in blocks)) if blocks else None,
                sent_bytes=sum(sent) if sent else None,
                algorithm_bytes=_sum(kernel.algorithm_bytes for kernel in group),
                bus_bytes=_sum(kernel.bus_bytes for kernel in group),
            )
        )
    return tuple(sorted(summed, key=lambda kernel: -kernel.busy))
