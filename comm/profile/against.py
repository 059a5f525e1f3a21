"""A measured run beside its simulation: action by action, phase by phase, and what differs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import median_low

from .classify import RULES, Rule
from .comparison import ActionTime, Comparison, KindTime
from .differences import all_together, each_by_itself, of_pairs
from .findings import findings_of
from .lineup import LineUp, line_up
from .matched import MatchedRow
from .phases import PHASE_PATTERN
from .phases_against import bare_phases, compared_phases, no_pairs, pairs_of
from .report import Report
from .rows import PhaseRun, Row, phase_runs
from .simulated import Simulated, kind_of
from .trace import Trace


def against(
    simulated: Simulated,
    traces: Sequence[Trace],
    reports: Sequence[Report],
    *,
    offsets: Sequence[int] | None = None,
    rules: Sequence[Rule] = RULES,
    phase_pattern: str = PHASE_PATTERN,
) -> Comparison:
    """Lay what was measured beside what was simulated.

    Of each rank in each training step, the row of actions has a measured and a simulated length.
    Both are cut into the same kinds of stretches, without gap or overlap, so that

        measured - simulated = sum over kind, part and phase of (measured - simulated) there

    holds in whole ns, on every rank. `comparison` says what the parts are. Where the simulation has
    no phases, all of a simulated action counts as computing.

    A trace that marks no actions is compared phase by phase only: with the phases of simulated
    pairs, if there are any, or else of all actions. Its pair of median length takes the place of a
    row, if pairs of as many layers were simulated.

    Args:
        simulated: what was predicted.
        traces: of the ranks of one run, or some of them.
        reports: of each of these traces; what lies outside their windows is left out.
        offsets: for each trace what to add to its times, so that all have one clock, ns. With
            them rows are taken from the first start to the last end of any rank, which makes the
            makespan; without, each rank's own row counts.
        rules: what kernels do, by name.
        phase_pattern: regular expression that the whole name of a phase fits.

    Raises:
        ValueError: the ranks do not fit, or the trace and the simulation have nothing in common;
            the message says what to do.
    """
    lined = line_up(simulated, traces, reports, offsets, rules, phase_pattern)
    result = (_by_actions if lined.matched else _by_phases)(simulated, lined)
    if lined.matched and offsets is not None:
        result = _together(result, lined)
    return replace(result, findings=findings_of(result))


def _by_actions(simulated: Simulated, lined: LineUp) -> Comparison:
    """The comparison of runs that mark their actions, each rank's row by itself."""
    matched, predicted = lined.matched, lined.predicted
    missing = list(lined.missing)
    if not simulated.has_phases:
        missing.append(
            "the simulation has no phases, so all of a simulated action counts as computing; "
            "simulate with [phases] in the file of costs to tell communication apart"
        )
    actions = tuple(
        time
        for m, row in zip(matched, predicted, strict=True)
        for time in _action_times(m, row, lined.times)
    )
    return Comparison(
        source=simulated.source,
        schedule=simulated.schedule,
        unit=simulated.unit,
        ns_per_unit=lined.ns_per_unit,
        fitted=simulated.ns_per_unit is None,
        steps=max(len(m.rows) for m in matched),
        actions=actions,
        kinds=_kind_times(actions),
        phases=compared_phases(
            [run for m in matched for row in m.rows for run in _within(row)],
            [run for row in predicted for run in phase_runs(row)],
        ),
        together=False,
        ranks=each_by_itself(matched, predicted),
        pair=None,
        findings=(),
        missing=tuple(missing),
    )


def _together(result: Comparison, lined: LineUp) -> Comparison:
    """The same with rows from the first start to the last end of any rank."""
    ranks = all_together(lined.matched, lined.predicted)
    if ranks:
        return replace(result, together=True, ranks=ranks)
    missing = "no training step is in all traces, so each rank's row is compared by itself"
    return replace(result, missing=(*result.missing, missing))


def _by_phases(simulated: Simulated, lined: LineUp) -> Comparison:
    """The comparison of traces that mark phases and no actions."""
    phases, pair = bare_phases(simulated, lined.phases, lined.ns_per_unit)
    ranks = of_pairs(lined.ranks, lined.bare, lined.phases, simulated, lined.ns_per_unit)
    missing = lined.missing
    pairs = [pair for of in lined.phases for pair in pairs_of(of)]
    if not pairs:
        missing += (no_pairs(lined.phases),)
    if pair is not None and not ranks:
        layers = sorted({pair.num_layers for pair in pairs})
        missing += (
            f"pairs of {' or '.join(map(str, layers))} layers were measured and none of as many "
            f"simulated; simulate with layers = {layers[0]} in [phases] to have the difference "
            "explained",
        )
    return Comparison(
        source=simulated.source,
        schedule=simulated.schedule,
        unit=simulated.unit,
        ns_per_unit=lined.ns_per_unit,
        fitted=simulated.ns_per_unit is None,
        steps=0,
        actions=(),
        kinds=(),
        phases=phases,
        together=False,
        ranks=ranks,
        pair=pair,
        findings=(),
        missing=missing,
    )


def _kind(name: str) -> tuple[str, str]:
    found = kind_of(name)
    assert found is not None, "only actions are matched"
    return found


def _action_times(
    matched: MatchedRow, predicted: Row, medians: Mapping[tuple[int, str], tuple[int, int]]
) -> Iterator[ActionTime]:
    by_name = {action.name: action for action in predicted.actions}
    for name in matched.names:
        _, first, last = by_name[name]
        time, start = medians[matched.rank, name]
        starts = (start, first - predicted.start)
        yield ActionTime(matched.rank, name, *_kind(name), time, last - first, starts)


def _within(row: Row) -> list[PhaseRun]:
    """The phase runs that begin within the row."""
    return [run for run in phase_runs(row) if row.start <= run.start < row.end]


def _kind_times(actions: Iterable[ActionTime]) -> tuple[KindTime, ...]:
    """By kind and stage, in the order of first appearance."""
    groups: defaultdict[tuple[str, str], list[ActionTime]] = defaultdict(list)
    for action in actions:
        groups[action.kind, action.stage].append(action)
    return tuple(
        KindTime(
            kind,
            stage,
            len(of),
            median_low(action.measured for action in of),
            median_low(action.simulated for action in of),
        )
        for (kind, stage), of in groups.items()
    )
