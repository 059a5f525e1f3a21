"""The published trace of a forward/backward pair on an H800, against a count of our own.

The trace has four layer pairs, times in whole us, and marks the phases of the pair in their order.
"""

import gzip
import json
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from counterflow.comm.profile.against import against
from counterflow.comm.profile.analyse import analyse
from counterflow.comm.profile.classify import classify_all
from counterflow.comm.profile.infer import infer_phases
from counterflow.comm.profile.phases import marked_phases
from counterflow.comm.profile.read import read
from counterflow.comm.profile.report import Report
from counterflow.comm.profile.trace import Annotation, Trace
from counterflow.parallel.simulate.phases import PUBLISHED_ORDER
from tests.comm.profile.staged import simulated_of

# Shared data lies beside the clone.
FILE = Path(__file__).resolve().parents[4] / "shared" / "data" / "h800-train-pair.json.gz"
pytestmark = pytest.mark.skipif(not FILE.exists(), reason=f"the shared trace is not at {FILE}")

COMMUNICATION = ("dispatch", "combine", "notify_dispatch", "cached_notify")


@cache
def trace() -> Trace:
    return read(FILE)


@cache
def report() -> Report:
    return analyse(trace())


@cache
def events() -> list[dict[str, Any]]:
    return json.loads(gzip.decompress(FILE.read_bytes()))["traceEvents"]


def ran() -> list[dict[str, Any]]:
    categories = ("kernel", "gpu_memcpy", "gpu_memset")
    return [event for event in events() if event.get("cat") in categories]


def microseconds(*, communication: bool | None) -> set[int]:
    """Each us in which a kernel communicates (True), computes (False), or a copy runs (None)."""
    covered: set[int] = set()
    for event in ran():
        of_exchange = any(f"ep::internode::{name}<" in event["name"] for name in COMMUNICATION)
        kind = of_exchange if event["cat"] == "kernel" else None
        if kind == communication:
            covered.update(range(event["ts"], event["ts"] + event["dur"]))
    return covered


def test_the_six_numbers_agree_with_a_count_of_every_microsecond() -> None:
    compute, comm = microseconds(communication=False), microseconds(communication=True)
    copy = microseconds(communication=None)
    start = min(event["ts"] for event in ran())
    end = max(event["ts"] + event["dur"] for event in ran())
    totals = report().totals
    counted = {
        "span": end - start,
        "compute": len(compute),
        "comm": len(comm),
        "overlapped": len(compute & comm),
        "exposed": len(comm - compute),
        "idle": end - start - len(compute | comm | copy),
        "copy": len(copy),
    }
    assert {name: getattr(totals, name) for name in counted} == {
        name: 1000 * us for name, us in counted.items()
    }
    assert totals.exposed * 100 < 4 * totals.comm


def test_every_marked_phase_appears_as_often_as_it_is_marked() -> None:
    marked = Counter(event["name"] for event in events() if event.get("cat") == "user_annotation")
    expected = dict.fromkeys(PUBLISHED_ORDER, 4)
    assert {name: count for name, count in marked.items() if name in expected} == expected
    assert {phase.name: phase.count for phase in report().phases} == expected
    assert {phase.layer for phase in report().layers} == {0, 1, 2, 3}


def test_communication_belongs_to_dispatch_and_combine_alone() -> None:
    moves = {phase.name: phase for phase in report().phases if phase.comm}
    assert set(moves) == {"dispatch(F)", "combine(F)", "dispatch(B)", "combine(B)"}
    totals = report().totals
    assert sum(phase.exposed for phase in moves.values()) == totals.exposed
    assert sum(phase.comm for phase in moves.values()) == totals.comm
    assert sum(phase.waiting for phase in moves.values()) == totals.waiting
    # The published order: each move of one direction behind computation of the other.
    hidden_by = {
        name: max(phase.behind, key=phase.behind.__getitem__) for name, phase in moves.items()
    }
    assert hidden_by["combine(B)"] == "attn(F)"
    assert hidden_by["dispatch(F)"] == "mlp(B)"
    assert hidden_by["combine(F)"] == "attn(B)"
    assert set(moves["dispatch(B)"].behind) == {"mlp(W)", "mlp(F)"}


def test_communication_has_20_of_132_multiprocessors() -> None:
    split = report().sm_split
    assert split is not None
    assert (split.num_sms, split.comm, split.compute) == (132, 20, 112)


def test_most_of_what_is_exposed_stands_at_the_pairs_two_ends() -> None:
    """The first combine(B) has little to hide behind yet, the last dispatch(B) nothing left."""
    longest = report().exposed[0]
    assert (longest.phase, longest.layer, longest.next_phase) == ("dispatch(B)", 3, "attn(B)")
    ends = [one for one in report().exposed if (one.phase, one.layer) == ("combine(B)", 0)]
    at_ends = sum(one.interval[1] - one.interval[0] for one in (longest, *ends))
    assert at_ends > 0.6 * report().totals.exposed


def test_phases_inferred_without_marks_are_those_that_are_marked() -> None:
    classes = classify_all(activity.name for activity in trace().activities)
    marked = marked_phases(trace())
    inferred = infer_phases(replace(trace(), annotations=()), classes)
    compared = 0
    for activity, by_mark, by_order in zip(trace().activities, marked.of, inferred.of, strict=True):
        if classes[activity.name].group == "communication":
            assert marked.runs[by_mark].name == inferred.runs[by_order].name
            compared += 1
    assert compared == 32


def test_hardly_any_kernel_is_unknown() -> None:
    unknown = sum(kernel.busy for kernel in report().unknown)
    assert unknown < 0.001 * sum(kernel.busy for kernel in report().kernels)


def test_layers_named_as_they_are_make_the_same_pair() -> None:
    """The backward passes its layers from the last to the first, in the trace as it is unnamed."""
    counts: Counter[str] = Counter()
    named: list[Annotation] = []
    for mark in trace().annotations:
        if mark.thread is not None and mark.name.endswith(")"):
            at = counts[mark.name]
            counts[mark.name] += 1
            layer = at if mark.name.endswith("(F)") else 3 - at
            mark = mark._replace(name=f"{mark.name} layer {layer}")
        named.append(mark)
    assert set(counts.values()) == {4}
    layered = replace(trace(), annotations=tuple(named))
    simulated = simulated_of(ranks=2, microbatches=4)
    bare, told = (against(simulated, [one], [analyse(one)]) for one in (trace(), layered))
    assert bare.pair is not None
    assert told.pair == bare.pair
    unmarked = replace(trace(), annotations=())
    without = against(simulated, [unmarked], [analyse(unmarked)])
    assert (without.pair, without.ranks) == (None, ())
    assert "no pair of chunks is compared" in without.missing[-1]
