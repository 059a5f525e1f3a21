"""A made-up prediction, for tests of how a plan is shown: none of its numbers mean anything."""

from __future__ import annotations

from dataclasses import replace

from counterflow.comm.cost import Links
from counterflow.launch.config import small_model
from counterflow.launch.plan_answer import Answer, Candidate, Refused, Searched
from counterflow.parallel.simulate import Costs, simulate
from counterflow.parallel.simulate.phases import NAMES
from counterflow.predict.cluster import Cluster, Gpu
from counterflow.predict.layout import Layout
from counterflow.predict.prediction import Note, Prediction, RankMemory, RankTime, Share
from counterflow.predict.times import LayerTimes

GIB = 2**30


def made_up_prediction(*, memory_gib: int = 80) -> Prediction:
    """Of two pipeline ranks and four micro-batches; both hold 61 GiB."""
    layout = Layout(pp=2, dp=2, ep=2, schedule="dualpipe", microbatches=4, length=128)
    times = dict.fromkeys(NAMES, 1.0)
    layer = LayerTimes("moe", times, dict.fromkeys(NAMES, 1.25))
    # A forward is 4 phases in a row, an input half too, a weight half 2; a pair 10 on two lanes.
    costs = Costs(F=8, I=8, W=4, B=15, pair=16, reduce=3, optimizer=2, unit="ms")
    result = simulate(layout.make_schedule(), costs)
    step = result.makespan + 5
    links = Links("made-up", 160, 50)
    rank = RankTime(10, 12, 4, 32, step - 68, 6, 4)
    parts = {"weights": 20 * GIB, "activations": 40 * GIB, "unused": 0, "margin": GIB}
    return Prediction(
        model=small_model(),
        cluster=Cluster("made-up", Gpu("GPU<1>", 132, memory_gib * GIB, 989, 1979, 3350), 8, links),
        layout=layout,
        result=result,
        stages=((layer, layer), (layer, layer)),
        step_ms=step,
        ranks=(rank, rank),
        waterfall=(
            Share("ideal", step - 40, "all model FLOPs at the peak"),
            Share("slower <products>", 50, "made up & so on"),
            Share("FP8", -15, "products in FP8"),
            Share("jitter", 5, "ranks wait for the slowest"),
        ),
        memory=(RankMemory(parts, GIB), RankMemory(parts, 0)),
        memory_bytes=memory_gib * GIB,
        mfu=0.39,
        notes=(
            Note("source", "nothing: made up"),
            Note("assumed", "micro-batches of one sequence; two would change the step by 1 %"),
            Note("extrapolated", "the trace had another GPU"),
        ),
        limit="exposed communication; fewer nodes a token would help",
    )


def made_up_answer(*, searched: bool = True, memory_gib: int = 80) -> Answer:
    """What the command would show of it."""
    found = made_up_prediction(memory_gib=memory_gib)
    second = replace(found.layout, pp=1, dp=4)
    table = Searched(
        best=(
            Candidate(found.layout, found.step_ms, found.gpu_hours_per_trillion, 0.39, 61 * GIB),
            Candidate(second, 2 * found.step_ms, 2.0, None, 30 * GIB),
        ),
        layouts=6,
        timed=2,
        pruned=1,
        refused=(Refused("memory", 3, "19 GiB too much; raise pp"),),
        seconds=0.5,
    )
    return Answer(
        found,
        "a made-up model",
        "nothing (made up)",
        table if searched else None,
        {"FP8 activations": 12 * GIB},
    )
