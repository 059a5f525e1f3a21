"""A run's traces lined up with its simulation: which rows belong together, on one scale."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median, median_low

from .classify import Rule
from .matched import Found, MatchedRow, match_rows
from .measured import measured_rows, measured_runs
from .phases_against import bare_scale
from .report import Report
from .rows import PhaseRun, Row, phase_runs, simulated_row
from .simulated import Simulated
from .trace import Trace

# What runs under marks of its own and is part of mlp in a plan: shared experts, and what lies
# before and after the layers.
_OF_MLP = ("shared", "output", "embed")


@dataclass(frozen=True)
class LineUp:
    """What is compared with what.

    Attributes:
        ranks: of the traces; of one that does not tell, its number among them.
        bare: all of each trace within its report's window, as a row without actions.
        phases: where no trace marks actions, of each trace the runs of its phases.
        matched: the ranks whose actions were simulated, too; empty if no trace marks actions.
        predicted: the simulated row of each of these, in ns, cut to what both have.
        times: of each of their actions, by rank and name: how long it is and how long after its
            row's start it starts, ns; medians over the training steps.
        ns_per_unit: of the simulation's times.
        missing: what has nothing to be compared with, in sentences.
    """

    ranks: tuple[int, ...]
    bare: tuple[Row, ...]
    phases: tuple[list[PhaseRun], ...]
    matched: tuple[MatchedRow, ...]
    predicted: tuple[Row, ...]
    times: dict[tuple[int, str], tuple[int, int]]
    ns_per_unit: float
    missing: tuple[str, ...]


def line_up(
    simulated: Simulated,
    traces: Sequence[Trace],
    reports: Sequence[Report],
    offsets: Sequence[int] | None,
    rules: Sequence[Rule],
    phase_pattern: str,
) -> LineUp:
    """Find the measured rows and the simulated ones that they are to be compared with.

    Args and errors are those of `against`.
    """
    assert len(traces) == len(reports), "a report a trace"
    assert offsets is None or len(offsets) == len(traces), "an offset a trace"
    if not traces:
        raise ValueError(f"{simulated.source}: there is no trace to compare it with")
    bare: list[Row] = []
    found: list[Found] = []
    for number, (trace, report) in enumerate(zip(traces, reports, strict=True)):
        runs = measured_runs(trace, rules, phase_pattern, report.window)
        if simulated.planned is not None:
            runs = [run._replace(phase=_as_planned(run.phase)) for run in runs]
        rows = measured_rows(trace, runs, report.window)
        if rows:
            offset = 0 if offsets is None else offsets[number]
            found.append(Found(number, trace, offset, rows))
        bare.append(Row("", *report.window, (), tuple(runs)))
    ranks = tuple(number if t.rank is None else t.rank for number, t in enumerate(traces))
    if not found:
        missing = "the traces mark no actions such as 0F3, so phases alone are compared"
        phases = tuple(map(phase_runs, bare))
        scale = bare_scale(simulated, phases)
        return LineUp(ranks, tuple(bare), phases, (), (), {}, scale, (missing,))
    matched, missing = match_rows(simulated, found, len(traces))
    times = {(m.rank, name): _median_time(m, name) for m in matched for name in m.names}
    units = {(m.rank, a.name): a.end - a.start for m in matched for a in m.actions}
    scale = simulated.ns_per_unit or _fitted(
        simulated, ((time, units[key]) for key, (time, _) in times.items())
    )
    predicted = tuple(simulated_row(m.actions, scale) for m in matched)
    return LineUp(ranks, tuple(bare), (), tuple(matched), predicted, times, scale, tuple(missing))


def _as_planned(phase: str) -> str:
    """The phase that a plan counts a measured one to: it knows those of a layer alone."""
    name, bracket, direction = phase.partition("(")
    return f"mlp{bracket}{direction}" if name in _OF_MLP else phase


def _median_time(matched: MatchedRow, name: str) -> tuple[int, int]:
    """Median over the training steps of an action's time and of its start in the row, ns."""
    found = [
        (action.end - action.start, action.start - row.start)
        for row in matched.rows
        for action in row.actions
        if action.name == name
    ]
    return median_low(time for time, _ in found), median_low(start for _, start in found)


def _fitted(simulated: Simulated, pairs: Iterable[tuple[float, float]]) -> float:
    """Median ratio of times measured, in ns, to those simulated, in a unit that is none of time."""
    ratios = [measured / units for measured, units in pairs if units > 0 and measured > 0]
    if not ratios:
        raise ValueError(
            f"{simulated.source}: its times have no unit, and the actions of the trace no length "
            'to fit one to; give the costs a unit, such as unit = "ms" in a file of costs'
        )
    return median(ratios)
