"""Reads the traces of PyTorch's profiler, or of others who write Chrome's format, as they are."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .collect import Collector
from .files import TraceFile, trace_files
from .metadata import all_groups, expert_ranks, groups, names_gpus, place, whole
from .scan import Scanned, scan
from .trace import Trace, TraceError


@dataclass(frozen=True)
class Traces:
    """Traces of several ranks.

    Attributes:
        traces: by rank; those that do not tell theirs come last, in the order of the files.
        missing: ranks that are not there or there twice, and files left out, in sentences. What
            else is odd about several ranks, `compare_ranks` tells.
    """

    traces: tuple[Trace, ...]
    missing: tuple[str, ...] = ()


def read(path: str | os.PathLike[str], *, quick: bool = True) -> Trace:
    """Read one rank's trace, .json or .json.gz, whole or broken off.

    Args:
        path: of the file.
        quick: skip what is not needed without decoding it. The result is the same, unless the
            text is damaged within what is skipped.

    Raises:
        TraceError: the file cannot be read, is no trace, or nothing in it is of use, or it is of a
            GPU and breaks off before its first kernel.
    """
    file = TraceFile(Path(path))
    with _without_collection():
        collector, scanned = _scan(file, quick, operators=False)
        activities = collector.activities(groups(scanned.top))
        on_gpu = bool(activities)
        if not on_gpu:
            if scanned.broken and names_gpus(scanned.top):
                raise TraceError(_cut_off(file, scanned))
            if not collector.operators:  # few traces are read twice, and no GPU's operators held
                collector, scanned = _scan(file, quick, operators=True)
            activities = collector.cpu_operators()
        annotations = collector.annotations()
    if not activities and not annotations:
        raise TraceError(_useless(file, scanned))
    devices = {activity.device: 0 for activity in activities}
    for activity in activities:
        devices[activity.device] += 1
    told = place(scanned.top, file.path, sorted(devices, key=lambda idx: (-devices[idx], idx)))
    return Trace(
        source=str(file.path),
        activities=tuple(activities),
        annotations=tuple(annotations),
        on_gpu=on_gpu,
        rank=told.rank,
        world_size=told.world_size,
        num_sms=told.num_sms if on_gpu else None,
        device_name=told.device_name if on_gpu else "",
        clock_ns=whole(scanned.top.get("baseTimeNanoseconds")) or 0,
        num_events=scanned.num_events,
        missing=tuple(_missing(file, scanned, collector, on_gpu, len(activities))),
        broken=_broken(file, scanned),
        groups=all_groups(scanned.top),
        expert_ranks=expert_ranks(scanned.top),
    )


def read_all(paths: Iterable[str | os.PathLike[str]], *, quick: bool = True) -> Traces:
    """Read the traces of several ranks, from files or from folders that hold a file a rank.

    A file that is named must be a trace; in a folder, what is none is left out and told. Of
    several files of one rank the first is taken.

    Raises:
        TraceError: a named file is no trace, or there is none at all.
    """
    traces: list[Trace] = []
    missing: list[str] = []
    for path in paths:
        files = trace_files(path)
        for file in files:
            try:
                traces.append(read(file, quick=quick))
            except TraceError as error:
                if files == [Path(path)]:
                    raise
                missing.append(f"left out: {error}")
    if not traces:
        raise TraceError(
            "there is no trace to read. " + (" ".join(missing) or "Name a file or a folder.")
        )
    return _by_rank(traces, missing)


def _by_rank(traces: list[Trace], missing: list[str]) -> Traces:
    """Sort by rank, and tell which are missing or twice there."""
    first: dict[int, Trace] = {}
    for trace in traces:
        if trace.rank is None:
            continue
        kept = first.setdefault(trace.rank, trace)
        if kept is not trace:
            missing.append(
                f"rank {trace.rank} is there twice: {kept.source} is used, {trace.source} is not"
            )
    nameless = [trace for trace in traces if trace.rank is None]
    sizes = {trace.world_size for trace in traces if trace.world_size}
    if len(traces) > 1 and first:
        world = max(max(sizes, default=0), max(first) + 1)
        absent = [rank for rank in range(world) if rank not in first]
        if absent:
            missing.append(f"there is no trace of rank {_ranges(absent)}, of {world} ranks")
    ordered = [first[rank] for rank in sorted(first)]
    return Traces((*ordered, *nameless), tuple(missing))


def _ranges(numbers: list[int]) -> str:
    """Sorted numbers in short: 1-3, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


