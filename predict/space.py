"""Which layouts a search looks at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product

from ..model import ModelConfig
from ..parallel.schedule import names
from ..parallel.schedule.named.catalogue import options
from .cluster import Cluster
from .feasible import Reason, keep_nearest, why_not_placed
from .layout import Dispatcher, Layout, Payload


@dataclass(frozen=True, kw_only=True)
class Space:
    """What a search may choose from; every combination is a candidate.

    Attributes:
        pp, ep: ranks; empty: powers of two, up to the model's layers and experts.
        schedules: names.
        stages_per_rank: of the schedules that leave it open.
        sequences: of a micro-batch, from which the number of micro-batches follows.
        recompute: what is made again in the backward: norms, up-projections.
        fp8: whether linear layers compute in FP8.
        exchanges: dispatcher and payload, where there are several expert-parallel ranks.
        comm_sms: SMs for them.
        zero: ZeRO stage.
        base: everything else of a layout.
    """

    pp: tuple[int, ...] = ()
    ep: tuple[int, ...] = ()
    schedules: tuple[str, ...] = field(default_factory=names)
    stages_per_rank: tuple[int, ...] = (2, 4)
    sequences: tuple[int, ...] = (1, 2)
    recompute: tuple[tuple[bool, bool], ...] = ((True, True), (True, False), (False, False))
    fp8: tuple[bool, ...] = (True, False)
    exchanges: tuple[tuple[Dispatcher, Payload], ...] = (
        ("deep_ep", "fp8"),
        ("deep_ep", "bf16"),
        ("two_hop", "fp8"),
    )
    comm_sms: tuple[int | None, ...] = (20, 12, 16, 24)
    zero: tuple[int, ...] = (1, 0)
    base: Layout = field(default_factory=Layout)

    def __post_init__(self) -> None:
        for name in ("schedules", "sequences", "recompute", "fp8", "exchanges", "comm_sms", "zero"):
            if not getattr(self, name):
                raise ValueError(f"a search without any choice of {name}; give one at least")

    @cached_property
    def plans(self) -> tuple[tuple[str, int | None], ...]:
        """Schedules with their stages a rank."""
        return tuple(
            (name, stages)
            for name in self.schedules
            for stages in (self.stages_per_rank if "stages_per_rank" in options(name) else (None,))
        )

    def variants(self, layout: Layout) -> Iterator[Layout]:
        """The layouts that differ from one in their schedule alone, by `plans`."""
        for name, stages in self.plans:
            yield replace(layout, schedule=name, stages_per_rank=stages)

    @property
    def num_variants(self) -> int:
        """How many `variants` there are."""
        return len(self.plans)


@dataclass
class Candidates:
    """The layouts of a space that can be placed on a cluster, one for all its `variants`.

    Attributes:
        layouts: without a schedule of their own.
        infeasible: how many layouts of the space, variants too, break each constraint.
        reasons: an example of each.
    """

    layouts: list[Layout] = field(default_factory=list[Layout])
    infeasible: Counter[str] = field(default_factory=Counter[str])
    reasons: dict[str, Reason] = field(default_factory=dict[str, Reason])

    def refuse(self, reason: Reason, count: int) -> None:
        """Count layouts that cannot be."""
        self.infeasible[reason.key] += count
        keep_nearest(self.reasons, reason)


def candidates(
    model: ModelConfig,
    cluster: Cluster,
    space: Space,
    *,
    gpus: int,
    batch_sequences: int,
    length: int,
) -> Candidates:
    """The layouts of a space for so many GPUs and a global batch of so many sequences."""
    found = Candidates()
    for pp, ep, sequences in product(
        space.pp or _powers(min(model.num_hidden_layers, gpus)),
        space.ep or _powers(min(model.n_routed_experts, gpus)),
        space.sequences,
    ):
        exchanges = list(_exchanges(space, ep))
        choices = list(product(space.recompute, space.fp8, space.zero))
        each = len(exchanges) * len(choices) * space.num_variants
        whole = _whole(pp, sequences, gpus, batch_sequences)
        if isinstance(whole, Reason):
            found.refuse(whole, each)
            continue
        dp, microbatches = whole
        mesh = {"pp": pp, "dp": dp, "ep": ep, "microbatches": microbatches}
        shape = replace(space.base, sequences=sequences, length=length, **mesh)
        for exchange in exchanges:
            for (norms, up), fp8, zero in choices:
                layout = replace(
                    shape,
                    dispatcher=exchange[0],
                    payload=exchange[1],
                    comm_sms=exchange[2],
                    recompute_norms=norms,
                    recompute_up_projections=up,
                    fp8=fp8,
                    zero=zero,
                )
                reason = why_not_placed(model, cluster, layout)
                if reason is None:
                    found.layouts.append(layout)
                else:
                    found.refuse(reason, space.num_variants)
    return found


def _exchanges(space: Space, ep: int) -> Iterator[tuple[Dispatcher, Payload, int | None]]:
    if ep == 1:  # nothing is sent, so that there is nothing to choose
        yield "flat", "exact", None
        return
    for (dispatcher, payload), sms in product(space.exchanges, space.comm_sms):
        yield dispatcher, payload, sms


def _whole(pp: int, sequences: int, gpus: int, batch: int) -> tuple[int, int] | Reason:
    """Data-parallel ranks, and micro-batches of each."""
    dp, idle = divmod(gpus, pp)
    if not dp or idle:
        return Reason("gpus", f"pp={pp} does not divide {gpus} GPUs", "choose a pp that does")
    microbatches, rest = divmod(batch, dp * sequences)
    if not microbatches or rest:
        return Reason(
            "batch",
            f"a batch of {batch} sequences is {batch / (dp * sequences):.2f} micro-batches of "
            f"{sequences} on each of dp={dp} ranks",
            f"choose a batch that is a multiple of {dp * sequences}, or another pp",
        )
    return dp, microbatches


def _powers(most: int) -> Sequence[int]:
    """Powers of two up to `most`."""
    return [1 << i for i in range(most.bit_length())]
