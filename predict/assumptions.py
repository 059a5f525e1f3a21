"""What a prediction takes for granted, and how much each of these matters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from ..model import ModelConfig
from .calibration import Calibration, Reference
from .cluster import Cluster
from .exchange import exchange
from .layout import Layout
from .prediction import Note

# A reference says little of a layer that is so many times smaller or larger.
_FAR = 2.0
_SOURCES = {
    "trace": "times of phases: the trace {name}, of {layers} layers with experts",
    "measured": "times of phases: measured ({name})",
    "datasheet": "times of phases: no measurement, the data sheet of {name}, of whose peaks "
    "products are taken to reach {matmul:.0%} (in FP8 {fp8_matmul:.0%}), attention "
    "{attention:.0%}, memory {memory:.0%}",
}


def notes(
    model: ModelConfig,
    cluster: Cluster,
    layout: Layout,
    calibration: Calibration,
    step: Callable[[Cluster, Layout, Calibration], float],
) -> tuple[Note, ...]:
    """What a reader must know.

    Args:
        model, cluster, layout, calibration: of the prediction.
        step: a quick prediction of the step, ms, to say what a change of an assumption does to it.
    """
    return (
        Note("source", _source(calibration)),
        Note("source", _exchange_source(model, cluster, layout)),
        *_extrapolated(model, cluster, layout, calibration),
        *_assumed(cluster, layout, calibration, step),
    )


def _source(calibration: Calibration) -> str:
    return _SOURCES[calibration.source].format(
        name=calibration.name,
        layers=calibration.layers or "some",
        matmul=calibration.matmul,
        fp8_matmul=calibration.fp8_matmul,
        attention=calibration.attention,
        memory=calibration.memory,
    )


def _exchange_source(model: ModelConfig, cluster: Cluster, layout: Layout) -> str:
    basis = exchange(model, layout, cluster)["dispatch(F)"].basis
    if basis == "nothing":
        return "dispatch and combine: nothing is sent, as each rank has all experts"
    what = "the links of" if basis == "links" else f"all-to-all bandwidth, {basis}, of"
    return f"dispatch and combine with nothing beside them: {what} cluster {cluster.name}"


def _extrapolated(
    model: ModelConfig, cluster: Cluster, layout: Layout, calibration: Calibration
) -> Iterator[Note]:
    if exchange(model, layout, cluster)["dispatch(F)"].basis == "extrapolated":
        yield Note(
            "extrapolated",
            f"all-to-all among ep={layout.ep} ranks with {layout.tokens} tokens: the nearest that "
            f"was measured on {cluster.name} is far",
        )
    for reference in calibration.references:
        for what in _far(reference, model, cluster, layout):
            yield Note(
                "extrapolated",
                f'{what}: times of "{reference.kind}" layers are far from '
                f"what was timed ({reference.source})",
            )


def _far(
    reference: Reference, model: ModelConfig, cluster: Cluster, layout: Layout
) -> Iterator[str]:
    there = reference.layout
    pairs = (
        ("tokens of a micro-batch", layout.tokens, there.tokens),
        ("tokens of a sequence", layout.length, there.length),
        ("hidden_size", model.hidden_size, reference.model.hidden_size),
        (
            "moe_intermediate_size",
            model.moe_intermediate_size,
            reference.model.moe_intermediate_size,
        ),
        ("expert-parallel ranks", layout.ep, there.ep),
    )
    for name, here, timed in pairs:
        if not 1 / _FAR <= here / timed <= _FAR:
            yield f"{name} {here}, timed with {timed}"
    if layout.fp8 != there.fp8 or layout.dtype != there.dtype:
        yield f"{_formats(layout)}, timed in {_formats(there)}"
    if reference.cluster is not None and reference.cluster.gpu != cluster.gpu:
        yield f"GPU {cluster.gpu.name}, timed on {reference.cluster.gpu.name}"


def _formats(layout: Layout) -> str:
    return f"FP8 and {layout.dtype}" if layout.fp8 else layout.dtype


def _assumed(
    cluster: Cluster,
    layout: Layout,
    calibration: Calibration,
    step: Callable[[Cluster, Layout, Calibration], float],
) -> Iterator[Note]:
    base = step(cluster, layout, calibration)

    def effect(*, of: Calibration | None = None, on: Cluster | None = None) -> str:
        changed = step(on or cluster, layout, of or calibration)
        return f"{(changed / base - 1) * 100:+.1f} %"

    timed = {reference.kind for reference in calibration.references}
    if "head" not in timed:
        low, high = calibration.matmul - 0.1, calibration.matmul + 0.1
        of_what = "the output heads'" if timed else "all"
        yield Note(
            "assumed",
            f"{of_what} products reach {calibration.matmul:.0%} of the peak, which nothing timed "
            f"tells; with {low:.0%} the step is {effect(of=replace(calibration, matmul=low))}, "
            f"with {high:.0%} {effect(of=replace(calibration, matmul=high))}",
        )
        low = calibration.memory - 0.2
        yield Note(
            "assumed",
            f"traffic with the memory reaches {calibration.memory:.0%} of its bandwidth; with "
            f"{low:.0%} the step is {effect(of=replace(calibration, memory=low))}",
        )
    if calibration.pair_gaps > 1:
        yield Note(
            "assumed",
            f"pairs take {(calibration.pair_gaps - 1) * 100:.1f} % longer than their phases on two "
            "lanes, as the trace's did (launches, waits for other ranks); without, the step is "
            + effect(of=replace(calibration, pair_gaps=1.0)),
        )
    if layout.world_size > cluster.gpus_per_node:
        links = replace(cluster.links, across_gbps=0.8 * cluster.links.across_gbps)
        yield Note(
            "assumed",
            f"messages between stages and reductions reach {cluster.links.across_gbps:g} GB/s "
            "across nodes and hide behind nothing; with 80 % of that the step is "
            + effect(on=replace(cluster, links=links)),
        )
    if layout.layers is None and layout.pp > 1:
        yield Note(
            "assumed",
            "the model is cut into stages by the weights that tokens meet, as the trainer does "
            "without schedule.layers; a search looks for a better cut",
        )
