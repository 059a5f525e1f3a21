"""The order of a job's nodes, by which ranks are counted: expert groups stay under one switch.

Ranks of an expert group are contiguous (`parallel/mesh.py`), so a group of several nodes lies under
one switch if its nodes stand side by side in the order. A pure function, which every node computes
for itself from the same files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from .hostlist import natural
from .topology import Switch


def order_nodes(
    nodes: Sequence[str], switches: Sequence[Switch], *, group_nodes: int = 1
) -> tuple[str, ...]:
    """The nodes, so that as many groups of `group_nodes` as can be lie under one lowest switch.

    Each lowest switch gives whole groups' worth of its nodes; what is left over at it joins with
    its siblings' left-overs one level up, and so on. A last group that is not full stands at the
    end. Within a switch names are in natural order, node2 before node10.

    Args:
        nodes: the job's nodes, all different.
        switches: the topmost ones; nodes that are under none of them come last.
        group_nodes: nodes of one expert group, 1 if a group fits within a node.
    """
    assert group_nodes >= 1, group_nodes
    assert len(set(nodes)) == len(nodes), nodes
    wanted = frozenset(nodes)
    groups, rest = _gather((_take(switch, wanted, group_nodes) for switch in switches), group_nodes)
    known = {*groups, *rest}
    unknown = sorted(wanted - known, key=natural)
    whole, left = _cut([*rest, *unknown], group_nodes)
    return (*groups, *whole, *left)


def digest(nodes: Sequence[str]) -> str:
    """A short checksum of an order, by which processes tell whether they have the same one."""
    return hashlib.sha256("\n".join(nodes).encode()).hexdigest()[:16]


def _take(switch: Switch, wanted: frozenset[str], size: int) -> tuple[list[str], list[str]]:
    """The wanted nodes under a switch: those in whole groups, and those left over."""
    own = [node for node in switch.nodes if node in wanted]
    below = [_take(child, wanted, size) for child in switch.switches]
    return _gather([*below, _cut(own, size)], size)


def _gather(parts: Iterable[tuple[list[str], list[str]]], size: int) -> tuple[list[str], list[str]]:
    """Siblings put together: their whole groups, and whole groups of their left-overs."""
    groups: list[str] = []
    rest: list[str] = []
    for whole, left in parts:
        groups += whole
        rest += left
    whole, left = _cut(rest, size)
    return groups + whole, left


def _cut(nodes: list[str], size: int) -> tuple[list[str], list[str]]:
    count = len(nodes) // size * size
    return nodes[:count], nodes[count:]
