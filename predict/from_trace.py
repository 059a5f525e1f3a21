"""Calibration from a trace: what each phase of a layer took in a pair, on the machine of the trace.

What the trace must hold are pairs of chunks of layers with experts, every phase of
`simulate.phases.NAMES` marked: DeepSeek's published one (github.com/deepseek-ai/profile-data) is
one pair and nothing else; one that `counterflow train --profile` recorded marks its actions too,
and of these the pairs are taken in which every phase ran as often. A phase's time is the mean over
layers: of one that computes the union of its kernels, of one that communicates what it moved data
for, notifications and barriers left out. What F, I and W took of a phase is its time alone. What a
pair took beyond its phases on their two lanes, waits for other ranks included, is `pair_gaps`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median

from ..comm.profile.analyse import analyse
from ..comm.profile.classify import RULES
from ..comm.profile.measured import measured_rows, measured_runs
from ..comm.profile.phases import PHASE_PATTERN
from ..comm.profile.read import read
from ..comm.profile.report import Phase, Report
from ..comm.profile.rows import Action
from ..comm.profile.simulated import kind_of
from ..comm.profile.trace import Trace
from ..model import ModelConfig
from ..parallel.schedule.interleaving import PUBLISHED_ORDER
from ..parallel.simulate.phases import COMPUTE, NAMES, compose, duration, lane_of
from .calibration import Calibration, Reference
from .cluster import Cluster
from .layout import Layout

# A trace without marks of actions that lasts longer by so much holds more than pairs.
_MOST_GAPS = 1.25
# So many of each kind of action say enough; each is a walk over the trace.
_ENOUGH = 4


def from_trace(
    path: str | Path, model: ModelConfig, layout: Layout, cluster: Cluster
) -> Calibration:
    """What a trace tells of a machine's speed.

    Args:
        path: of a trace by PyTorch's profiler, of one rank.
        model: what ran.
        layout: how it ran: expert-parallel ranks, tokens of a micro-batch, formats. SMs are the
            trace's own where its launch grids tell them.
        cluster: on what it ran.

    Raises:
        ValueError: it cannot be read, or lacks phases or pairs of layers with experts; the message
            says which.
    """
    trace = read(path)
    if not trace.on_gpu and cluster.gpu.num_sms:
        raise ValueError(
            f"{path}: is of a run on CPUs, which tells nothing of {cluster.gpu.name} GPUs; measure "
            "the machine of the run instead (counterflow doctor --measure)"
        )
    whole = analyse(trace)
    actions = _actions(trace, whole)
    alone: dict[str, float] = {}
    if actions:
        pairs = [one for one in _reports(trace, actions, "pair") if _is_even(one)]
        if not pairs:
            phase_times([whole])  # says which phases there are not at all
            raise ValueError(
                f"{whole.source}: a prediction needs a pair in which each phase of a layer with "
                "experts ran as often; this trace has none. Record a rank that holds such layers "
                "alone, by a schedule with pairs such as dualpipe"
            )
        for kind in ("F", "I", "W"):
            alone |= _means(_reports(trace, actions, kind))
    else:
        pairs = [whole]
    paired = phase_times(pairs)
    gaps = median(_gaps(one, paired) for one in pairs)
    if not actions and gaps >= _MOST_GAPS:
        gaps = 1.0
    split = whole.sm_split
    if split is not None and split.comm is not None:
        layout = replace(layout, comm_sms=split.comm)
    name = Path(path).name
    reference = Reference("moe", model, layout, alone, paired, name, cluster)
    layers = _counts(pairs[0])["attn(F)"]
    return Calibration("trace", name, (reference,), pair_gaps=max(1.0, gaps), layers=layers)


def phase_times(reports: Sequence[Report]) -> dict[str, float]:
    """Time of each phase of one layer, ms, over all reports.

    Raises:
        ValueError: phases are missing.
    """
    times = _means(reports)
    missing = [name for name in NAMES if name not in times]
    if missing:
        seen = ", ".join(name for name in NAMES if name not in missing) or "none"
        raise ValueError(
            f"{reports[0].source}: a prediction needs the time of every phase of a layer with "
            f"experts, in a pair; missing: {', '.join(missing)} (there: {seen}). Record a step "
            "with overlapped pairs, its phases marked (docs/profile.md)"
        )
    return times


def _actions(trace: Trace, report: Report) -> list[Action]:
    """What the trace marks as steps of a schedule."""
    runs = measured_runs(trace, RULES, PHASE_PATTERN, report.window)
    return [action for row in measured_rows(trace, runs, report.window) for action in row.actions]


def _reports(trace: Trace, actions: Iterable[Action], kind: str) -> list[Report]:
    """The first few actions of a kind, each by itself."""
    found = [one for one in actions if (kind_of(one.name) or ("", ""))[0] == kind]
    return [analyse(trace, window=(one.start, one.end)) for one in found[:_ENOUGH]]


def _means(reports: Iterable[Report]) -> dict[str, float]:
    """Of each phase that ran, the mean time of a layer, ms; shared experts are part of mlp."""
    busy: dict[str, list[float]] = defaultdict(list)
    for report in reports:
        counts, times = _counts(report), dict.fromkeys(NAMES, 0)
        for phase in report.phases:
            name = phase.name.replace("shared", "mlp")
            if name in times:
                times[name] += _busy(phase)
        for name, time in times.items():
            if counts.get(name) and time:
                busy[name].append(time / counts[name] * 1e-6)
    return {name: fmean(times) for name, times in busy.items()}


def _counts(report: Report) -> Mapping[str, int]:
    return {phase.name: phase.count for phase in report.phases if phase.name in NAMES}


def _is_even(report: Report) -> bool:
    """Whether every phase ran, and as often as each other: layers with experts alone."""
    counts = _counts(report)
    return len(counts) == len(NAMES) and len(set(counts.values())) == 1


def _gaps(report: Report, times: Mapping[str, float]) -> float:
    """How many times as long as its phases on their lanes it was."""
    layers = max(_counts(report).values())
    composed = duration(compose(PUBLISHED_ORDER, [times] * layers, [times] * layers))
    windows = [phase.window for phase in report.phases if phase.name in NAMES]
    span = max(end for _, end in windows) - min(start for start, _ in windows)
    return span * 1e-6 / composed


def _busy(phase: Phase) -> int:
    return phase.compute if lane_of(phase.name) == COMPUTE else phase.transfer
