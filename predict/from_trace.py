"""Calibration from a trace: what each phase of a layer took in a pair, on the machine of the trace.

What the trace must hold is a pair of chunks of layers with experts, every phase of
`simulate.phases.NAMES` marked, as DeepSeek's published one (github.com/deepseek-ai/profile-data).
A phase's time is the mean over the trace's layers: of one that computes the union of its kernels,
of one that communicates what it moved data for, notifications and barriers left out. What the pair
took beyond these phases on their two lanes, waits for other ranks included, is `pair_gaps`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..comm.profile.analyse import analyse
from ..comm.profile.read import read
from ..comm.profile.report import Phase, Report
from ..model import ModelConfig
from ..parallel.schedule.interleaving import PUBLISHED_ORDER
from ..parallel.simulate.phases import COMPUTE, NAMES, compose, duration, lane_of
from .calibration import Calibration, Reference
from .cluster import Cluster
from .layout import Layout

_MOST_GAPS = 1.25


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
        ValueError: it cannot be read, or lacks phases; the message says which.
    """
    report = analyse(read(path))
    times = phase_times(report)
    split = report.sm_split
    if split is not None and split.comm is not None:
        layout = replace(layout, comm_sms=split.comm)
    name = Path(path).name
    reference = Reference("moe", model, layout, {}, times, name, cluster)
    return Calibration(
        "trace", name, (reference,), pair_gaps=pair_gaps(report, times), layers=layers_of(report)
    )


def phase_times(report: Report) -> dict[str, float]:
    """Time of each phase of one layer, ms.

    Raises:
        ValueError: phases are missing.
    """
    found = {phase.name: phase for phase in report.phases}
    missing = [name for name in NAMES if not _ran(found.get(name))]
    if missing:
        seen = ", ".join(name for name in NAMES if name not in missing) or "none"
        raise ValueError(
            f"{report.source}: a prediction needs the time of every phase of a layer with experts, "
            f"in a pair; missing: {', '.join(missing)} (there: {seen}). Record a step with "
            "overlapped pairs, its phases marked (docs/profile.md)"
        )
    return {name: _busy(found[name]) / found[name].count * 1e-6 for name in NAMES}


def layers_of(report: Report) -> int:
    """Layers of the pair."""
    return max(phase.count for phase in report.phases if phase.name in NAMES)


def pair_gaps(report: Report, times: Mapping[str, float]) -> float:
    """How much longer than its phases on their lanes the trace's time was; 1 if it was not.

    Also 1 where it was longer by more than _MOST_GAPS: then the trace holds more than pairs.
    """
    layers = layers_of(report)
    composed = duration(compose(PUBLISHED_ORDER, [times] * layers, [times] * layers))
    windows = [phase.window for phase in report.phases if phase.name in NAMES]
    span = max(end for _, end in windows) - min(start for start, _ in windows)
    gaps = span * 1e-6 / composed
    return gaps if 1.0 < gaps < _MOST_GAPS else 1.0


def _ran(phase: Phase | None) -> bool:
    return phase is not None and phase.count > 0 and _busy(phase) > 0


def _busy(phase: Phase) -> int:
    return phase.compute if lane_of(phase.name) == COMPUTE else phase.transfer
