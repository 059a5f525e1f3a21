"""Which expert goes where, and which are copied, so that the heaviest rank is light. No torch.

    layout = balanced_layout(load_E, num_ranks=64, num_slots=320, num_nodes=8, num_groups=8)
    imbalance(rank_loads(layout, load_E))

Loads are statistics of past steps, for instance rows by expert, in any unit. A copy gets its
expert's load over the number of its copies, as the dispatchers deal tokens out among them.

Where the nodes divide the router's groups, the placement is hierarchical: a group is wholly on one
node with all its copies, and each node has the same number of groups, so that a router limited to M
groups sends a token to M nodes at most. Elsewhere it is global: groups are not heeded, and nothing
is promised of the nodes a token goes to.

Source: the two policies and the greedy way that DeepSeek published as EPLB. Here that is one start
of a search, so the heaviest rank is never heavier than by the published way (see `packing_search`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from .layout import ExpertLayout
from .packing import Floats, Ints, least_share, loads, pack
from .packing_search import improve, least_peak, solve


def balanced_layout(
    load_E: ArrayLike,
    *,
    num_ranks: int,
    num_slots: int,
    num_nodes: int = 1,
    num_groups: int = 1,
) -> ExpertLayout:
    """The layout of one layer that makes its heaviest rank light.

    The same input gives the same layout.

    Args:
        load_E: [E] load of each logical expert, not negative.
        num_ranks: ranks of the expert-parallel group; node n has the n-th run of
            num_ranks / num_nodes of them.
        num_slots: physical experts, at least E, a multiple of num_ranks.
        num_nodes: nodes they are on.
        num_groups: groups of the router, each E / num_groups experts that follow each other.

    Raises:
        ValueError: sizes that do not divide, too few slots, or loads that are negative, not
            finite, or not one for each expert.
    """
    load_LE = _checked(load_E, 1)[None]
    sizes = _Sizes(load_LE.shape[1], num_ranks, num_slots, num_nodes, num_groups)
    return _layouts(load_LE, sizes)[0]


def balanced_layouts(
    load_LE: ArrayLike,
    *,
    num_ranks: int,
    num_slots: int,
    num_nodes: int = 1,
    num_groups: int = 1,
) -> list[ExpertLayout]:
    """`balanced_layout` of each layer, many times faster than one by one.

    Args:
        load_LE: [layers, E].
    """
    checked_LE = _checked(load_LE, 2)
    sizes = _Sizes(checked_LE.shape[1], num_ranks, num_slots, num_nodes, num_groups)
    return _layouts(checked_LE, sizes)


def rank_loads(layout: ExpertLayout, load_E: ArrayLike) -> Floats:
    """The load of each rank, [num_ranks]: of each slot its expert's, over the expert's copies."""
    slots_RP = np.array(layout.slots, dtype=np.int64).reshape(layout.num_ranks, -1)
    return loads(_checked(load_E, 1, layout.num_experts)[None], slots_RP[None])[0]


def node_loads(layout: ExpertLayout, load_E: ArrayLike, num_nodes: int) -> Floats:
    """The load of each node, [num_nodes]; a node's ranks follow each other."""
    if num_nodes < 1 or layout.num_ranks % num_nodes:
        raise ValueError(
            f"the layout's {layout.num_ranks} ranks do not divide among {num_nodes} nodes"
        )
    return rank_loads(layout, load_E).reshape(num_nodes, -1).sum(axis=1)


def imbalance(loads: ArrayLike) -> float:
    """The most over the mean, of loads or rows: 1 is perfect, and what none at all give."""
    values = np.asarray(loads, dtype=np.float64)
    mean = float(values.mean())
    return float(values.max()) / mean if mean > 0 else 1.0


def lower_bound(
    load_E: ArrayLike,
    *,
    num_ranks: int,
    num_slots: int,
    num_nodes: int = 1,
    num_groups: int = 1,
) -> float:
    """A load that the heaviest rank has under any placement of `balanced_layout`'s kind.

    Arguments and errors as there. The bound is the largest of: the mean; the highest share there
    must be with so many slots; and, hierarchically, the same two of each group alone, at best with
    all ranks and spare slots of a node, and the mean of a node with the heaviest group.
    It may be below what can be reached, as it does not ask whether copies pack evenly.
    """
    load_LE = _checked(load_E, 1)[None]
    sizes = _Sizes(load_LE.shape[1], num_ranks, num_slots, num_nodes, num_groups)
    nodes = sizes.nodes
    ranks = num_ranks // nodes
    # An expert's copies are all on one node, which is as if there were so many ranks.
    spare = (num_slots - sizes.num_experts) // nodes
    useful = min(ranks, spare + 1)
    bound = max(float(load_LE.sum()) / num_ranks, float(least_share(load_LE, num_slots, useful)[0]))
    if nodes > 1:
        load_GE = load_LE.reshape(num_groups, -1)
        bound = max(bound, float(least_peak(load_GE, load_GE.shape[1] + spare, ranks).max()))
        by_load = np.sort(load_GE.sum(axis=1))
        beside = num_groups // nodes - 1
        bound = max(bound, float(by_load[-1] + by_load[:beside].sum()) / ranks)
    return bound


