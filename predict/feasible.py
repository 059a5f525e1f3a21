"""Why a layout cannot be: everything that can be known without timing it."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from ..comm.dispatch.grid import NodeGrid
from ..comm.dispatch.layout import ExpertLayout
from ..comm.topology.spread import require_node_limit
from ..model import ModelConfig
from ..model.stages import Part
from ..parallel.mesh import MeshShape
from ..parallel.schedule import Schedule
from .cluster import Cluster
from .layout import Layout
from .memory import rank_memory, rank_states
from .step import device_of

_GIB = 1 << 30

# Groups that DeepEP's kernels are made for, as `comm.dispatch.deep_ep_versions` has them: V1's
# sizes, and how many expert slots V2 takes.
DEEP_EP_RANKS = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)
DEEP_EP_NODE = 8
DEEP_EP_SLOTS, DEEP_EP_SLOTS_A_RANK = 2048, 256


class Reason(NamedTuple):
    """Why a layout cannot be.

    Attributes:
        key: of the constraint, one of KEYS.
        what: does not fit, and by how much.
        remedy: what to change.
        over: by how much, bytes of memory; 0 for any other constraint.
    """

    key: str
    what: str
    remedy: str
    over: float = 0.0

    def __str__(self) -> str:
        return f"{self.key}: {self.what}; {self.remedy}"


def keep_nearest(reasons: dict[str, Reason], reason: Reason) -> None:
    """Keep one reason of each constraint: of memory what lacks least, else the first."""
    known = reasons.setdefault(reason.key, reason)
    if reason.over < known.over:
        reasons[reason.key] = reason


# The constraints in the order in which they are looked at.
KEYS = (
    "mesh",
    "gpus",
    "experts",
    "batch",
    "length",
    "formats",
    "dispatch",
    "nodes",
    "sms",
    "schedule",
    "layers",
    "memory",
)


def why_not(model: ModelConfig, cluster: Cluster, layout: Layout) -> Reason | None:
    """The first constraint that a layout breaks; None where it can be."""
    return why_not_shape(model, cluster, layout) or why_no_memory(model, cluster, layout)


def why_not_shape(model: ModelConfig, cluster: Cluster, layout: Layout) -> Reason | None:
    """As `why_not`, without memory."""
    return why_not_placed(model, cluster, layout) or why_no_schedule(model, layout)


def why_not_placed(model: ModelConfig, cluster: Cluster, layout: Layout) -> Reason | None:
    """As `why_not`, without the schedule, the cut and memory."""
    return (
        _mesh(layout)
        or _gpus(cluster, layout)
        or _experts(model, layout)
        or _length(model, layout)
        or _formats(layout)
        or _dispatch(model, cluster, layout)
        or _nodes(model, cluster, layout)
        or _sms(cluster, layout)
    )


def why_no_states(model: ModelConfig, cluster: Cluster, layout: Layout) -> Reason | None:
    """Memory that no schedule and no cut can do without.

    All ranks of a pipeline together hold the states of the whole model at least once, so that one
    of them has no less than the mean.
    """
    have = cluster.gpu.memory_bytes
    if not have:
        return None
    states = rank_states(model, layout, (Part.whole(model),), device=device_of(cluster))
    whole = states.parameters + states.fp8 + states.gradients + states.copies + states.moments
    over = whole / layout.pp - have
    if over <= 0:
        return None
    return Reason(
        "memory",
        f"parameters, gradients and optimizer states alone are {over / _GIB:.1f} GiB more a rank "
        f"than the {have / _GIB:.1f} GiB of a {cluster.gpu.name}",
        "raise ep, pp or zero",
        over,
    )


def why_no_memory(model: ModelConfig, cluster: Cluster, layout: Layout) -> Reason | None:
    """The rank that lacks most memory, and what takes most of it there.

    Args:
        model: of the layout.
        cluster: whose GPUs.
        layout: whose schedule and cut exist.
    """
    have = cluster.gpu.memory_bytes
    if not have:
        return None
    schedule = schedule_of(*size_of(layout))
    assert not isinstance(schedule, str), schedule
    ranks = rank_memory(model, layout, schedule, device=device_of(cluster))
    worst = max(range(len(ranks)), key=lambda rank: ranks[rank].total)
    over = ranks[worst].total - have
    if over <= 0:
        return None
    parts = ranks[worst].parts
    most = max(parts, key=parts.__getitem__)
    return Reason(
        "memory",
        f"pipeline rank {worst} needs {over / _GIB:.1f} GiB more than the {have / _GIB:.1f} GiB of "
        f"a {cluster.gpu.name}; most of it is {most} ({parts[most] / _GIB:.1f} GiB)",
        "raise ep, pp or zero, recompute more, or take a schedule that holds fewer micro-batches",
        over,
    )


def _mesh(layout: Layout) -> Reason | None:
    for name in ("pp", "dp", "ep", "microbatches", "sequences", "length"):
        if getattr(layout, name) < 1:
            return Reason("mesh", f"{name}={getattr(layout, name)}", f"set {name} to 1 or more")
    try:
        MeshShape(layout.pp, layout.dp, layout.ep)
    except ValueError as error:
        return _told("mesh", error)
    return None


def _gpus(cluster: Cluster, layout: Layout) -> Reason | None:
    world, most = layout.world_size, cluster.num_gpus
    if most and world > most:
        return Reason(
            "gpus",
            f"pp={layout.pp} x dp={layout.dp} are {world} ranks, {world - most} more than the "
            f"{most} GPUs of {cluster.name}",
            "lower pp or dp",
        )
    whole = cluster.gpus_per_node
    if world > whole and world % whole:
        return Reason(
            "gpus",
            f"{world} ranks leave {whole - world % whole} of a node's {whole} GPUs unused",
            f"choose pp and dp so that their product is a multiple of {whole}",
        )
    return None


def _experts(model: ModelConfig, layout: Layout) -> Reason | None:
    try:
        MeshShape(layout.pp, layout.dp, layout.ep).require_experts(model.n_routed_experts)
    except ValueError as error:
        return _told("experts", error)
    return None


def _length(model: ModelConfig, layout: Layout) -> Reason | None:
    most, least = model.max_position_embeddings, model.num_nextn_predict_layers + 1
    if layout.length > most:
        return Reason(
            "length",
            f"sequences of {layout.length} tokens are {layout.length - most} longer than the "
            f"model's max_position_embeddings={most}",
            "shorten them, or extend the model's context",
        )
    if layout.length < least:
        return Reason(
            "length",
            f"sequences of {layout.length} tokens leave nothing to predict at "
            f"num_nextn_predict_layers={least - 1}",
            f"take {least} tokens or more",
        )
    return None


def _formats(layout: Layout) -> Reason | None:
    if layout.fp8 and layout.dtype == "float64":
        return Reason(
            "formats", "layers in FP8 with dtype float64", "set dtype to bfloat16 or float32"
        )
    return None


def _dispatch(model: ModelConfig, cluster: Cluster, layout: Layout) -> Reason | None:
    if layout.dispatcher != "deep_ep":
        return None
    if layout.ep == 1:
        return Reason(
            "dispatch", "DeepEP with ep=1, where nothing is sent", "raise ep, or use flat"
        )
    if layout.payload.startswith("logfmt"):
        return Reason(
            "dispatch", f"DeepEP carries BF16 and FP8, not {layout.payload}", "use fp8 or two_hop"
        )
    if layout.payload == "exact" and layout.dtype != "bfloat16":
        return Reason(
            "dispatch", f"DeepEP would round {layout.dtype} to BF16", "set the payload to bf16"
        )
    first = layout.ep in DEEP_EP_RANKS and cluster.gpus_per_node == min(DEEP_EP_NODE, layout.ep)
    experts = model.n_routed_experts
    second = experts <= DEEP_EP_SLOTS and experts // layout.ep <= DEEP_EP_SLOTS_A_RANK
    if first or second:
        return None
    return Reason(
        "dispatch",
        f"DeepEP is made for expert groups of {', '.join(map(str, DEEP_EP_RANKS))} ranks or for at "
        f"most {DEEP_EP_SLOTS_A_RANK} experts a rank, not ep={layout.ep} with {experts} experts",
        "change ep, or use two_hop",
    )


def _nodes(model: ModelConfig, cluster: Cluster, layout: Layout) -> Reason | None:
    """Whether the router's node limit holds, and each node of a group has as many of its ranks.

    The latter only some dispatchers need, but times are known of no other group.
    """
    if layout.ep == 1:
        return None
    text = _spread(
        layout.ep,
        cluster.gpus_per_node,
        model.n_routed_experts,
        model.n_group,
        model.topk_group,
    )
    if text is None:
        return None
    whole = cluster.gpus_per_node
    return Reason("nodes", text, f"choose ep so that it divides {whole}, or is a multiple of it")


@lru_cache(maxsize=256)
def _spread(ep: int, per_node: int, experts: int, groups: int, limit: int) -> str | None:
    layout = ExpertLayout.contiguous(experts, ep)
    for start in range(0, math.lcm(ep, per_node), ep):
        nodes = [rank // per_node for rank in range(start, start + ep)]
        try:
            NodeGrid.of(nodes)
            if limit < groups:
                require_node_limit(layout, nodes, num_groups=groups, limit=limit)
        except ValueError as error:
            return str(error)
    return None


def _sms(cluster: Cluster, layout: Layout) -> Reason | None:
    sms, have = layout.comm_sms, cluster.gpu.num_sms
    if sms is None or layout.ep == 1:
        return None
    if not have:
        return Reason(
            "sms", f"{sms} SMs for communication, but a {cluster.gpu.name} has none", "give none"
        )
    if not 1 <= sms < have:
        return Reason(
            "sms",
            f"{sms} SMs for communication, of {have} that a {cluster.gpu.name} has",
            f"take 1 to {have - 1}",
        )
    return None


def why_no_schedule(model: ModelConfig, layout: Layout) -> Reason | None:
    """As `why_not`, the schedule and the cut alone."""
    made = schedule_of(*size_of(layout))
    if isinstance(made, str):
        return Reason("schedule", made, "choose another schedule, pp or number of micro-batches")
    try:
        layout.parts(model, made.num_stages)
    except ValueError as error:
        return _told("layers", error)
    return None


def _told(key: str, error: ValueError) -> Reason:
    """What a check of the trainer's own says, "what; remedy"."""
    what, _, remedy = str(error).partition("; ")
    return Reason(key, what, remedy)


def size_of(layout: Layout) -> tuple[str, int, int, int | None]:
    """What `schedule_of` takes."""
    return layout.schedule, layout.pp, layout.microbatches, layout.stages_per_rank


@lru_cache(maxsize=128)
def schedule_of(
    name: str, ranks: int, microbatches: int, stages_per_rank: int | None
) -> Schedule | str:
    """The schedule, or why there is none; kept, as many layouts share one."""
    layout = Layout(
        schedule=name, pp=ranks, microbatches=microbatches, stages_per_rank=stages_per_rank
    )
    try:
        return layout.make_schedule()
    except ValueError as error:
        return str(error)
