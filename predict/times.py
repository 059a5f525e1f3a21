"""How long each phase of each kind of layer takes, alone and beside the other direction's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from ..parallel.simulate.phases import COMPUTE, NAMES, lane_of
from .layout import Kind, Layout
from .work import Work, layer_work, routed_share

if TYPE_CHECKING:
    from ..model import ModelConfig
    from .calibration import Calibration, Reference
    from .cluster import Cluster

COMPUTES = tuple(name for name in NAMES if lane_of(name) == COMPUTE)
COMMUNICATES = tuple(name for name in NAMES if lane_of(name) != COMPUTE)

ENOUGH_SMS = 20


@dataclass(frozen=True)
class LayerTimes:
    """Times of one layer's phases for one micro-batch on one rank, ms.

    A kind without some phase has 0 there. "head" (final norm, output head and loss) and
    "embedding" compute in what is called mlp; "mtp" is a whole depth of multi-token prediction, its
    projection counted with attention and its head with mlp.

    Attributes:
        kind: of layer.
        alone: by each of `simulate.phases.NAMES`: where nothing else runs beside it.
        paired: the same where the other lane is at work too: fewer SMs for computation, shared
            bandwidth for communication.
        routed: share of the mlp phases' time that is proportional to the rows that a rank's
            experts get, 0 to 1.
    """

    kind: Kind
    alone: Mapping[str, float] = field(hash=False)
    paired: Mapping[str, float] = field(hash=False)
    routed: float = 0.0


@lru_cache(maxsize=8192)
def layer_times(
    model: ModelConfig, layout: Layout, cluster: Cluster, calibration: Calibration, kind: Kind
) -> LayerTimes:
    """What one kind of layer takes.

    Computation takes what a reference took, times the ratio of the two layers' `expected_ms`.
    "dense" takes the phases of "moe" for its reference if it has none of its own; what "mtp" has
    beyond a layer with experts, and "head" and "embedding", then take `expected_ms` itself. While
    communication keeps some of the SMs, what is bound by products takes longer in proportion, what
    is bound by memory does not.

    Communication alone takes what a reference says, or else the links; in a pair it takes as much
    longer as it did in the reference, or else `Calibration.contention`.
    """
    alone = dict.fromkeys(NAMES, 0.0)
    paired = dict.fromkeys(NAMES, 0.0)
    machine = _Machine(layout, cluster, calibration)
    work = layer_work(model, layout, kind)
    own = calibration.reference(kind)
    basis = own or calibration.reference("moe")
    if kind == "mtp" and own is None and basis is not None:
        of_layer = layer_work(model, layout, "moe")
        for name in COMPUTES:
            beyond = _difference(work[name], of_layer[name])
            alone[name], paired[name] = (
                a + b
                for a, b in zip(
                    machine.computed(name, of_layer[name], basis),
                    machine.computed(name, beyond, None),
                    strict=True,
                )
            )
    else:
        if kind in ("head", "embedding"):
            basis = own
        for name in COMPUTES:
            if name in work:
                alone[name], paired[name] = machine.computed(name, work[name], basis)
    exchanging = kind in ("moe", "mtp")
    if exchanging and layout.ep > 1:
        for name in COMMUNICATES:
            alone[name], paired[name] = machine.communicated(model, name, basis)
    gaps = calibration.pair_gaps
    return LayerTimes(
        kind,
        alone,
        {name: time * gaps for name, time in paired.items()},
        routed_share(model, layout, kind) if exchanging else 0.0,
    )


def expected_ms(
    work: Work, cluster: Cluster, calibration: Calibration, *, sms: float = 1.0
) -> float:
    """Time of a phase by the shares of the data sheet's peaks that are taken to be reached.

    A product takes as long as its operations or as its operands' traffic, whichever is more; what
    is no product follows.

    Args:
        work: of the phase.
        cluster: whose GPU's peaks.
        calibration: the shares.
        sms: share of the SMs that it has, which products and attention need.
    """
    gpu = cluster.gpu
    operations = (
        work.fp8_flops / (gpu.fp8_tflops * calibration.fp8_matmul)
        + work.flops / (gpu.bf16_tflops * calibration.matmul)
        + work.attention_flops / (gpu.bf16_tflops * calibration.attention)
    ) * 1e-9
    ms_per_byte = 1e-6 / (gpu.memory_gbps * calibration.memory)
    beside = work.num_bytes - work.product_bytes
    return max(operations / sms, work.product_bytes * ms_per_byte) + beside * ms_per_byte


@dataclass(frozen=True)
class _Machine:
    """What phases take on one cluster in one layout."""

    layout: Layout
    cluster: Cluster
    calibration: Calibration

    def computed(self, name: str, work: Work, reference: Reference | None) -> tuple[float, float]:
        """(alone, paired) of a phase that computes, ms."""
        left = compute_share(self.layout, self.cluster)
        alone, paired = (
            expected_ms(work, self.cluster, self.calibration, sms=sms) for sms in (1.0, left)
        )
        if reference is None or not alone:
            return alone, paired
        there = reference.cluster or self.cluster
        theirs = layer_work(reference.model, reference.layout, reference.kind)[name]
        factors = {
            of: times[name] / expected_ms(theirs, there, self.calibration, sms=sms)
            for of, times, sms in (
                ("alone", reference.alone, 1.0),
                ("paired", reference.paired, compute_share(reference.layout, there)),
            )
            if name in times
        }
        # Where one was not timed, the other says how near to the peaks the phase comes.
        either = next(iter(factors.values()), 1.0)
        return alone * factors.get("alone", either), paired * factors.get("paired", either)

    def communicated(
        self, model: ModelConfig, name: str, reference: Reference | None
    ) -> tuple[float, float]:
        """(alone, paired) of dispatch or combine, ms."""
        from .exchange import exchange

        mine = exchange(model, self.layout, self.cluster)[name].ms
        if reference is None or reference.layout.ep == 1:
            contended = self.calibration.contention if self.cluster.gpu.num_sms else 1.0
            return mine, mine * contended * _by_sms(self.layout, self.cluster)
        there = reference.cluster or self.cluster
        theirs = exchange(reference.model, reference.layout, there)[name].ms
        alone = mine * reference.alone[name] / theirs if name in reference.alone else mine
        paired = mine * reference.paired[name] / theirs if name in reference.paired else alone
        slower = _by_sms(self.layout, self.cluster) / _by_sms(reference.layout, there)
        return alone, max(alone, paired * slower)


def compute_share(layout: Layout, cluster: Cluster) -> float:
    """Share of the SMs that computation has while communication keeps its own.

    Communication that was not told how many to take, takes as many as it needs.
    """
    if layout.ep == 1 or not cluster.gpu.num_sms:
        return 1.0
    return 1.0 - (layout.comm_sms or ENOUGH_SMS) / cluster.gpu.num_sms


def _by_sms(layout: Layout, cluster: Cluster) -> float:
    """How much longer communication takes with few SMs.

    With ENOUGH_SMS it fills both links (arXiv 2412.19437, section 3.2.2, of an H800); below, its
    speed is taken to fall in proportion.
    """
    if layout.comm_sms is None or not cluster.gpu.num_sms:
        return 1.0
    return max(1.0, ENOUGH_SMS / layout.comm_sms)


def _difference(work: Work, less: Work) -> Work:
    return Work(*(a - b for a, b in zip(work, less, strict=True)))
