"""Which of several GPUs in one trace is looked at.

A rank has one GPU. A process that drives several, as in tensor parallelism within one process,
writes them into one trace; taken together, what one of them computes would seem to hide what
another communicates.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from .trace import Trace


def of_device(trace: Trace, device: int | None = None) -> Trace:
    """The trace with the activities of one GPU alone; the others are told in `missing`.

    Args:
        trace: of one rank.
        device: index of the GPU; None for that with most activities, of equals the first, as a
            process may touch another by accident.

    Raises:
        ValueError: nothing ran on that device.
    """
    counts = Counter(activity.device for activity in trace.activities)
    if not trace.on_gpu or not counts:
        if device is not None:
            raise ValueError(f"{trace.source}: no GPU is in the trace, so there is no {device}")
        return trace
    if device is None:
        device = min(counts, key=lambda index: (-counts[index], index))
    if device not in counts:
        there = ", ".join(map(str, sorted(counts)))
        raise ValueError(
            f"{trace.source}: nothing ran on GPU {device}; GPUs with activities: {there}"
        )
    if len(counts) == 1:
        return trace
    others = ", ".join(
        f"GPU {index} ({counts[index]} activities)" for index in sorted(counts) if index != device
    )
    told = (
        f"SEVERAL GPUS ARE IN ONE TRACE: GPU {device} alone is analysed ({counts[device]} "
        f"activities), and left out are {others}; name another with --device"
    )
    return replace(
        trace,
        activities=tuple(one for one in trace.activities if one.device == device),
        missing=(told, *trace.missing),
    )
