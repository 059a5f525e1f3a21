"""What ranks send each other, and how long that takes: experts' rows, activations, gradients.

Ranks lie as `parallel.mesh` orders them: rank = pp_rank * dp + dp_rank, the ranks of an expert
group side by side, nodes filled one after the other. So

    who exchanges                   how far apart           on which links
    an expert group                 neighbours              inside a node as far as it fits there
    neighbours in a pipeline        dp ranks                across nodes, as soon as there are two
    data-parallel ranks             neighbours              inside nodes and across
    the same with the same experts  ep ranks                across, where a node has no more than ep
    the two holders of a stage      mirrored in a pipeline  across nodes, as soon as there are two

Where only some of a kind have to cross (dp below a node's GPUs), the slower link counts. Every GPU
has a network card of its own; no two kinds of exchange are taken to meet on a link, and switches
are never the narrowest place.
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil, gcd, log2
from typing import Literal, NamedTuple

from ..comm.cost import Links, phase_cost
from ..comm.dispatch.grid import NodeGrid
from ..comm.dispatch.layout import ExpertLayout
from ..comm.dispatch.sizes import num_pieces
from ..comm.traffic import ACROSS, INSIDE, across_nodes
from ..comm.traffic_sizes import PHASES, RowSizes
from ..comm.traffic_synthetic import Choice
from ..model import ModelConfig
from ..model.inventory import inventory
from ..model.stages import Part
from .cluster import AllToAll, Cluster
from .layout import Layout
from .operations import FLOAT
from .spread import choice_of, mean_traffic, reach

_CHUNKS = 4  # of two hops, as dispatch.chunks is by default
_MEASURED_TOKENS = 4096  # of a rank, in the measurements that clusters have
_FEW = 4  # times fewer tokens, and a bandwidth says little


_Basis = Literal["nothing", "links", "measured", "interpolated", "extrapolated"]
_Table = tuple[tuple[int, AllToAll], ...]


class Exchange(NamedTuple):
    """One communication of a layer's experts for one micro-batch, on average over ranks.

    Attributes:
        across_bytes: that a rank sends to other nodes.
        inside_bytes: that it sends to other ranks of its node.
        ms: how long it takes with nothing beside it.
        basis: what that is from: "nothing" to send; the bandwidths of "links"; or the bandwidth
            that was "measured" for this number of ranks, "interpolated" between two such,
            "extrapolated" from the nearest, or from far more tokens.
    """

    across_bytes: float
    inside_bytes: float
    ms: float
    basis: _Basis


class Transfer(NamedTuple):
    """What a rank sends in another communication, and what that takes.

    Attributes:
        across_bytes: to other nodes.
        inside_bytes: to other ranks of its node.
        ms: how long it takes.
        bound: the link that takes so long, comm.traffic.ACROSS or INSIDE; "" where nothing is sent.
    """

    across_bytes: float
    inside_bytes: float
    ms: float
    bound: str


def exchange(model: ModelConfig, layout: Layout, cluster: Cluster) -> dict[str, Exchange]:
    """The four communications of a layer with experts, where no expert is more popular.

    dispatch(F) and combine(B) hand rows to experts, in FP8 if the payload says so; combine(F) and
    dispatch(B), the backward of a dispatch, bring rows back and sum them, in BF16 with that payload
    (arXiv 2412.19437, section 3.2.2).

    Tokens spread as V3's router spreads them by random scores, which is over more nodes than where
    groups are drawn evenly: it takes those groups that have good experts.

    flat, dedup and two_hop take what the busiest link needs (`comm.cost`). deep_ep sends as two_hop
    does, and takes what it was measured to take where the cluster tells. Between the numbers of
    ranks that were measured the bandwidth of what really leaves a node (or, within a node, a rank)
    is interpolated over the logarithm of the ranks; beyond them it is that of the nearest. Without
    measurements its hops overlap wholly on the links. SMs do not change its bandwidth here.

    Raises:
        ValueError: the experts do not divide among the ranks, or expert groups lie unevenly on
            nodes.
    """
    if layout.ep == 1:
        return dict.fromkeys(PHASES, Exchange(0.0, 0.0, 0.0, "nothing"))
    table = tuple(sorted(cluster.all_to_all.items())) if layout.dispatcher == "deep_ep" else ()
    key = _Key(
        choice_of(model),
        RowSizes(layout.payload_sizes, model.hidden_size),
        layout.ep,
        ranks_per_node(layout, cluster),
        layout.tokens,
        layout.dispatcher,
        cluster.links,
    )
    return dict(_exchange(key, cluster.gpus_per_node, table))


def ranks_per_node(layout: Layout, cluster: Cluster) -> int:
    """Ranks of an expert group that share a node.

    Raises:
        ValueError: not the same number on each node.
    """
    node, ep = cluster.gpus_per_node, layout.ep
    if layout.world_size <= node or node % ep == 0:
        return ep
    if ep % node == 0:
        return node
    raise ValueError(
        f"expert groups of ep={ep} lie unevenly on nodes of {node} GPUs; take an ep that divides "
        f"{node}, or a multiple of it"
    )


def message_bytes(model: ModelConfig, layout: Layout) -> int:
    """Activations, or their gradients, of a micro-batch between two stages."""
    return layout.tokens * model.hidden_size * layout.itemsize


def message_transfer(model: ModelConfig, layout: Layout, cluster: Cluster) -> Transfer:
    """A message between two stages; its time includes the latency of its link."""
    return _pairwise(message_bytes(model, layout), layout, cluster)


def reduce_ms(model: ModelConfig, layout: Layout, cluster: Cluster, part: Part) -> float:
    """Time to reduce a stage's gradients over data-parallel ranks, and to gather its parameters."""
    return reduction(model, layout, cluster, part).ms + gathering(model, layout, cluster, part).ms


