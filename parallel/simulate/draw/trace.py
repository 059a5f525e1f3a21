"""A simulated step in the Chrome trace format, which Perfetto (ui.perfetto.dev) opens.

A process is a rank, and its threads are the lanes of `lanes`. Arrows (flow events) lead from the
step that makes a message, over its transfer, to the step that takes it; memory is a counter.

The format counts microseconds. Costs in "s", "ms", "us" or "ns" are shown as such; one unit of any
other, or of none, is shown as a millisecond. Times are whole eighths of a microsecond, which are
whole nanoseconds and exact in binary: so no bar overlaps the next by a rounding.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, cast

from ...schedule import Pair, Step
from ..analysis import StepLink, critical_path, waits
from ..events import Result
from ..memory import RankMemory
from ..phases import COMMUNICATION, COMPUTE
from .bars import FINISH, SENDING, STEPS, bars

Event: TypeAlias = dict[str, object]

_MICROSECONDS = {"s": 1e6, "ms": 1e3, "us": 1.0, "µs": 1.0, "ns": 1e-3}
_MICROSECONDS_A_UNIT = 1e3  # of costs whose unit is none of these
_PARTS = 8  # of a microsecond
# Threads of a rank, from the top; transfers under way at one time take one each, from SENDING on.
_THREADS = {STEPS: 0, COMPUTE: 1, COMMUNICATION: 2, FINISH: 3, SENDING: 4}
_NUMBERS_A_RANK = 100_000


def save_trace(
    result: Result, memories: Sequence[RankMemory], path: Path, *, memory_unit: str = "chunks"
) -> None:
    """Save `trace` as JSON.

    Raises:
        ValueError: as of `trace`.
        OSError: the file cannot be written.
    """
    made = trace(result, memories, memory_unit=memory_unit)
    path.write_text(json.dumps(made, separators=(",", ":")), encoding="utf-8")


def trace(
    result: Result, memories: Sequence[RankMemory], *, memory_unit: str = "chunks"
) -> dict[str, object]:
    """The trace, as what its JSON holds.

    Args:
        result: the simulated step.
        memories: what each rank holds, of the same result.
        memory_unit: `Memory.unit` of what the memories were made from.

    Raises:
        ValueError: the step takes more microseconds than a number can hold.
    """
    clock = _Clock(result.costs.unit)
    if not math.isfinite(result.makespan * clock.microseconds * _PARTS):
        raise ValueError(
            f"a trace counts microseconds, and a makespan of {result.makespan:.6g} "
            f"{result.costs.unit or 'ms'} is more of them than a number can hold; "
            "divide all times of the costs by one number"
        )
    sending = _sending(result, clock)
    events = [
        *_steps(result, clock),
        *_other_lanes(result, clock),
        *sending.values(),
        *_flows(result, clock, sending),
        *_counters(memories, result.makespan, clock, memory_unit),
    ]
    return {
        "traceEvents": [*_names(result.ranks, events), *events],
        "displayTimeUnit": "ms",
        "otherData": {
            "schedule": result.schedule,
            "ranks": result.ranks,
            "stages": result.stages,
            "microbatches": result.microbatches,
            "makespan": result.makespan,
            "bubble_rate": result.bubble_rate,
            "unit": result.costs.unit,
            "microseconds_a_unit": clock.microseconds,
        },
    }


class _Clock:
    """The unit of the costs in microseconds."""

    def __init__(self, unit: str) -> None:
        self.microseconds = _MICROSECONDS.get(unit, _MICROSECONDS_A_UNIT)

    def at(self, time: float) -> float:
        """A time as the trace has it."""
        return round(time * self.microseconds * _PARTS) / _PARTS

    def slice(
        self, rank: int, thread: int, name: str, span: tuple[float, float], args: Event
    ) -> Event:
        """A bar of a thread of a rank, from and to some time in the unit of the costs."""
        start, end = map(self.at, span)
        return {
            "name": name,
            "ph": "X",
            "ts": start,
            "dur": end - start,
            **_place(rank, thread),
            "args": args,
        }


def _place(rank: int, thread: int) -> Event:
    # Process 0 and thread 0 have a meaning of their own to some readers; a thread's number must
    # differ from those of all other ranks, and from its process's.
    return {"pid": rank + 1, "tid": (rank + 1) * _NUMBERS_A_RANK + thread}


def _names(ranks: int, events: Sequence[Event]) -> Iterator[Event]:
    """Names of processes and threads, and their order."""
    used = sorted({(cast(int, event["pid"]), cast(int, event["tid"])) for event in events})
    lanes = {thread: lane for lane, thread in _THREADS.items()}
    for rank in range(ranks):
        process = {"ph": "M", "ts": 0, **_place(rank, _THREADS[STEPS])}
        yield {"name": "process_name", **process, "args": {"name": f"rank {rank}"}}
        yield {"name": "process_sort_index", **process, "args": {"sort_index": rank}}
    for pid, tid in used:
        thread = tid % _NUMBERS_A_RANK
        name = lanes.get(thread, f"{SENDING} {thread - _THREADS[SENDING] + 1}")
        meta = {"ph": "M", "ts": 0, "pid": pid, "tid": tid}
        yield {"name": "thread_name", **meta, "args": {"name": name}}
        yield {"name": "thread_sort_index", **meta, "args": {"sort_index": thread}}


def _steps(result: Result, clock: _Clock) -> Iterator[Event]:
    waited = {(wait.rank, wait.step): wait for row in waits(result) for wait in row}
    critical = {
        (link.rank, link.step) for link in critical_path(result) if isinstance(link, StepLink)
    }
    for rank, row in enumerate(result.spans):
        for step, start, end in row:
            args = _arguments(step)
            wait = waited.get((rank, step))
            if wait is not None:
                args |= {
                    "idle before": wait.end - wait.start,
                    "waited for": f"{wait.action} of rank {wait.source}",
                    "under way": wait.travelling,
                }
            args["on the critical path"] = (rank, step) in critical
            yield clock.slice(rank, _THREADS[STEPS], str(step), (start, end), args)


def _arguments(step: Step) -> Event:
    if not isinstance(step, Pair):
        return {"op": step.op.value, "stage": step.stage, "micro-batch": step.microbatch}
    found: Event = {"op": "pair"}
    for member, action in (("forward", step.forward), ("backward", step.backward)):
        found |= {f"{member} stage": action.stage, f"{member} micro-batch": action.microbatch}
    return found


def _other_lanes(result: Result, clock: _Clock) -> Iterator[Event]:
    for bar in bars(result):
        if bar.lane not in (STEPS, SENDING):
            span = (bar.start, bar.end)
            yield clock.slice(bar.rank, _THREADS[bar.lane], bar.name, span, {"kind": bar.kind})


def _sending(result: Result, clock: _Clock) -> dict[int, Event]:
    """The bars of the transfers that take time, by the number of the delivery.

    Bars of a thread must not overlap, and messages under way may: so each takes the first thread
    that is free.
    """
    free: list[list[float]] = [[] for _ in range(result.ranks)]
    found: dict[int, Event] = {}
    for number, delivery in enumerate(result.deliveries):
        action, source, destination, start, end = delivery.transfer
        if clock.at(start) == clock.at(end):
            continue
        threads = free[source]
        thread = next((i for i, until in enumerate(threads) if until <= start), len(threads))
        threads[thread : thread + 1] = [end]
        found[number] = clock.slice(
            source,
            _THREADS[SENDING] + thread,
            f"{action} to rank {destination}",
            (start, end),
            {"from rank": source, "to rank": destination, "made by": str(action)},
        )
    return found


def _flows(result: Result, clock: _Clock, sending: Mapping[int, Event]) -> Iterator[Event]:
    """Per message: a start in the step that makes it, its transfer, an end in the one it is for."""
    steps = _THREADS[STEPS]
    for number, delivery in enumerate(result.deliveries):
        flow = {"name": "message", "cat": "message", "id": number + 1}
        _, source, destination, _, _ = delivery.transfer
        start, end = (clock.at(of[delivery.source]) for of in (result.starts, result.ends))
        # Inside the bar, because at its end the next one may begin.
        leaves = max(start, end - 1 / _PARTS)
        yield {**flow, "ph": "s", "ts": leaves, **_place(source, steps)}
        if number in sending:
            bar = sending[number]
            yield {**flow, "ph": "t", "ts": bar["ts"], "pid": bar["pid"], "tid": bar["tid"]}
        taken = clock.at(result.starts[delivery.target])
        yield {**flow, "ph": "f", "bp": "e", "ts": taken, **_place(destination, steps)}


def _counters(
    memories: Sequence[RankMemory], makespan: float, clock: _Clock, memory_unit: str
) -> Iterator[Event]:
    key = memory_unit or "size"
    for rank, memory in enumerate(memories):
        place = _place(rank, _THREADS[STEPS])
        for part in ("weights", "gradients", "optimizer"):
            for time in (0.0, makespan) if getattr(memory, part) else ():
                args = {key: getattr(memory, part)}
                yield {"name": part, "ph": "C", "ts": clock.at(time), **place, "args": args}
        for time, level in memory.curve:
            args = {key: level}
            yield {"name": "activations", "ph": "C", "ts": clock.at(time), **place, "args": args}
