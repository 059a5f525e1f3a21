"""What a prediction takes for granted, and how much each of these matters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

from ..model import ModelConfig
from ..parallel.schedule.clock import row_ends
from ..parallel.simulate import Result
from .calibration import Calibration, Reference
from .cluster import Cluster
from .exchange import exchange
from .layout import Kind, Layout
from .prediction import Note
from .routing import Routing
from .times import COMPUTES, layer_times

# A reference says little of a layer that is so many times smaller or larger.
_FAR = 2.0
_SPREAD = 0.3
_SOME_GAPS = 1.0005
_SHORT_MS = 0.1  # about ten kernels, a few microseconds each to launch
_SOURCES = {
    "trace": "times of phases: the trace {name}, of {layers} layers with experts",
    "measured": "times of phases: measured ({name})",
    "datasheet": "times of phases: no measurement, the data sheet of {name}, of whose peaks "
    "products are taken to reach {matmul:.0%} (in FP8 {fp8_matmul:.0%}), attention "
    "{attention:.0%}, memory {memory:.0%}",
}


class Predicts(Protocol):
    """A quick prediction, of which one thing can be changed."""

    def __call__(
        self, *, calibration: Calibration = ..., routing: Routing | None = ...
    ) -> Result: ...


def notes(
    model: ModelConfig,
    cluster: Cluster,
    layout: Layout,
    calibration: Calibration,
    routing: Routing | None,
    quick: Predicts,
) -> tuple[Note, ...]:
    """What a reader must know.

    Args:
        model, cluster, layout, calibration, routing: of the prediction.
        quick: predicts the step with one of these changed, to say how much that matters.
    """
    return (
        Note("source", _source(calibration)),
        Note("source", _exchange_source(model, cluster, layout)),
        *_extrapolated(model, cluster, layout, calibration),
        *(
            Note("assumed", text)
            for text in _Assumed(cluster, layout, calibration, routing, quick).all()
        ),
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
    if not calibration.references and cluster.gpu.num_sms:
        times = layer_times(model, replace(layout, layers=None), cluster, calibration, "moe")
        shortest = min(time for name, time in times.alone.items() if name in COMPUTES)
        if shortest < _SHORT_MS:
            yield Note(
                "extrapolated",
                f"phases of {shortest:.2g} ms are no longer than what their kernels take to be "
                "launched, which a data sheet does not tell: a step takes longer",
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
        ("num_attention_heads", model.num_attention_heads, reference.model.num_attention_heads),
        ("experts of a token", model.num_experts_per_tok, reference.model.num_experts_per_tok),
        ("expert-parallel ranks", layout.ep, there.ep),
    )
    for name, here, timed in pairs:
        if not 1 / _FAR <= here / timed <= _FAR:
            yield f"{name} {here}, timed with {timed}"
    if layout.ep > 1 and (layout.dispatcher, layout.payload) != (there.dispatcher, there.payload):
        yield f"{layout.dispatcher} with {layout.payload}, timed {there.dispatcher} {there.payload}"
    if layout.fp8 != there.fp8 or layout.dtype != there.dtype:
        yield f"{_formats(layout)}, timed in {_formats(there)}"
    if reference.cluster is not None and reference.cluster.gpu != cluster.gpu:
        yield f"GPU {cluster.gpu.name}, timed on {reference.cluster.gpu.name}"


def _formats(layout: Layout) -> str:
    return f"FP8 and {layout.dtype}" if layout.fp8 else layout.dtype


class _Assumed:
    """What no source determines, each with what another value does to the step."""

    def __init__(
        self,
        cluster: Cluster,
        layout: Layout,
        calibration: Calibration,
        routing: Routing | None,
        quick: Predicts,
    ) -> None:
        self._cluster, self._layout, self._routing = cluster, layout, routing
        self._calibration, self._quick = calibration, quick
        self._base = quick()

    def all(self) -> Iterator[str]:
        timed: set[Kind] = {reference.kind for reference in self._calibration.references}
        if not timed:
            yield self._share("fp8_matmul", "products in FP8 reach", 0.1)
            yield self._share("attention", "attention reaches", 0.1)
        if "head" not in timed:
            what = "the output heads' products reach" if timed else "other products reach"
            yield self._share("matmul", what, 0.1)
            yield self._share("memory", "traffic with the memory reaches", 0.1)
        if self._layout.ep > 1:
            yield from self._of_experts(timed)
        if self._layout.world_size > 1:
            yield self._reductions()
        if self._layout.layers is None and self._layout.pp > 1:
            yield (
                "the model is cut into stages by the weights that tokens meet, as the trainer does "
                "without schedule.layers"
            )

    def _of_experts(self, timed: set[Kind]) -> Iterator[str]:
        calibration = self._calibration
        if self._cluster.gpu.num_sms and not timed:
            more = replace(calibration, contention=calibration.contention + 0.4)
            yield (
                f"dispatch and combine take {calibration.contention:g} times as long in a pair as "
                f"alone; with {more.contention:g} the step is {self._effect(more)}"
            )
        if calibration.pair_gaps > _SOME_GAPS:
            none = replace(calibration, pair_gaps=1.0)
            yield (
                f"what runs on two lanes takes {(calibration.pair_gaps - 1) * 100:.1f} % longer "
                "than its phases, as pairs did that were timed (launches, waits for other ranks); "
                f"without, the step is {self._effect(none)}"
            )
        elif calibration.source == "trace":
            yield "the trace does not tell how much longer pairs take than their phases: nothing"
        how = "balanced" if self._routing is None else self._routing.kind
        skewed = Routing("skewed", spread=_SPREAD)
        yield (
            f"routing is {how}; with experts' popularity of a deviation of {_SPREAD:g} the step is "
            f"{self._change(self._quick(routing=skewed))}"
        )

    def _share(self, name: str, what: str, by: float) -> str:
        """The effect of another share of a peak."""
        share: float = getattr(self._calibration, name)

        def at(other: float) -> str:
            changed = replace(self._calibration, **{name: other})
            return f"with {other:.0%} the step is {self._effect(changed)}"

        return (
            f"{what} {share:.0%} of the peak, which nothing timed tells; {at(share - by)}, "
            f"{at(share + by)}"
        )

    def _reductions(self) -> str:
        """What follows the rows is exposed here."""
        result = self._base
        update = max(
            sum(f.end - f.start for f in finish if f.kind == "optimizer")
            for finish in result.finish
        )
        after = result.makespan - max(row_ends(result.plan, result.ends)) - update
        return (
            "gradients are reduced and parameters gathered after the rows, nothing hides them; if "
            f"all of it hid behind the pipeline the step would be {-after / result.makespan:+.1%}"
        )

    def _effect(self, calibration: Calibration) -> str:
        return self._change(self._quick(calibration=calibration))

    def _change(self, changed: Result) -> str:
        return f"{changed.makespan / self._base.makespan - 1:+.1%}"
