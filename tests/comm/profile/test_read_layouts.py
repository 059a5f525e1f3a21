"""One trace, written in many ways, is read as one and the same, by the quick way and the plain."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from counterflow.comm.profile.collect import Collector
from counterflow.comm.profile.read import read
from counterflow.comm.profile.scan import Scanned, scan

Event = Any  # a dict, but for what has no place in a trace

# What a careless cutter would stumble over: separators, categories and quotes within names.
NAMES = (
    "cudaLaunchKernel",
    "cudaEventQuery",
    "aten::mul",
    "record_param_comms",
    "void at::native::{lambda(int)#1}::operator()",
    "a},\n  {b",
    "}, {",
    "},{",
    '}, {"ph": "X", "cat": "kernel"',
    '"cat": "cpu_op"',
    'x": {"ph',
    "[{",
    "back\\slash\\",
    "tab\tquote\" '",
    "Überlappung 重叠 🙂",
    "{",
    "}",
    "",
)
CATEGORIES = (
    *("kernel", "gpu_memcpy", "gpu_memset", "cuda_runtime", "cuda_driver", "user_annotation"),
    *("gpu_user_annotation", "cpu_op", "cpu_op", "ac2g", "python_function", "overhead"),
)
NESTED = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from(NAMES),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(("cat", "ph", "a", "{")), inner, max_size=3)
    ),
    max_leaves=6,
)
ARGS = st.fixed_dictionaries(
    {},
    optional={
        "correlation": st.integers(0, 6),
        "External id": st.integers(0, 6),
        "stream": st.sampled_from((7, 27)),
        "device": st.integers(0, 1),
        "grid": st.just([20, 1, 1]),
        "bytes": st.integers(0, 4096),
        "Collective name": st.sampled_from(("allreduce", "all_to_allv")),
        "In msg nelems": st.integers(0, 99),
        "dtype": st.just("BFloat16"),
        "extra": NESTED,
        "Input Dims": st.just([[2, 3], []]),
        "Input type": st.just([{"a": 1}, {"b": 2}, {"ph": "X", "cat": "kernel"}]),
    },
)
TIMES = st.integers(10**15, 2 * 10**15) | st.decimals(0, 9999, places=3).map(str)
RANGES = st.fixed_dictionaries(
    {
        "ph": st.just("X"),
        "cat": st.sampled_from(CATEGORIES),
        "name": st.sampled_from(NAMES),
        "pid": st.sampled_from((0, 1166, "Spans")),
        "tid": st.sampled_from((7, 1166, "PyTorch Profiler")),
        "ts": TIMES,
        "dur": st.integers(-1, 500),
    },
    optional={"args": ARGS},
)
OTHERS = st.fixed_dictionaries(
    {
        "ph": st.sampled_from("sftiMBEC"),
        "name": st.sampled_from(NAMES),
        "pid": st.just(1166),
        "tid": st.just(1166),
        "ts": TIMES,
    },
    optional={"cat": st.sampled_from(CATEGORIES), "id": st.integers(0, 5), "args": ARGS},
)
# An element that is no event at all is passed over.
# They repeat, so that what was learned of the first is put to use on others.
EVENTS = st.builds(
    lambda events, times: (events * times)[:60],
    st.lists(RANGES | RANGES | OTHERS | st.sampled_from((7, "}, {")), max_size=20),
    st.integers(1, 12),
)


class Layout(NamedTuple):
    """How a trace is written.

    Attributes:
        indent, colon: as of json.dumps.
        ascii_only: escape everything else.
        bare: the array alone, without an object around it.
        events_first: the list of events comes before the other keys.
        shuffled: seed by which each event's keys are put in another order; None to leave them.
        gaps: seed for spaces of many kinds between events; None to have them all alike.
    """

    indent: int | None
    colon: str
    ascii_only: bool
    bare: bool
    events_first: bool
    shuffled: int | None
    gaps: int | None


LAYOUTS = st.builds(
    Layout,
    st.sampled_from((None, None, 0, 1, 2)),
    st.sampled_from((":", ": ")),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.none() | st.integers(0, 99),
    st.none() | st.integers(0, 99),
)
TOP: dict[str, Any] = {
    "schemaVersion": 1,
    "deviceProperties": [{"id": 0, "name": "A", "numSms": 132}, {"id": 1, "name": "B"}],
    "distributedInfo": {"rank": 3, "world_size": 8},
    "traceName": "}],{",
}


def written(events: list[Event], layout: Layout) -> str:
    """The text of a trace in a layout."""
    if layout.shuffled is not None:
        order = random.Random(layout.shuffled)
        events = [
            dict(order.sample(list(each.items()), len(each))) if isinstance(each, dict) else each
            for each in events
        ]

    def dump(value: Any) -> str:
        colons = (("," if layout.indent is not None else ", "), layout.colon)
        return json.dumps(
            value, indent=layout.indent, separators=colons, ensure_ascii=layout.ascii_only
        )

    if layout.gaps is None:
        array = dump(events)
    else:
        spaces = random.Random(layout.gaps)
        gaps = [spaces.choice((",", ", ", ",\n", "\n,\n  ", " ,\t")) for _ in events]
        array = "[" + "".join(map("".join, zip(map(dump, events), gaps, strict=True)))
        array = array[: len(array) - len(gaps[-1])] + "]" if events else "[]"
    if layout.bare:
        return array
    others = dump(TOP)
    if layout.events_first:
        return f'{{"traceEvents":{array}, {others[1:]}'
    return f'{others[:-1]}, "traceEvents": {array}}}'


def kineto(events: list[Event]) -> str:
    """The text of a trace as PyTorch's profiler lays it out."""

    def lines(event: Event) -> str:
        if not isinstance(event, dict):
            return json.dumps(event)
        top = {key: value for key, value in event.items() if key != "args"}
        rows = ["  {", "    " + json.dumps(top)[1:-1]]
        if "args" in event:
            rows[1] += ","
            rows += ['    "args": {', "      " + json.dumps(event["args"])[1:-1], "    }"]
        return "\n".join([*rows, "  }"])

    return '\n{\n  "traceEvents": [\n' + ",\n".join(map(lines, events)) + "\n  ]\n}"