def reduction(model: ModelConfig, layout: Layout, cluster: Cluster, part: Part) -> Transfer:
    """The sum of a stage's gradients, float32 at least, over the ranks that hold the same.

    Those are dp / ep ranks for routed experts, dp for all else. With ZeRO-1 it is a reduce-scatter,
    without an all-reduce, which sends twice as much. Within a node each rank ends with one share of
    the sums, which then goes across; both overlap, so that the slower link counts.
    """
    wide = max(FLOAT, layout.itemsize)
    sizes = stage_parameters(model, layout, part)
    times = 1 if layout.zero else 2
    return _over_ranks(times * sizes.routed * wide, times * sizes.other * wide, layout, cluster)


def gathering(model: ModelConfig, layout: Layout, cluster: Cluster, part: Part) -> Transfer:
    """A stage's updated parameters to all ranks that hold the same, with ZeRO-1.

    They go as they are kept: what products in FP8 take as float32, the rest in the layout's dtype.
    """
    if not layout.zero:
        return _NOTHING
    sizes, size = stage_parameters(model, layout, part), layout.itemsize
    kept = max(FLOAT, size) if layout.fp8 else size
    other = (sizes.other - sizes.plain) * kept + sizes.plain * size
    return _over_ranks(sizes.routed * kept, other, layout, cluster)


def mirror_ms(model: ModelConfig, layout: Layout, cluster: Cluster, part: Part) -> float:
    """Time of `mirroring`."""
    return mirroring(model, layout, cluster, part).ms


def mirroring(model: ModelConfig, layout: Layout, cluster: Cluster, part: Part) -> Transfer:
    """The sum of a stage's gradients over its two holders in a bidirectional pipeline.

    It follows the reduction over data-parallel ranks: with ZeRO-1 it is of the rank's shares alone.
    """
    sizes = stage_parameters(model, layout, part)
    numbers = sizes.routed + sizes.other
    if layout.zero:
        numbers = sizes.routed * layout.ep / layout.dp + sizes.other / layout.dp
    # Of two ranks each sends half, and half of the sums.
    return _pairwise(numbers * max(FLOAT, layout.itemsize), layout, cluster)


class Parameters(NamedTuple):
    """Numbers of parameters that a rank holds of a stage.

    Attributes:
        routed: of routed experts.
        other: of all else.
        plain: those of the others that no product in FP8 takes: embedding, head, router, norms.
    """

    routed: int
    other: int
    plain: int


