"""Traces of simulated steps: sound in the format, and saying what the simulation says."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest

from counterflow.parallel.schedule import Pair, build
from counterflow.parallel.simulate import (
    Costs,
    Memory,
    Phases,
    Result,
    critical_path,
    memory_of,
    simulate,
    waits,
)
from counterflow.parallel.simulate.draw.trace import save_trace, trace
from counterflow.parallel.simulate.phases import NAMES

PHASES = Phases({name: 1.25 + 0.5 * name.startswith("mlp") for name in NAMES}, layers=2)
CASES = {
    "unit costs": ("dualpipe", Costs(F=1, I=1, W=1, pair=3), Memory()),
    "messages that take time": (
        "1f1b",
        Costs(F=1.1, I=0.7, W=0.3, send=7.3, message=3, bandwidth=10, unit="us"),
        Memory(weights=2, gradients=3, optimizer=5, unit="GiB"),
    ),
    "thirds": ("dualpipev", Costs(F=1 / 3, I=2 / 7, W=1 / 9, send=1 / 11, unit="ms"), Memory()),
    "phases and what follows": (
        "dualpipe",
        Costs(phases=PHASES, send=0.5, reduce=3, mirror=2, optimizer=1, unit="s"),
        Memory(),
    ),
}


def case(name: str) -> tuple[Result, dict[str, Any]]:
    schedule, costs, memory = CASES[name]
    result = simulate(build(schedule, ranks=4, microbatches=10), costs)
    return result, trace(result, memory_of(result, memory), memory_unit=memory.unit)


def of_kind(made: dict[str, Any], *kinds: str) -> list[dict[str, Any]]:
    return [event for event in made["traceEvents"] if event["ph"] in kinds]


def thread_names(made: dict[str, Any]) -> dict[tuple[int, int], str]:
    return {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in of_kind(made, "M")
        if event["name"] == "thread_name"
    }


def nanoseconds(event: dict[str, Any]) -> tuple[int, int]:
    """Start and end as a reader has them that cuts off what is less than a nanosecond."""
    start = int(event["ts"] * 1000)
    return start, start + int(event["dur"] * 1000)


@pytest.mark.parametrize("name", CASES)
def test_every_event_has_what_its_kind_must_have(name: str) -> None:
    _, made = case(name)
    needed = {
        "M": {"name", "pid", "tid", "args"},
        "X": {"name", "pid", "tid", "ts", "dur", "args"},
        "C": {"name", "pid", "ts", "args"},
        "s": {"name", "cat", "id", "pid", "tid", "ts"},
        "t": {"name", "cat", "id", "pid", "tid", "ts"},
        "f": {"name", "cat", "id", "pid", "tid", "ts", "bp"},
    }
    assert {event["ph"] for event in made["traceEvents"]} <= needed.keys()
    for event in made["traceEvents"]:
        assert needed[event["ph"]] <= event.keys(), event
        assert event.get("ts", 0) >= 0
        assert event.get("dur", 0) >= 0
        if event["ph"] == "C":
            assert all(isinstance(value, float | int) for value in event["args"].values())
    assert made["displayTimeUnit"] in ("ms", "ns")


@pytest.mark.parametrize("name", CASES)
def test_bars_of_a_thread_follow_each_other_without_overlap(name: str) -> None:
    _, made = case(name)
    tracks: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for event in of_kind(made, "X"):
        tracks[event["pid"], event["tid"]].append(event)
    for bars in tracks.values():
        times = [nanoseconds(bar) for bar in bars]
        for before, after in pairwise(times):
            assert before[1] <= after[0]


@pytest.mark.parametrize("name", CASES)
def test_counters_and_their_times_ascend_on_each_track(name: str) -> None:
    _, made = case(name)
    tracks: dict[tuple[int, str], list[float]] = defaultdict(list)
    for event in of_kind(made, "C"):
        tracks[event["pid"], event["name"]].append(event["ts"])
    assert tracks
    for times in tracks.values():
        assert times == sorted(times)


@pytest.mark.parametrize("name", CASES)
def test_every_message_has_one_start_and_one_end_inside_the_bars_that_make_and_take_it(
    name: str,
) -> None:
    result, made = case(name)
    steps: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for bar in of_kind(made, "X"):
        steps[bar["pid"], bar["tid"]].append(bar)
    flows: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for event in of_kind(made, "s", "t", "f"):
        flows[event["id"]].append(event)
    assert len(flows) == len(result.transfers) > 0
    for flow, transfer in zip(flows.values(), result.transfers, strict=True):
        kinds = "".join(event["ph"] for event in flow)
        assert kinds == ("stf" if transfer.end > transfer.start else "sf")
        assert [event["ts"] for event in flow] == sorted(event["ts"] for event in flow)
        inside = [
            [
                bar
                for bar in steps[e["pid"], e["tid"]]
                if bar["ts"] <= e["ts"] < bar["ts"] + bar["dur"]
            ]
            for e in flow
        ]
        assert [len(bars) for bars in inside] == [1] * len(flow)
        assert str(transfer.action) in inside[0][0]["name"]
        assert (flow[0]["pid"], flow[-1]["pid"]) == (
            transfer.source + 1,
            transfer.destination + 1,
        )


@pytest.mark.parametrize("name", CASES)
def test_each_rank_is_a_process_in_its_order_with_its_lanes_as_threads(name: str) -> None:
    result, made = case(name)
    processes = {
        (event["name"], event["pid"]): event["args"]
        for event in of_kind(made, "M")
        if event["name"].startswith("process")
    }
    for rank in range(result.ranks):
        assert processes["process_name", rank + 1] == {"name": f"rank {rank}"}
        assert processes["process_sort_index", rank + 1] == {"sort_index": rank}
    names = thread_names(made)
    assert {(e["pid"], e["tid"]) for e in of_kind(made, "X")} <= names.keys()
    assert all(pid != tid for pid, tid in names)
    lanes = {"steps"}
    if result.costs.phases is not None:
        lanes |= {"compute", "communication", "after the row"}
    kinds = {lane for lane in names.values() if not lane.startswith("sending")}
    assert kinds == lanes
    # Messages under way at one time, as both of a pair are, have a thread each.
    overlap = any(
        one.source == other.source and one.start <= other.start < one.end
        for one, other in combinations(result.transfers, 2)
    )
    assert ("sending 2" in names.values()) == overlap == (name != "unit costs")


@pytest.mark.parametrize("name", CASES)
def test_steps_lie_where_the_simulation_has_them(name: str) -> None:
    result, made = case(name)
    names = thread_names(made)
    scale = made["otherData"]["microseconds_a_unit"]
    bars = [e for e in of_kind(made, "X") if names[e["pid"], e["tid"]] == "steps"]
    spans = [(rank, span) for rank, row in enumerate(result.spans) for span in row]
    waited = {(wait.rank, wait.step): wait for row in waits(result) for wait in row}
    for bar, (rank, span) in zip(bars, spans, strict=True):
        assert (bar["pid"], bar["name"]) == (rank + 1, str(span.step))
        # Times are whole eighths of a microsecond.
        assert abs(bar["ts"] - span.start * scale) <= 1 / 16 + 1e-9
        assert abs(bar["ts"] + bar["dur"] - span.end * scale) <= 1 / 16 + 1e-9
        wait = waited.get((rank, span.step))
        assert bar["args"].get("idle before", 0) == (wait.end - wait.start if wait else 0)
        if wait is not None:
            assert bar["args"]["waited for"] == f"{wait.action} of rank {wait.source}"
        if isinstance(span.step, Pair):
            assert bar["args"]["backward micro-batch"] == span.step.backward.microbatch
        else:
            assert bar["args"]["stage"] == span.step.stage
    critical = [bar for bar in bars if bar["args"]["on the critical path"]]
    on_path = [link for link in critical_path(result) if type(link).__name__ == "StepLink"]
    assert len(critical) == len(on_path) > 0


def test_memory_is_a_counter_of_each_part_that_weighs_something() -> None:
    result, made = case("messages that take time")
    memories = memory_of(result, CASES["messages that take time"][2])
    for rank, memory in enumerate(memories):
        counters = [event for event in of_kind(made, "C") if event["pid"] == rank + 1]
        by_name = {event["name"]: event["args"] for event in counters}
        assert by_name["weights"] == {"GiB": 2}
        assert by_name["gradients"] == {"GiB": 3}
        assert by_name["optimizer"] == {"GiB": 5}
        levels = [e["args"]["GiB"] for e in counters if e["name"] == "activations"]
        assert levels == [level for _, level in memory.curve]
    _, made = case("unit costs")
    assert {event["name"] for event in of_kind(made, "C")} == {"activations"}


@pytest.mark.parametrize(
    ("unit", "microseconds"), [("s", 1e6), ("ms", 1e3), ("us", 1), ("ns", 1e-3), ("", 1e3)]
)
def test_a_unit_of_time_that_has_no_name_is_a_millisecond(unit: str, microseconds: float) -> None:
    result = simulate(build("1f1b", ranks=2, microbatches=2), Costs(F=8, B=16, unit=unit))
    made: Any = trace(result, memory_of(result, Memory()))
    end = max(event["ts"] + event["dur"] for event in of_kind(made, "X"))
    assert made["otherData"]["microseconds_a_unit"] == microseconds
    # 72 units; in nanoseconds that is 0.072 us, of which eighths are kept.
    assert end == (0.125 if unit == "ns" else 72 * microseconds)


def test_times_that_no_number_of_microseconds_can_hold_are_refused() -> None:
    result = simulate(build("1f1b", ranks=2, microbatches=2), Costs(F=1e306, B=1e306))
    with pytest.raises(ValueError, match=r"a makespan of 6e\+306 ms is more .*; divide all times"):
        trace(result, memory_of(result, Memory()))


def test_a_saved_trace_is_the_same_trace(tmp_path: Path) -> None:
    result, made = case("phases and what follows")
    path = tmp_path / "step.json"
    save_trace(result, memory_of(result, Memory()), path)
    assert json.loads(path.read_text(encoding="utf-8")) == made
