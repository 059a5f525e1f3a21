"""Over how many nodes groups spread, and whether node-limited routing keeps its promise."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .world import listed

if TYPE_CHECKING:
    from ..dispatch.layout import ExpertLayout

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GroupSpread:
    """How one group of ranks lies on the nodes.

    Attributes:
        ranks: global ranks of the group, in its order.
        nodes: the nodes they are on, in the order of their first rank.
        fewest: the fewest nodes of the world that hold so many ranks.
    """

    ranks: tuple[int, ...]
    nodes: tuple[int, ...]
    fewest: int


def spread_of_groups(
    groups: Iterable[Sequence[int]], nodes: Sequence[int]
) -> tuple[GroupSpread, ...]:
    """How each of `groups` of global ranks lies, rank r being on node nodes[r]."""
    sizes = sorted(Counter(nodes).values(), reverse=True)
    return tuple(
        GroupSpread(
            tuple(ranks),
            tuple(dict.fromkeys(nodes[rank] for rank in ranks)),
            _fewest(len(ranks), sizes),
        )
        for ranks in groups
    )


def order_by_node(nodes: Sequence[int]) -> tuple[int, ...]:
    """The order of ranks that puts those of a node together: the new rank r is now rank order[r].

    Nodes keep the order of their first ranks, and ranks of a node their own.
    """
    first = {node: i for i, node in enumerate(dict.fromkeys(nodes))}
    return tuple(sorted(range(len(nodes)), key=lambda rank: (first[nodes[rank]], rank)))


def why_spread(groups: Sequence[Sequence[int]], nodes: Sequence[int]) -> str | None:
    """What is wrong, and the remedy, where a group of ranks lies on more nodes than it needs.

    Args:
        groups: of global ranks, such as the expert groups of a mesh.
        nodes: the node of each global rank.

    Returns:
        None where each lies on as few nodes as can hold it.
    """
    spread = spread_of_groups(groups, nodes)
    wide = [group for group in spread if len(group.nodes) > group.fewest]
    if not wide:
        return None
    worst = max(wide, key=lambda group: len(group.nodes) - group.fewest)
    order = order_by_node(nodes)
    sorted_nodes = [nodes[rank] for rank in order]
    better = sum(len(group.nodes) for group in spread_of_groups(groups, sorted_nodes))
    if better < sum(len(group.nodes) for group in spread):
        remedy = (
            "start the ranks node by node (torchrun with --node-rank and a static rendezvous, srun "
            f"--distribution=block), in the order {listed(order, 64)} of the present ranks"
        )
    else:
        remedy = (
            "choose mesh.ep and the processes per node so that one is a multiple of the other "
            f"(there are {listed(list(Counter(nodes).values()))} ranks on the nodes)"
        )
    return (
        f"{len(wide)} of {len(spread)} expert groups lie on more nodes than they need: ranks "
        f"{listed(worst.ranks)} on {len(worst.nodes)} nodes ({listed(worst.nodes)}) instead of "
        f"{worst.fewest}, so more tokens cross between nodes; {remedy}"
    )


def warn_of_spread(groups: Iterable[Sequence[int]], nodes: Sequence[int]) -> None:
    """Log a warning where an expert group lies on more nodes than it needs."""
    several = [group for group in dict.fromkeys(map(tuple, groups)) if len(group) > 1]
    if (reason := why_spread(several, nodes)) is not None:
        _log.warning("%s", reason)


def require_node_limit(
    layout: ExpertLayout, nodes: Sequence[int], *, num_groups: int, limit: int
) -> None:
    """Check that node-limited routing reaches at most `limit` nodes with each token.

    The router lets a token choose among the experts of `limit` of its groups (DeepSeek-V3, section
    2.1.2). These lie on at most so many nodes if each group is on one node, or if there are no more
    nodes than that; in any other case some choice of groups reaches more.

    Args:
        layout: where the experts are; all copies of one may be used.
        nodes: the node of each ep rank.
        num_groups: the router's groups of experts, contiguous and of one size (n_group).
        limit: groups that a token may choose, and nodes that it may reach (topk_group).

    Raises:
        ValueError: the promise is broken, or the numbers do not fit each other.
    """
    if len(nodes) != layout.num_ranks:
        raise ValueError(
            f"nodes names the node of {len(nodes)} ep ranks, the expert layout has "
            f"{layout.num_ranks}"
        )
    if num_groups < 1 or layout.num_experts % num_groups:
        raise ValueError(
            f"{layout.num_experts} experts do not divide into {num_groups} groups of the router; "
            "choose n_group so that it divides the experts"
        )
    if not 1 <= limit <= num_groups:
        raise ValueError(
            f"a node limit of {limit} does not fit {num_groups} groups of the router; choose "
            f"topk_group from 1 to {num_groups}"
        )
    num_nodes = len(set(nodes))
    if num_nodes <= limit:
        return
    for group, on in enumerate(_nodes_of_router_groups(layout, nodes, num_groups)):
        if len(on) > 1:
            size = layout.num_experts // num_groups
            raise ValueError(
                f"the experts of the router's group {group} of {num_groups} (experts "
                f"{group * size}..{(group + 1) * size - 1}) lie on nodes {listed(on)}, so a token "
                f"that is limited to {limit} groups can reach more than {limit} of the "
                f"{num_nodes} nodes; give a layout that keeps each group on one node, choose "
                "n_group and the expert-parallel ranks so that every node has whole groups, or "
                "dispatch without a node limit"
            )


def _nodes_of_router_groups(
    layout: ExpertLayout, nodes: Sequence[int], num_groups: int
) -> list[list[int]]:
    """The nodes that each group's experts lie on, ascending."""
    size = layout.num_experts // num_groups
    on: list[set[int]] = [set() for _ in range(num_groups)]
    for slot, expert in enumerate(layout.slots):
        on[expert // size].add(nodes[layout.rank_of(slot)])
    return [sorted(group) for group in on]


def _fewest(count: int, sizes: Sequence[int]) -> int:
    """How many nodes, the largest first, hold `count` ranks."""
    held = 0
    for taken, size in enumerate(sizes, 1):
        held += size
        if held >= count:
            return taken
    raise AssertionError("a group has no more ranks than the world")