def in_blocks(text: str, size: int) -> Iterator[str]:
    return (text[start : start + size] for start in range(0, len(text), size))


def outcome(text: str, size: int, quick: bool, operators: bool) -> tuple[Any, ...]:
    """Everything that is told of a trace that comes in blocks of so many characters."""
    collector = Collector(operators)
    scanned = scan(in_blocks(text, size), collector.take, collector.wanted, quick)
    activities = collector.cpu_operators() if operators else collector.activities({})
    counts = (collector.num_malformed, collector.num_negative, collector.num_open)
    return activities, collector.annotations(), counts, scanned


# Kernels, ranges and operators may be named like calls that are left out.
NAMED_LIKE_CALLS = [
    {"ph": "X", "cat": category, "name": name, "pid": 0, "tid": 7, "ts": 10**15, "dur": 0}
    for category in ("kernel", "user_annotation", "cpu_op")
    for name in ("cudaLaunchKernel", "cudaEventQuery", "cudaLaunchKernel")
]
COMPACT = Layout(None, ":", False, False, False, None, None)


@settings(max_examples=200, deadline=None)
@given(EVENTS, LAYOUTS, st.sampled_from((1, 90, 400, 1500, 10**6)), st.booleans())
@example(NAMED_LIKE_CALLS[:3] * 5, COMPACT, 90, False)
@example(NAMED_LIKE_CALLS[3:6] * 5, COMPACT, 1500, False)
@example(NAMED_LIKE_CALLS[6:] * 5, COMPACT, 1500, True)
def test_the_quick_way_finds_what_the_plain_way_finds(
    events: list[Event], layout: Layout, size: int, operators: bool
) -> None:
    text = written(events, layout)
    quick, plain = (outcome(text, size, quick, operators) for quick in (True, False))
    assert quick == plain
    assert quick[-1].num_events == len(events)
    assert not quick[-1].broken


