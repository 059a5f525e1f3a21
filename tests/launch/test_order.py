"""The order of nodes by the network's topology."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.launch.slurm.hostlist import natural
from counterflow.launch.slurm.order import digest, order_nodes
from counterflow.launch.slurm.topology import Switch, forest, lowest_switches, parse_topology

TREE = """\
SwitchName=leaf1 Level=0 LinkSpeed=1 Nodes=node1,node3
SwitchName=leaf2 Level=0 LinkSpeed=1 Nodes=node2,node[4,10]
SwitchName=spine Level=1 LinkSpeed=1 Nodes=node[1-4,10] Switches=leaf1,leaf2
"""
# As documented for topology/block of Slurm 24.05.
BLOCKS = """\
BlockName=b1 BlockIndex=0 Nodes=n[01-02] BlockSize=2
BlockName=b2 BlockIndex=1 Nodes=n[03-04] BlockSize=2
BlockName=b3 BlockIndex=2 Nodes=n[05-06] BlockSize=2
AggregatedBlock=b[1-2] BlockIndex=3 Nodes=n[01-04] BlockSize=4
"""


def test_a_tree_of_switches_is_read() -> None:
    leaves = (Switch("leaf1", ("node1", "node3")), Switch("leaf2", ("node2", "node4", "node10")))
    assert parse_topology(TREE) == (Switch("spine", (), leaves),)
    assert lowest_switches(parse_topology(TREE))["node10"] == "leaf2"


def test_blocks_and_blocks_of_blocks_are_read() -> None:
    below = (Switch("b1", ("n01", "n02")), Switch("b2", ("n03", "n04")))
    assert parse_topology(BLOCKS) == (Switch("b[1-2]", (), below), Switch("b3", ("n05", "n06")))


@pytest.mark.parametrize(
    "text", ["", "No topology information available\n", "SwitchName=s Level=0 Nodes=(null)\n"]
)
def test_nothing_is_known_without_a_topology(text: str) -> None:
    assert parse_topology(text) == ()


def test_a_line_that_is_no_hostlist_is_an_error() -> None:
    with pytest.raises(ValueError, match="the nodes of s1"):
        parse_topology("SwitchName=s1 Level=0 Nodes=n[1-\n")


def test_of_a_network_that_is_no_tree_the_small_parts_count() -> None:
    assert [s.name for s in forest({"ring": "abcd", "left": "ab", "odd": "bc"})] == ["ring"]
    assert lowest_switches(forest({"ring": "abcd", "left": "ab", "odd": "bc"}))["b"] == "left"


def test_order_follows_switches_and_natural_names() -> None:
    nodes = ["node10", "node4", "node3", "node2", "node1"]
    order = order_nodes(nodes, parse_topology(TREE))
    assert order == ("node1", "node3", "node2", "node4", "node10")
    assert order_nodes(nodes, ()) == ("node1", "node2", "node3", "node4", "node10")


def test_what_is_left_over_joins_with_the_siblings_left_overs() -> None:
    switches = parse_topology(
        "SwitchName=s1 Nodes=a[1-3]\nSwitchName=s2 Nodes=b[1-3]\n"
        "SwitchName=t1 Nodes=a[1-3],b[1-3]\nSwitchName=s3 Nodes=c[1-2]\n"
    )
    nodes = [n for s in switches for n in s.all_nodes]
    order = order_nodes([*nodes, "z1"], switches, group_nodes=2)
    assert [order[i : i + 2] for i in range(0, 9, 2)] == [
        *(("a1", "a2"), ("b1", "b2"), ("a3", "b3"), ("c1", "c2"), ("z1",)),
    ]


_leaves = st.lists(st.integers(0, 5), min_size=1, max_size=5)


def tree(sizes: list[int], branches: list[int] | None = None) -> tuple[Switch, ...]:
    """Leaves of these sizes; with `branches`, the branch of each leaf below a common root."""
    leaves = {f"s{i}": [f"n{i}-{k}" for k in range(size)] for i, size in enumerate(sizes)}
    above: dict[str, list[str]] = {}
    for (_, nodes), branch in zip(leaves.items(), branches or [0] * len(sizes), strict=True):
        above.setdefault(f"t{branch}", []).extend(nodes)
    return forest({**leaves, **above, "u": [n for nodes in leaves.values() for n in nodes]})


@given(_leaves.flatmap(lambda s: st.tuples(st.just(s), st.permutations(range(sum(s))))), st.data())
@settings(deadline=None)
def test_order_is_a_permutation_that_does_not_hang_on_the_order_given(
    drawn: tuple[list[int], list[int]], data: st.DataObject
) -> None:
    sizes, shuffled = drawn
    branches = [data.draw(st.integers(0, 2)) for _ in sizes]
    size = data.draw(st.integers(1, 4))
    switches = tree(sizes, branches)
    nodes = sorted((n for s in switches for n in s.all_nodes), key=natural)
    kept = nodes[: data.draw(st.integers(0, len(nodes)))]
    order = order_nodes(kept, switches, group_nodes=size)
    assert sorted(order) == sorted(kept)
    mixed = [nodes[i] for i in shuffled if nodes[i] in kept]
    assert order_nodes(mixed, switches, group_nodes=size) == order


def whole_groups(order: tuple[str, ...], groups: dict[str, str], size: int) -> int:
    """Groups of `size` nodes side by side in the order that have one value of `groups`."""
    starts = range(0, len(order) - size + 1, size)
    return sum(len({groups[node] for node in order[i : i + size]}) == 1 for i in starts)


@given(_leaves, st.integers(1, 4))
@settings(deadline=None)
def test_as_many_groups_as_can_lie_under_one_lowest_switch(sizes: list[int], size: int) -> None:
    switches = tree(sizes)
    nodes = [n for s in switches for n in s.all_nodes]
    order = order_nodes(nodes, switches, group_nodes=size)
    lowest = lowest_switches(switches)
    assert whole_groups(order, lowest, size) == sum(n // size for n in sizes)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=3).filter(lambda s: 0 < sum(s) <= 6))
@settings(max_examples=15, deadline=None)
def test_no_order_of_few_nodes_does_better(sizes: list[int]) -> None:
    switches = tree(sizes)
    nodes = [n for s in switches for n in s.all_nodes]
    lowest = lowest_switches(switches)
    for size in (2, 3):
        best = max(whole_groups(o, lowest, size) for o in permutations(nodes))
        assert whole_groups(order_nodes(nodes, switches, group_nodes=size), lowest, size) == best


@given(_leaves, st.integers(1, 4), st.data())
@settings(deadline=None)
def test_groups_that_span_leaves_stay_in_one_branch_where_they_can(
    sizes: list[int], size: int, data: st.DataObject
) -> None:
    branches = [data.draw(st.integers(0, 2)) for _ in sizes]
    switches = tree(sizes, branches)
    nodes = [n for s in switches for n in s.all_nodes]
    branch_of = {f"n{i}-{k}": str(branches[i]) for i, n in enumerate(sizes) for k in range(n)}
    in_branch = [sum(n for n, b in zip(sizes, branches, strict=True) if b == t) for t in range(3)]
    order = order_nodes(nodes, switches, group_nodes=size)
    assert whole_groups(order, branch_of, size) == sum(n // size for n in in_branch)


def test_the_checksum_tells_orders_apart() -> None:
    orders = [("a", "b"), ("b", "a"), ("ab",), ("a",), ("a", "b", "c")]
    assert len({digest(order) for order in orders}) == len(orders)
