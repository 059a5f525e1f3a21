"""Traces that break off, are damaged, or are none: partial traces and clear errors."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.comm.profile.read import read
from counterflow.comm.profile.trace import TraceError

EVENTS: list[dict[str, Any]] = [
    {
        "ph": "X",
        "cat": "kernel",
        "name": "void f<int>::{lambda()#1}::operator()",
        "pid": 0,
        "tid": 7,
        "ts": f"{1000 + 10 * idx}.{idx % 1000:03}",
        "dur": 5,
        "args": {"grid": [20, 1, 1], "stream": 7, "device": 0},
    }
    for idx in range(3000)
]
TEXT = json.dumps({"deviceProperties": [], "traceEvents": EVENTS, "traceName": "t"}, indent=1)


def failure(path: Path) -> str:
    with pytest.raises(TraceError) as caught:
        read(path)
    return str(caught.value)


def test_a_trace_of_a_gpu_whose_kernels_are_cut_off_is_not_taken_for_a_cpus(tmp_path: Path) -> None:
    operators = [{**event, "cat": "cpu_op", "args": {}} for event in EVENTS[:50]]
    path = tmp_path / "killed.json"
    for devices, refused in (([{"id": 0, "name": "GPU"}], True), ([], False)):
        whole = json.dumps({"deviceProperties": devices, "traceEvents": operators + EVENTS[50:]})
        path.write_text(whole[: whole.index('"kernel"') - 40])
        if refused:
            assert "its kernels were cut off" in failure(path)
        else:
            assert not read(path).on_gpu
    # A run on the CPU of a host with a GPU has a trace that is whole.
    path.write_text(json.dumps({"deviceProperties": [{"id": 0}], "traceEvents": operators}))
    assert not read(path).on_gpu


@pytest.mark.parametrize("share", [0.01, 0.3, 0.7, 0.999])
def test_what_is_whole_in_a_trace_that_breaks_off_is_kept(tmp_path: Path, share: float) -> None:
    cut = int(len(TEXT) * share)
    whole = TEXT[:cut].count('"device": 0\n   }\n  }')
    assert 0 < whole <= len(EVENTS)
    path = tmp_path / "killed.json"
    path.write_text(TEXT[:cut])
    trace = read(path)
    assert trace.num_events == len(trace.activities) == whole
    (told,) = (each for each in trace.missing if "breaks off" in each)
    assert f"after {whole} events" in told


def test_what_is_whole_in_compressed_data_that_breaks_off_is_kept(tmp_path: Path) -> None:
    noise = random.Random(1)
    for event in EVENTS:  # so that it does not compress to nothing
        event["args"]["noise"] = noise.random()
    data = gzip.compress(json.dumps({"traceEvents": EVENTS}).encode())
    path = tmp_path / "killed.json.gz"
    path.write_bytes(data[: len(data) // 2])
    trace = read(path)
    assert 500 < len(trace.activities) < 2500
    assert any("compressed data breaks off" in each for each in trace.missing)
    path.write_bytes(data[: len(data) // 2] + b"\0" * 999)
    assert any("damaged" in each or "breaks off" in each for each in read(path).missing)


def test_several_compressed_members_and_padding_are_one_text(tmp_path: Path) -> None:
    path = tmp_path / "appended.json.gz"
    half = len(TEXT) // 2
    halves = [gzip.compress(part.encode()) for part in (TEXT[:half], TEXT[half:])]
    path.write_bytes(b"".join(halves) + b"\0" * 512)
    trace = read(path)
    assert len(trace.activities) == len(EVENTS)
    assert not any("breaks off" in each for each in trace.missing)


def test_text_that_stops_being_json_is_kept_up_to_there(tmp_path: Path) -> None:
    path = tmp_path / "overwritten.json"
    path.write_text('{"traceEvents": [' + json.dumps(EVENTS[0]) + ', {"ph": @@' + "x" * 10_000)
    trace = read(path)
    assert len(trace.activities) == 1
    assert any("after 1 events" in each and "not JSON" in each for each in trace.missing)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        (" \n ", "is empty"),
        ("<html>no</html>", "is not JSON"),
        ("\x00\x01\x02", "is not JSON"),
        ('{"loss": 3.5, "step": 1}', 'no list "traceEvents", only loss, step'),
        ("{}", 'no list "traceEvents"'),
        ('{"traceEvents": 5}', 'no list "traceEvents"'),
        ('{"traceEvents": []}', "has no events"),
        ("[]", "has no events"),
        ('{"traceEvents": [{"ph": "X", "ca', "ends in the middle"),
        ('{"schemaVersion": 1, "deviceP', "ends in the middle"),
        ("[" * 100_000, "cannot be decoded"),
        ('[{"ph": "X", "cat": "cuda_runtime", "ts": 1}]', "no kernel, operator or annotation"),
        ("[1, 2, null]", "has 3 events, but no kernel"),
    ],
)
def test_what_is_no_trace_is_refused_with_file_reason_and_remedy(
    tmp_path: Path, text: str, said: str
) -> None:
    path = tmp_path / "some.json"
    path.write_text(text)
    message = failure(path)
    assert str(path) in message
    assert said in message
    assert "torch.profiler" in message


def test_compressed_data_that_holds_nothing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "some.json.gz"
    path.write_bytes(gzip.compress(b"")[:12])
    assert "compressed data" in failure(path)


def test_a_file_that_is_not_there_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert "No such file" in failure(tmp_path / "none.json")
    assert "is a folder" in failure(tmp_path)


def test_events_without_a_usable_time_are_left_out_and_told(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    times = [{}, {"ts": None}, {"ts": "soon"}, {"ts": "nan"}, {"ts": float("inf")}, {"ts": True}]
    bad = [{"ph": "X", "cat": "kernel", "name": "k", "dur": 1, **time} for time in times]
    backwards = {**EVENTS[1], "dur": -3}
    path.write_text(json.dumps([EVENTS[0], *bad, backwards, 7, "x"]))
    trace = read(path)
    assert [(a.start, a.end) for a in trace.activities] == [
        (1_000_000, 1_005_000),
        (1_010_001, 1_010_001),
    ]
    assert trace.num_events == 10
    told = " ".join(trace.missing)
    assert "6 events without a usable time were left out" in told
    assert "1 events end before they start" in told


KEYS = ("ph", "cat", "name", "pid", "tid", "ts", "dur", "args", "id")
ANYTHING = st.recursive(
    st.sampled_from((None, True, -1, 7, 0.5, "", "X", "B", "E", "M", "kernel", "cpu_op", "5.250")),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.fixed_dictionaries({}, optional={"correlation": inner, "grid": inner, "stream": inner})
    ),
    max_leaves=4,
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.fixed_dictionaries(dict.fromkeys(KEYS, ANYTHING)), max_size=8),
    st.fixed_dictionaries(
        {}, optional=dict.fromkeys(("distributedInfo", "deviceProperties"), ANYTHING)
    ),
)
def test_values_of_the_wrong_kind_are_passed_over(
    tmp_path_factory: pytest.TempPathFactory, events: list[Any], top: dict[str, Any]
) -> None:
    path = tmp_path_factory.getbasetemp() / "wrong.json"
    good = {**EVENTS[0], "ts": 10**9, "args": {"device": 0, "stream": "mine"}}
    path.write_text(json.dumps({**top, "traceEvents": [*events, good] * 3}))
    trace = read(path)
    assert trace.num_events == 3 * len(events) + 3
    kept = [each for each in trace.activities if each.lane == "stream mine"]
    assert [(each.start, each.end) for each in kept] == [(10**12, 10**12 + 5000)] * 3
    assert read(path, quick=False) == trace


def test_bytes_that_are_not_text_cost_a_name_only(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    text = json.dumps([{**EVENTS[0], "name": "kernel @"}]).encode()
    path.write_bytes(b"\xef\xbb\xbf" + text.replace(b"@", b"\xff"))
    assert read(path).activities[0].name == "kernel \ufffd"
