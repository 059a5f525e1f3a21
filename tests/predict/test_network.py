"""Sizes of fat trees, as published and as a graph counted link by link."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.predict.network import Network


@pytest.mark.parametrize(
    ("network", "endpoints", "switches", "links"),
    [
        (Network(tiers=2, ports=64), 2_048, 96, 2_048),
        (Network(tiers=2, ports=64, planes=8), 16_384, 768, 16_384),
        (Network(tiers=3, ports=64), 65_536, 5_120, 131_072),
    ],
    ids=["FT2", "MPFT", "FT3"],
)
def test_networks_have_the_published_sizes(
    network: Network, endpoints: int, switches: int, links: int
) -> None:
    """arXiv 2505.09343, table 3."""
    assert (network.endpoints, network.switches, network.links) == (endpoints, switches, links)


even = st.integers(1, 100).map(lambda half: 2 * half)


@settings(deadline=None)
@given(even)
def test_sizes_are_the_textbook_functions_of_the_ports(ports: int) -> None:
    two, three = Network(2, ports), Network(3, ports)
    assert (two.endpoints, two.switches) == (ports**2 // 2, 3 * ports // 2)
    assert (three.endpoints, three.switches) == (ports**3 // 4, 5 * ports**2 // 4)


@settings(deadline=None)
@given(st.integers(1, 5), even, st.integers(1, 8))
def test_every_port_has_a_cable(tiers: int, ports: int, planes: int) -> None:
    network = Network(tiers, ports, planes)
    # A link between switches takes a port at each end, an endpoint one.
    assert network.switches * ports == 2 * network.links + network.endpoints


@pytest.mark.parametrize(
    ("network", "nodes", "per_leaf"),
    [
        (Network(2, 64, planes=8), 2_048, 32),  # a card of each node on each plane
        (Network(2, 64, planes=4), 1_024, 16),  # two cards on each, under the same leaf
        (Network(2, 64, planes=4, rails=True), 1_024, 32),
        (Network(2, 64, rails=True), 256, 32),
        (Network(2, 64), 256, 4),
        (Network(1, 64), 8, 8),  # one switch, which has no ports upward
        (Network(1, 64, rails=True), 8, 8),
        (Network(1, 64, planes=8), 64, 64),
    ],
)
def test_nodes_are_near_by_how_their_eight_cards_are_spread(
    network: Network, nodes: int, per_leaf: int
) -> None:
    assert (network.nodes(8), network.nodes_per_leaf(8)) == (nodes, per_leaf)


@pytest.mark.parametrize(
    ("tiers", "ports", "planes", "hint"),
    [(0, 64, 1, "1 or more tiers"), (2, 64, 0, "1 or more"), (2, 33, 1, "even"), (2, 0, 1, "even")],
)
def test_networks_that_cannot_be_are_refused(
    tiers: int, ports: int, planes: int, hint: str
) -> None:
    with pytest.raises(ValueError, match=hint):
        Network(tiers, ports, planes)