def _scan(file: TraceFile, quick: bool, operators: bool) -> tuple[Collector, Scanned]:
    collector = Collector(operators)
    scanned = scan(file.blocks(), collector.take, collector.wanted, quick)
    if not scanned.num_events:
        raise TraceError(_useless(file, scanned))
    return collector, scanned


def _useless(file: TraceFile, scanned: Scanned) -> str:
    """Why there is nothing to analyse, and what to do."""
    if file.damage:
        what = f"is no use: {file.damage} before the first event"
    elif scanned.num_events:
        what = f"has {scanned.num_events} events, but no kernel, operator or annotation among them"
    elif scanned.found:
        what = "has no events" + (f": its text {scanned.broken}" if scanned.broken else "")
    elif scanned.broken:
        what = scanned.broken if scanned.offset == 0 else f"is no trace: its text {scanned.broken}"
    else:
        what = f'has no list "traceEvents", only {", ".join(sorted(scanned.top)) or "nothing"}'
    return (
        f"{file.path} {what}. Give a trace that torch.profiler exported in Chrome's format, such "
        "as `counterflow train --profile STEPS` writes."
    )


def _cut_off(file: TraceFile, scanned: Scanned) -> str:
    """That a trace of a GPU has lost its kernels: its operators are no run of a CPU."""
    return (
        f"{file.path} breaks off after {scanned.num_events} events, before its first kernel "
        f"({_broken(file, scanned)}): it names a GPU, so its kernels were cut off, and the "
        "operators that are left do not tell what ran. Record it again, and let the profiler "
        "finish writing."
    )


def _broken(file: TraceFile, scanned: Scanned) -> str:
    """Why the trace breaks off before its end; "" if it is whole."""
    return (file.damage or f"its text {scanned.broken}") if scanned.broken else ""


def _missing(
    file: TraceFile, scanned: Scanned, collector: Collector, on_gpu: bool, num_activities: int
) -> Iterator[str]:
    """Sentences on what the trace lacks."""
    why = _broken(file, scanned)
    if why:
        yield (
            f"the trace breaks off after {scanned.num_events} events, at character "
            f"{scanned.offset}: {why}; what comes later in the file is not counted, and as events "
            "are not in the order of time, it may be of any stream and time"
        )
    if not on_gpu:
        yield "the trace has no kernels: operators of the CPU are analysed instead"
    if collector.num_malformed:
        yield f"{collector.num_malformed} events without a usable time were left out"
    if collector.num_negative:
        yield f"{collector.num_negative} events end before they start; they count as no time"
    if collector.num_open:
        yield f"{collector.num_open} ranges lack their beginning or end and were left out"
    if on_gpu and collector.num_unlaunched:
        yield (
            f"{collector.num_unlaunched} of {num_activities} activities of the GPU have no "
            "launch in the trace"
        )
    if collector.num_early:
        yield (
            f"{collector.num_early} activities start before they are launched, by up to "
            f"{collector.most_early / 1e6:.3f} ms: the clocks of host and GPU disagree, or "
            "launches are joined to the wrong activities; times between activities hold all the "
            "same, but do not rely on windows named by a range, on phases, which follow from "
            "launches and from ranges drawn on streams, or on host ranges beside those of the GPU"
        )


@contextmanager
def _without_collection() -> Generator[None]:
    """Pause the search for garbage cycles: millions of values are made here, and no cycle."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
