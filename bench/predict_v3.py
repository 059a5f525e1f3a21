"""DeepSeek-V3's pre-training step on 2,048 H800, predicted from a trace and the papers alone.

Only the sum is held to a target. Of its parts the published ones are not said to be means of ranks,
nor what "optimizer" holds: reductions may well be in it, so beside it stands the sum of both here.
The memory is that of this trainer, which keeps more than the published one: float32 parameters
whole on every rank, and each FP8 weight in both directions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from counterflow.model import ModelConfig
from counterflow.predict.calibration import Calibration
from counterflow.predict.cluster import load_cluster
from counterflow.predict.from_trace import from_trace
from counterflow.predict.layout import Layout
from counterflow.predict.prediction import Prediction
from counterflow.predict.published import (
    V3_HOURS_PER_TRILLION,
    V3_RUN,
    V3_STEP_PARTS,
    step_seconds,
)
from counterflow.predict.routing import Routing
from counterflow.predict.step import predict

TARGET = 0.05
MODEL = ModelConfig()
LAYOUT = Layout(
    pp=V3_RUN.pp,
    dp=V3_RUN.dp,
    ep=V3_RUN.ep,
    microbatches=V3_RUN.sequences // V3_RUN.dp,
    length=V3_RUN.length,
)
# How layers lie on stages is not published; stage 15 has both heads and multi-token prediction too.
CUTS: dict[str, tuple[int, ...] | None] = {
    "the trainer's cut, by the weights that a token meets": None,
    "3 on the first stage, 2 on the last": (3, *(4,) * 14, 2),
    "2 on the first stage, 3 on the last": (2, *(4,) * 14, 3),
    "1 on the first stage, 4 on the last": (1, *(4,) * 15),
}
_SKEWS = (0.1, 0.3)


def v3(trace: Path) -> dict[str, Any]:
    """The prediction, what is published, and what changes with what is not determined.

    Args:
        trace: of one pair of chunks of V3 on an H800.

    Raises:
        ValueError: the trace cannot be used.
    """
    cluster = load_cluster("h800")
    calibration = from_trace(trace, MODEL, LAYOUT, cluster)
    implied = step_seconds(V3_HOURS_PER_TRILLION, V3_RUN)
    found = predict(MODEL, cluster, LAYOUT, calibration, routing=Routing())
    ratio = found.step_ms / 1e3 / implied
    undetermined = dict(_alternatives(calibration, found))
    memory = max(rank.total for rank in found.memory)
    _print(found, implied, undetermined)
    return {
        "trace": trace.name,
        "predicted_s": found.step_ms / 1e3,
        "implied_by_published_hours_s": implied,
        "predicted_to_implied": ratio,
        "target": [1 - TARGET, 1 + TARGET],
        "met": abs(ratio - 1) <= TARGET,
        "gpu_hours_per_trillion": found.gpu_hours_per_trillion,
        "parts_s": _parts(found),
        "published_parts_s": dict(V3_STEP_PARTS),
        "ranks_s": [
            {name: ms / 1e3 for name, ms in rank._asdict().items()} for rank in found.ranks
        ],
        "waterfall_s": {share.name: share.ms / 1e3 for share in found.waterfall},
        "undetermined_s": undetermined,
        "memory_worst_rank_bytes": memory,
        "memory_of_a_gpu_bytes": found.memory_bytes,
        "fits": found.fits,
        "notes": [note.text for note in found.notes],
    }


def _parts(found: Prediction) -> dict[str, float]:
    """Means over pipeline ranks, seconds."""
    number = len(found.ranks)
    names = found.ranks[0]._asdict()
    parts = {name: sum(getattr(r, name) for r in found.ranks) / number / 1e3 for name in names}
    return {**parts, "reduce and optimizer": parts["reduce"] + parts["optimizer"]}


def _alternatives(calibration: Calibration, found: Prediction) -> Iterator[tuple[str, float]]:
    """The step in seconds where something that is not published were otherwise."""
    cluster = found.cluster

    def step(layout: Layout, routing: Routing | None, of: Calibration = calibration) -> float:
        return predict(MODEL, cluster, layout, of, routing=routing).step_ms / 1e3

    for name, layers in CUTS.items():
        yield f"cut: {name}", step(replace(LAYOUT, layers=layers), Routing())
    yield "routing: balanced", step(LAYOUT, None)
    for spread in _SKEWS:
        skewed = Routing("skewed", spread=spread)
        yield f"routing: experts' popularity with a deviation of {spread:g}", step(LAYOUT, skewed)
    for share in (0.55, 0.75):
        changed = replace(calibration, matmul=share)
        yield f"output heads at {share:.0%} of the BF16 peak", step(LAYOUT, Routing(), changed)
    no_gaps = replace(calibration, pair_gaps=1.0)
    yield "pairs without the gaps of the trace's", step(LAYOUT, Routing(), no_gaps)
    two = replace(LAYOUT, sequences=2, microbatches=LAYOUT.microbatches // 2)
    yield "micro-batches of two sequences", step(two, Routing())


def _print(found: Prediction, implied: float, undetermined: dict[str, float]) -> None:
    step = found.step_ms / 1e3
    print(
        f"DeepSeek-V3's step on {LAYOUT.world_size} H800: {step:.2f} s predicted, {implied:.2f} s "
        f"by {V3_HOURS_PER_TRILLION:,} GPU hours a trillion tokens: {step / implied - 1:+.1%}   "
        f"target within {TARGET:.0%}"
    )
    print("  mean over ranks, s      predicted  published (arXiv 2505.09343, table 4)")
    for name, seconds in _parts(found).items():
        published = V3_STEP_PARTS.get(name)
        print(f"    {name:20} {seconds:9.2f}  {'-' if published is None else f'{published:9.2f}'}")
    worst = max(rank.total for rank in found.memory) / 2**30
    print(
        f"  memory of the fullest rank: {worst:.1f} GiB predicted for this trainer, of "
        f"{found.memory_bytes / 2**30:.1f}; the published run did fit"
    )
    print("  what is not published, and the step if it were so:")
    for name, seconds in undetermined.items():
        print(f"    {name:56} {seconds:6.2f} s, {seconds / implied - 1:+.1%}")