def stage_parameters(model: ModelConfig, layout: Layout, part: Part) -> Parameters:
    """What one of the ranks of a stage holds."""
    routed, other, plain = _stage_parameters(model, part)
    return Parameters(routed // layout.ep, other, plain)


@lru_cache(maxsize=4096)
def _stage_parameters(model: ModelConfig, part: Part) -> Parameters:
    """Of all experts."""
    every = inventory(model, part)
    return Parameters(
        sum(p.numel for p in every if p.routed),
        sum(p.numel for p in every if not p.routed),
        sum(p.numel for p in every if not (p.routed or p.product)),
    )


class _Key(NamedTuple):
    """What an expert group's exchange depends on."""

    choice: Choice
    sizes: RowSizes
    ep: int
    per_node: int
    tokens: int
    dispatcher: str
    links: Links


@lru_cache(maxsize=4096)
def _exchange(key: _Key, gpus_per_node: int, table: _Table) -> dict[str, Exchange]:
    grid = NodeGrid.of([rank // key.per_node for rank in range(key.ep)])
    layout = ExpertLayout.contiguous(key.choice.num_experts, key.ep)
    backend, chunks = key.dispatcher, num_pieces(key.tokens, _CHUNKS)
    if backend == "deep_ep":
        backend, chunks = "two_hop", None
    reached = reach(key.choice, layout, grid)
    traffic = mean_traffic(backend, key.choice, num_tokens=key.tokens, layout=layout, grid=grid)
    bandwidths, basis = _measured(key, gpus_per_node, table)
    across_RR = across_nodes(grid)
    found: dict[str, Exchange] = {}
    for phase, what in PHASES.items():
        sent_RR = traffic.rank_bytes(phase, key.sizes)
        across = float(sent_RR[across_RR].sum()) / key.ep
        inside = float(sent_RR[~across_RR].sum()) / key.ep
        if bandwidths is None:
            ms = phase_cost(traffic, phase, key.sizes, key.links, chunks=chunks).ms
        else:
            # What the bandwidth was measured of: rows without what goes along with them.
            parts = key.sizes.payload.parts(key.sizes.hidden, spread=what.spread)
            row = sum(item * count for item, count in parts)
            gbps = bandwidths.dispatch_gbps if what.spread else bandwidths.combine_gbps
            peers = reached.nodes if grid.num_nodes > 1 else reached.ranks
            ms = key.tokens * peers * row / gbps * 1e-6
        found[phase] = Exchange(across, inside, ms, basis)
    return found


def _measured(key: _Key, gpus_per_node: int, table: _Table) -> tuple[AllToAll | None, _Basis]:
    """DeepEP's bandwidth among these ranks, of the bytes that its tests count."""
    several = key.ep > key.per_node
    known = {
        ranks: value.crossing(_peers(ranks, gpus_per_node))
        for ranks, value in table
        if ranks > 1 and (ranks > gpus_per_node) == several
    }
    if not known:
        return None, "links"
    below = max((ranks for ranks in known if ranks <= key.ep), default=min(known))
    above = min((ranks for ranks in known if ranks >= key.ep), default=max(known))
    basis: _Basis = "measured" if key.ep in known else "interpolated"
    share = 0.0
    if below < key.ep < above:
        share = log2(key.ep / below) / log2(above / below)
    elif basis != "measured":
        basis = "extrapolated"
        below = above = min(max(key.ep, min(known)), max(known))
    if key.tokens * _FEW < _MEASURED_TOKENS:
        basis = "extrapolated"
    leaving = 1 - 1 / _peers(key.ep, key.per_node if several else key.ep)
    low, high = known[below], known[above]
    return AllToAll(
        (low.dispatch_gbps * (1 - share) + high.dispatch_gbps * share) / leaving,
        (low.combine_gbps * (1 - share) + high.combine_gbps * share) / leaving,
    ), basis


def _peers(ranks: int, gpus_per_node: int) -> int:
    """Nodes of so many ranks, or the ranks themselves where they share one."""
    return ceil(ranks / gpus_per_node) if ranks > gpus_per_node else ranks


_NOTHING = Transfer(0.0, 0.0, 0.0, "")


def _pairwise(num_bytes: float, layout: Layout, cluster: Cluster) -> Transfer:
    """From a rank to one of another pipeline rank."""
    if layout.pp == 1:
        return _NOTHING
    crosses = layout.world_size > cluster.gpus_per_node
    link = ACROSS if crosses else INSIDE
    ms = cluster.links.transfer_ms(link, num_bytes) + cluster.links.latency_ms(link)
    return Transfer(num_bytes * crosses, num_bytes * (not crosses), ms, link)


def _over_ranks(routed: float, other: float, layout: Layout, cluster: Cluster) -> Transfer:
    """A reduce-scatter, or an all-gather, of so many bytes of experts and of all else."""
    node = cluster.gpus_per_node
    together = layout.dp if layout.world_size <= node else gcd(layout.dp, node)
    copies = layout.dp // layout.ep
    both = (
        _scatter(routed, copies, gcd(copies, max(1, together // layout.ep)), cluster),
        _scatter(other, layout.dp, together, cluster),
    )
    slower = max(both, key=lambda transfer: transfer.ms)
    return Transfer(
        sum(transfer.across_bytes for transfer in both),
        sum(transfer.inside_bytes for transfer in both),
        sum(transfer.ms for transfer in both),
        slower.bound,
    )


def _scatter(num_bytes: float, ranks: int, per_node: int, cluster: Cluster) -> Transfer:
    """The same over one group, so many of whose ranks share a node."""
    if ranks == 1 or not num_bytes:
        return _NOTHING
    nodes, links = ranks // per_node, cluster.links
    sent = {
        INSIDE: num_bytes * (per_node - 1) / per_node,
        ACROSS: num_bytes / per_node * (nodes - 1) / nodes,
    }
    ms = {link: links.transfer_ms(link, size) for link, size in sent.items()}
    bound = max(ms, key=lambda link: ms[link])
    latency = sum(links.latency_ms(link) for link, size in sent.items() if size)
    return Transfer(sent[ACROSS], sent[INSIDE], ms[bound] + latency, bound)