@settings(max_examples=100, deadline=None)
@given(EVENTS, LAYOUTS, LAYOUTS, st.sampled_from((400, 1500, 10**6)))
def test_what_is_found_does_not_depend_on_the_layout(
    events: list[Event], one: Layout, other: Layout, size: int
) -> None:
    first, second = (outcome(written(events, each), size, True, False) for each in (one, other))
    assert first[:-1] == second[:-1]


@settings(max_examples=100, deadline=None)
@given(EVENTS, st.sampled_from((300, 1500, 10**6)), st.booleans(), st.floats(0, 1))
def test_a_trace_laid_out_as_the_profiler_does_is_read_alike_wherever_it_breaks_off(
    events: list[Event], size: int, operators: bool, share: float
) -> None:
    text = kineto(events)
    cut = text[: int(len(text) * share)]
    quick, plain = (outcome(cut, size, quick, operators) for quick in (True, False))
    assert quick == plain


@pytest.mark.parametrize("shape", ["kineto", "lines", "compact"])
def test_unwanted_events_are_dropped_undecoded(shape: str) -> None:
    operator = {"ph": "X", "cat": "cpu_op", "name": "aten::mul", "ts": 1, "dur": 1}
    operator |= {"pid": 1, "tid": 1, "args": {"External id": 5}}
    query = {**operator, "cat": "cuda_runtime", "name": "cudaEventQuery"}
    flow = {"ph": "f", "id": 5, "pid": 1, "tid": 1, "ts": 1, "cat": "ac2g", "name": "ac2g"}
    kernel = {**operator, "cat": "kernel", "name": "void f::{lambda(int)#1}::operator()"}
    launch = {**query, "name": "cudaLaunchKernel"}
    comms = {**operator, "name": "record_param_comms"}
    wanted = [kernel, launch, comms]
    events = [operator, query, flow, kernel, launch, operator, comms] * 300
    if shape == "kineto":
        text = kineto(events)
    elif shape == "lines":
        text = "[" + ",\n".join(map(json.dumps, events)) + "]"
    else:
        text = json.dumps({"traceEvents": events}, separators=(",", ":"))
    taken: list[Event] = []
    scanned: Scanned = scan(in_blocks(text, 10_000), taken.extend, Collector(False).wanted)
    assert scanned.num_events == 2100
    assert [event for event in taken if event in wanted] == wanted * 300
    assert len(taken) < 1050  # the rest of the first block, and one at each edge of the others


def test_a_wanted_event_on_the_line_of_an_unwanted_one_is_found() -> None:
    kernel, operator = (
        json.dumps({"ph": "X", "cat": category, "name": "n", "ts": 1, "pid": 1, "tid": 1})
        for category in ("kernel", "cpu_op")
    )
    lines = [operator] * 50 + [f"{operator}, {kernel}, {operator}"] + [operator] * 50
    activities, *_, scanned = outcome("[" + ",\n".join(lines * 4) + "]", 2000, True, False)
    assert len(activities) == 4
    assert scanned.num_events == 4 * 103


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz", "misnamed"])
def test_a_file_is_read_alike_compressed_or_not(tmp_path: Path, name: str) -> None:
    kernel = {"ph": "X", "cat": "kernel", "name": "k", "ts": 5, "dur": 2, "pid": 0, "tid": 7}
    text = written([kernel] * 3, Layout(2, ": ", True, False, False, None, None))
    for compressed in (False, True):
        path = tmp_path / f"{compressed}-{name}"
        path.write_bytes(gzip.compress(text.encode()) if compressed else text.encode())
        trace = read(path)
        assert [(each.start, each.end) for each in trace.activities] == [(5000, 7000)] * 3
        assert (trace.rank, trace.world_size, trace.num_sms) == (3, 8, 132)
