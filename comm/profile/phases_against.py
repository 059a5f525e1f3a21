"""Phases of a run beside the simulated ones: what one run of each takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import median, median_low
from typing import NamedTuple

from .comparison import PhaseTime
from .rows import PhaseRun, phase_runs, simulated_row
from .simulated import COMMUNICATION, COMPUTE, Simulated

# A simulation without a unit is looked at as if it took this long, to find what a unit is.
_TRIAL_NS = 10**12


class PairRun(NamedTuple):
    """A pair of chunks, in a trace that marks no actions.

    Attributes:
        number: of the trace's pairs, from 0.
        start, end: of its first and its last phase, ns.
        num_layers: that the two pass.
    """

    number: int
    start: int
    end: int
    num_layers: int


def bare_scale(simulated: Simulated, phases: Sequence[Sequence[PhaseRun]]) -> float:
    """What a unit of the simulation is in ns; fitted to the median phase if it is none of time.

    Args:
        simulated: what was predicted.
        phases: of each trace the runs of its phases.

    Raises:
        ValueError: the traces or the simulation have no phases, or they have none in common.
    """
    measured = [run for of_rank in phases for run in of_rank]
    if not measured:
        raise ValueError(
            f"{simulated.source}: nothing can be compared, because the traces mark neither actions "
            "such as 0F3 nor phases such as dispatch(F); record a run that does"
        )
    if not simulated.has_phases:
        raise ValueError(
            f"{simulated.source}: nothing can be compared, because the traces mark no actions such "
            "as 0F3, only phases, and the simulation has none; simulate with [phases] in the file "
            "of costs"
        )
    known = simulated.ns_per_unit
    trial = known or _TRIAL_NS / simulated.makespan
    found = compared_phases(measured, _expected(simulated, trial))
    ratios = [phase.ratio for phase in found if phase.ratio]
    if not ratios:
        names = ", ".join(sorted({run.phase for run in measured}))
        raise ValueError(
            f"{simulated.source}: none of the traces' phases was simulated with a time: {names}"
        )
    return known or trial * median(ratios)


def bare_phases(
    simulated: Simulated, phases: Sequence[Sequence[PhaseRun]], ns_per_unit: float
) -> tuple[tuple[PhaseTime, ...], tuple[int, int] | None]:
    """Compare the phases of traces without actions with those of simulated pairs, or else of all.

    Returns:
        The phases; and the time of one layer of a pair, measured and simulated, if both have one.
    """
    found = compared_phases(
        [run for of_rank in phases for run in of_rank], _expected(simulated, ns_per_unit)
    )
    layers = [
        (pair.end - pair.start) // pair.num_layers
        for of_rank in phases
        for pair in pairs_of(of_rank)
    ]
    pairs = [
        (action.end - action.start)
        * ns_per_unit
        / (1 + max(phase.layer for phase in action.phases))
        for actions in simulated.rows
        for action in actions
        if action.phases and action.is_pair
    ]
    return found, (median_low(layers), round(median(pairs))) if layers and pairs else None


def _expected(simulated: Simulated, ns_per_unit: float) -> list[PhaseRun]:
    runs = [
        run
        for actions in simulated.rows
        if actions
        for run in phase_runs(simulated_row(actions, ns_per_unit))
    ]
    pairs = [run for run in runs if run.kind == "pair"]
    return [replace(run, kind="") for run in pairs or runs]


def pairs_of(runs: Iterable[PhaseRun]) -> list[PairRun]:
    """The pairs of chunks that runs of phases, by start, are of.

    A marked range that holds phases of a forward and of a backward (DeepSeek's "1F1B") is one, or
    several; without such ranges all runs are looked at together. Within it a new pair begins where
    a phase comes again for the same layer, whatever the layers' order: a backward passes them from
    the last to the first. Runs whose layer is not told are of no pair, and what has only phases of
    a forward or only those of a backward is none.
    """
    known = [run for run in runs if run.layer is not None]
    ranges: defaultdict[int, list[PhaseRun]] = defaultdict(list)
    for run in known:
        ranges[run.within].append(run)
    marked = [of for within, of in ranges.items() if within >= 0 and _is_pair(of)]
    pairs = [pair for of in marked or [known] for pair in _split(of) if _is_pair(pair)]
    return [
        PairRun(number, min(run.start for run in of), max(run.end for run in of), _num_layers(of))
        for number, of in enumerate(pairs)
    ]


def no_pairs(phases: Iterable[Iterable[PhaseRun]]) -> str:
    """Why traces without actions show no pair, in a sentence."""
    told = any(run.layer is not None for of in phases for run in of)
    why = (
        "no stretch has phases of both a forward and a backward"
        if told
        else "the traces mark no phases with layers"
    )
    return f"no pair of chunks is compared, as {why}; mark actions such as (0F7;7B3)"


def _split(runs: Iterable[PhaseRun]) -> list[list[PhaseRun]]:
    """Runs cut before each that repeats a phase and layer since the last cut."""
    parts: list[list[PhaseRun]] = []
    seen: set[tuple[str, int | None]] = set()
    for run in runs:
        if not parts or (run.phase, run.layer) in seen:
            parts.append([])
            seen = set()
        seen.add((run.phase, run.layer))
        parts[-1].append(run)
    return parts


def _is_pair(runs: Iterable[PhaseRun]) -> bool:
    """Whether there are phases of a forward and of a backward for inputs."""
    return {"F", "B"} <= {_half(run) for run in runs}


def _half(run: PhaseRun) -> str:
    """F, B or W, as the phase's name ends; I is B."""
    return run.phase[-2:-1].replace("I", "B") if run.phase.endswith(")") else ""


def _num_layers(runs: Sequence[PhaseRun]) -> int:
    """Layers that either chunk passes; the two need not be the same ones."""
    return max(len({run.layer for run in runs if _half(run) == half}) for half in ("F", "B"))


def compared_phases(
    measured: Iterable[PhaseRun], predicted: Iterable[PhaseRun]
) -> tuple[PhaseTime, ...]:
    """By kind of action and phase, those that were measured."""
    expected: defaultdict[tuple[str, str], list[PhaseRun]] = defaultdict(list)
    for run in predicted:
        expected[run.kind, run.phase].append(run)
    groups: defaultdict[tuple[str, str], list[PhaseRun]] = defaultdict(list)
    for run in measured:
        groups[run.kind, run.phase].append(run)
    return tuple(
        _phase_time(kind, phase, runs, expected[kind, phase])
        for (kind, phase), runs in groups.items()
    )


def _phase_time(
    kind: str, phase: str, runs: Sequence[PhaseRun], expected: Sequence[PhaseRun]
) -> PhaseTime:
    told = expected or runs
    computes = sum(run.computing for run in told) >= sum(run.transfer + run.waiting for run in told)

    def busy(run: PhaseRun) -> int:
        return run.computing if computes else run.transfer

    return PhaseTime(
        name=phase,
        kind=kind,
        lane=COMPUTE if computes else COMMUNICATION,
        count=len(runs),
        measured=median_low(map(busy, runs)),
        waiting=median_low(run.waiting for run in runs),
        exposed=median_low(run.exposed for run in runs),
        simulated=median_low(map(busy, expected)) if expected else None,
        simulated_exposed=median_low(run.exposed for run in expected) if expected else None,
    )
