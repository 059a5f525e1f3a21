"""A trace's phases become the times of a layer."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from counterflow.model import ModelConfig
from counterflow.parallel.schedule.interleaving import PUBLISHED_ORDER
from counterflow.parallel.simulate.phases import (
    COMPUTE,
    FORWARD,
    NAMES,
    PhaseSpan,
    compose,
    duration,
    lane_of,
)
from counterflow.predict.cluster import load_cluster
from counterflow.predict.from_trace import from_trace
from counterflow.predict.layout import Layout
from counterflow.predict.times import layer_times

MODEL, LAYOUT = ModelConfig(), Layout(pp=16, dp=128, ep=64, microbatches=120)
H800 = load_cluster("h800")
LAYERS = 3
# Of one layer, us; the pair's lanes take turns without any gap where they can.
TIMES = {name: 100.0 + 10 * index for index, name in enumerate(NAMES)}


def write_trace(path: Path, *, leave_out: tuple[str, ...] = (), gap_us: float = 0.0) -> Path:
    """A pair of LAYERS layers as a Kineto trace; each phase one annotated kernel."""
    events: list[dict[str, Any]] = []
    number = 0

    def add(category: str, name: str, start: float, took: float, **more: Any) -> None:
        events.append({"ph": "X", "cat": category, "name": name, "ts": start, "dur": took, **more})

    spans = compose(PUBLISHED_ORDER, [TIMES] * LAYERS, [TIMES] * LAYERS)
    for span in spans:
        if span.name in leave_out:
            continue
        number += 1
        start, took = 1000 + span.start + gap_us * span.layer, span.end - span.start
        lane = 7 if lane_of(span.name) == COMPUTE else 8
        kernel = "gemm_kernel"
        if lane == 8:
            forth = span.name in ("dispatch(F)", "combine(B)")
            kernel = f"deep_ep::internode::{'dispatch' if forth else 'combine'}<1>"
        where = {"pid": 0, "tid": lane, "args": {"stream": lane, "device": 0}}
        add("gpu_user_annotation", span.name, start, took, **where)
        where["args"] = {"stream": lane, "device": 0, "correlation": number, "grid": [20, 1, 1]}
        add("kernel", kernel, start, took, **where)
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    return path


def write_actions(path: Path) -> Path:
    """A pair of layers with experts, one with a head's backward, and a forward by itself."""
    events: list[dict[str, Any]] = []
    now = 1000.0

    def add(category: str, name: str, start: float, took: float, lane: int) -> None:
        where = {"pid": 0, "tid": lane, "args": {"stream": lane, "device": 0}}
        events.append({"ph": "X", "cat": category, "name": name, "ts": start, "dur": took, **where})

    def run(action: str, spans: tuple[PhaseSpan, ...]) -> None:
        nonlocal now
        took = duration(spans)
        for span in spans:
            lane = 7 if lane_of(span.name) == COMPUTE else 8
            forth = span.name in ("dispatch(F)", "combine(B)")
            moves = f"deep_ep::internode::{'dispatch' if forth else 'combine'}<1>"
            start, length = now + span.start, span.end - span.start
            add("gpu_user_annotation", span.name, start, length, lane)
            add("kernel", "gemm_kernel" if lane == 7 else moves, start, length, lane)
        add("gpu_user_annotation", action, now, took, 7)
        now += took + 10

    alone = {name: time / 2 for name, time in TIMES.items()}
    head = {**dict.fromkeys(NAMES, 0.0), "mlp(B)": 900.0, "mlp(W)": 900.0}
    run("1F0", compose(FORWARD, [alone] * LAYERS, []))
    run("(1F1;2B0)", compose(PUBLISHED_ORDER, [TIMES] * LAYERS, [TIMES] * LAYERS))
    uneven = compose(PUBLISHED_ORDER, [TIMES] * LAYERS, [head, *[TIMES] * LAYERS])
    run("(1F2;3B0)", tuple(span for span in uneven if span.end > span.start))
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    return path


def test_of_a_whole_step_s_trace_the_pairs_of_layers_with_experts_count(tmp_path: Path) -> None:
    calibration = from_trace(write_actions(tmp_path / "trace.json.gz"), MODEL, LAYOUT, H800)
    (reference,) = calibration.references
    assert reference.paired == pytest.approx({name: time / 1e3 for name, time in TIMES.items()})
    assert reference.alone == pytest.approx({name: TIMES[name] / 2e3 for name in FORWARD})
    assert calibration.pair_gaps == pytest.approx(1.0)
    assert calibration.layers == LAYERS


def test_a_layer_of_the_reference_takes_what_the_trace_says_in_a_pair(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "trace.json.gz")
    calibration = from_trace(trace, MODEL, LAYOUT, H800)
    assert calibration.layers == LAYERS
    assert calibration.pair_gaps == 1.0
    found = layer_times(MODEL, LAYOUT, H800, calibration, "moe")
    for name in NAMES:
        if lane_of(name) == COMPUTE:
            assert found.paired[name] == pytest.approx(TIMES[name] / 1e3, rel=1e-9)


def test_what_a_pair_takes_beyond_its_phases_is_kept_as_gaps(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "trace.json.gz", gap_us=50)
    calibration = from_trace(trace, MODEL, LAYOUT, H800)
    whole = duration(compose(PUBLISHED_ORDER, [TIMES] * LAYERS, [TIMES] * LAYERS))
    # The last layer comes two gaps later.
    assert calibration.pair_gaps == pytest.approx((whole + 100) / whole, rel=1e-9)
    paired = layer_times(MODEL, LAYOUT, H800, calibration, "moe").paired
    assert paired["attn(F)"] == pytest.approx(
        TIMES["attn(F)"] / 1e3 * calibration.pair_gaps, rel=1e-9
    )


def test_phases_that_a_trace_lacks_are_named(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "trace.json.gz", leave_out=("attn(W)", "combine(F)"))
    with pytest.raises(ValueError, match=r"missing: combine\(F\), attn\(W\) \(there: attn\(F\)"):
        from_trace(trace, MODEL, LAYOUT, H800)


def test_a_trace_that_holds_more_than_pairs_tells_nothing_of_gaps(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "trace.json.gz", gap_us=5000)
    assert from_trace(trace, MODEL, LAYOUT, H800).pair_gaps == 1.0


def test_half_the_tokens_take_about_half_the_time(tmp_path: Path) -> None:
    calibration = from_trace(write_trace(tmp_path / "trace.json.gz"), MODEL, LAYOUT, H800)
    whole = layer_times(MODEL, LAYOUT, H800, calibration, "moe")
    half = layer_times(MODEL, replace(LAYOUT, length=2048), H800, calibration, "moe")
    # Attention's core falls by their square.
    assert half.alone["mlp(F)"] / whole.alone["mlp(F)"] == pytest.approx(0.5, abs=0.02)
    assert half.alone["attn(F)"] / whole.alone["attn(F)"] < 0.5
    assert half.alone["dispatch(F)"] / whole.alone["dispatch(F)"] == pytest.approx(0.5, abs=0.01)