@dataclass(frozen=True)
class _Sizes:
    """The sizes of a placement, checked.

    Attributes:
        nodes: those that the experts are first divided among: 1 where the placement is global.
    """

    num_experts: int
    num_ranks: int
    num_slots: int
    num_nodes: int
    num_groups: int

    def __post_init__(self) -> None:
        for name in ("num_ranks", "num_slots", "num_nodes", "num_groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_slots < self.num_experts:
            raise ValueError(
                f"{self.num_slots} slots are too few for {self.num_experts} experts; each expert "
                f"needs one: give num_slots={_multiple(self.num_experts, self.num_ranks)} or more"
            )
        if self.num_slots % self.num_ranks:
            raise ValueError(
                f"{self.num_slots} slots do not divide among {self.num_ranks} ranks; the next "
                f"number that does is num_slots={_multiple(self.num_slots, self.num_ranks)}"
            )
        if self.num_ranks % self.num_nodes:
            raise ValueError(
                f"{self.num_ranks} ranks do not divide among {self.num_nodes} nodes; give "
                "num_nodes=1 if it does not matter which node an expert is on"
            )
        if self.num_experts % self.num_groups:
            raise ValueError(
                f"{self.num_experts} experts do not divide into {self.num_groups} groups; give the "
                "router's number of groups, or num_groups=1 if it has none"
            )

    @property
    def nodes(self) -> int:
        return 1 if self.num_groups % self.num_nodes else self.num_nodes


def _multiple(number: int, of: int) -> int:
    return -(-number // of) * of


def _checked(load: ArrayLike, dimensions: int, num_experts: int | None = None) -> Floats:
    values = np.asarray(load, dtype=np.float64)
    shape = "[E]" if dimensions == 1 else "[layers, E]"
    if values.ndim != dimensions or not values.size:
        hint = "; for several layers take balanced_layouts" if values.ndim == 2 else ""
        raise ValueError(f"the load must be {shape}, got the shape {list(values.shape)}{hint}")
    if num_experts is not None and values.shape[-1] != num_experts:
        raise ValueError(f"the layout has {num_experts} experts, the load {values.shape[-1]}")
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError(
            "the load of an expert must be a finite number and not negative; take counts of rows, "
            "or their moving average"
        )
    return values


def _layouts(load_LE: Floats, sizes: _Sizes) -> list[ExpertLayout]:
    num_layers = len(load_LE)
    if sizes.nodes == 1:
        slots_LRP = solve(load_LE, sizes.num_slots, sizes.num_ranks)
        if sizes.num_nodes > 1:
            slots_LRP = _spread_ranks(load_LE, slots_LRP, sizes.num_nodes)
    else:
        group_load_LG = load_LE.reshape(num_layers, sizes.num_groups, -1).sum(axis=2)
        greedy_LNG = _deal(group_load_LG, sizes.nodes)
        better_LNG = improve(group_load_LG, greedy_LNG)
        slots_LRP = _by_node(load_LE, greedy_LNG, sizes)
        # Lighter nodes do not always have lighter ranks, so both are tried where they differ.
        differ_L = np.flatnonzero((greedy_LNG != better_LNG).any(axis=(1, 2)))
        if differ_L.size:
            found_LRP = _by_node(load_LE[differ_L], better_LNG[differ_L], sizes)
            old_L = _peak(load_LE[differ_L], slots_LRP[differ_L])
            new_L = _peak(load_LE[differ_L], found_LRP)
            slots_LRP[differ_L[new_L <= old_L]] = found_LRP[new_L <= old_L]
    slots_LRP.sort(axis=2)
    return [
        ExpertLayout(sizes.num_experts, sizes.num_ranks, tuple(slots_RP.reshape(-1).tolist()))
        for slots_RP in slots_LRP
    ]


def _deal(load_XI: Floats, num_packs: int) -> Ints:
    """Items by pack, [X, packs, items a pack], the heaviest first to the lightest pack."""
    item_XI = np.tile(np.arange(load_XI.shape[1]), (len(load_XI), 1))
    return pack(load_XI, item_XI, num_packs, apart=False)


def _by_node(load_LE: Floats, groups_LNG: Ints, sizes: _Sizes) -> Ints:
    """Place the experts of each node's groups on the node's ranks: the slots, [L, R, P].

    Args:
        groups_LNG: the groups on each node, [L, nodes, groups a node].
    """
    num_layers, nodes, _ = groups_LNG.shape
    size = sizes.num_experts // sizes.num_groups
    expert_LNE = (groups_LNG[..., None] * size + np.arange(size)).reshape(num_layers, nodes, -1)
    load_XE = np.take_along_axis(load_LE[:, None], expert_LNE, 2).reshape(num_layers * nodes, -1)
    local_XRP = solve(load_XE, sizes.num_slots // nodes, sizes.num_ranks // nodes)
    expert_XE = expert_LNE.reshape(num_layers * nodes, -1)
    slots_XS = np.take_along_axis(expert_XE, local_XRP.reshape(len(local_XRP), -1), 1)
    return slots_XS.reshape(num_layers, sizes.num_ranks, -1)


def _spread_ranks(load_LE: Floats, slots_LRP: Ints, num_nodes: int) -> Ints:
    """Reorder the ranks so that the nodes' loads are near each other: the slots, [L, R, P]."""
    load_LR = loads(load_LE, slots_LRP)
    order_LR = improve(load_LR, _deal(load_LR, num_nodes)).reshape(load_LR.shape)
    return np.take_along_axis(slots_LRP, order_LR[:, :, None], 1)


def _peak(load_LE: Floats, slots_LRP: Ints) -> Floats:
    return loads(load_LE, slots_LRP).max(axis=1)
