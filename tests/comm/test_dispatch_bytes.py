"""What a dispatch and a combine send between hosts, counted at the hosts' interfaces.

Ranks are processes in network namespaces (bench/hosts.py), two on each host. What has to cross is
counted token by token from the routing alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from bench.hosts import network, why_not
from tests import cases_dispatch_bytes as cases
from tests.cases_dispatch_bytes import WAYS, Way
from tests.ranks import RankPool

RANKS_PER_HOST = 2
TOP_K = 8
SIZES = cases.Sizes(num_experts=64, tokens=192, hidden=2048)
SPREAD, GATHER = "dispatch(F)", "combine(F)"


class Exchange(NamedTuple):
    """One network's measurement: rows that cross by dispatcher, and bytes by way and operation."""

    rows: dict[str, int]
    link: dict[Way, dict[str, int]]
    sent: dict[Way, dict[str, int]]


@pytest.fixture(scope="module", params=[2, 4], ids=["2 hosts", "4 hosts"])
def exchange(request: pytest.FixtureRequest) -> Exchange:
    reason = why_not()
    if reason is not None:
        pytest.skip(f"no network of hosts here: {reason}")
    world = request.param * RANKS_PER_HOST
    with (
        network(request.param, link_mbit=2000) as hosts,
        RankPool(hosts=[host for host in hosts for _ in range(RANKS_PER_HOST)]) as pool,
    ):
        found: list[dict[Way, dict[str, Any]]] = pool.run(
            cases.exchanged, world=world, ranks_per_host=RANKS_PER_HOST, ways=WAYS, sizes=SIZES
        )

    def total(what: str) -> dict[Way, dict[str, int]]:
        return {
            way: {op: sum(of_rank[way][what][op] for of_rank in found) for op in (SPREAD, GATHER)}
            for way in WAYS
        }

    experts = [cases.routing(rank, SIZES).experts_TK for rank in range(world)]
    rows = cases.crossing_rows(experts, RANKS_PER_HOST, SIZES.num_experts)
    return Exchange(rows, total("link"), total("sent"))


def record_bytes(way: Way, operation: str) -> int:
    """Of one message row: x, and in a dispatch the weights (float32) and slots (int16) as well."""
    row = 2 * SIZES.hidden
    if operation == GATHER:
        return row
    if way.payload == "fp8":
        row = SIZES.hidden + 4 * SIZES.hidden // 128
    choices = 1 if way.name == "flat" else TOP_K
    return -(-(row + choices * (4 + 2)) // 4) * 4  # float32 parts begin at multiples of 4


@pytest.mark.parametrize("operation", [SPREAD, GATHER])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_what_is_said_to_be_sent_is_what_the_routing_needs(
    exchange: Exchange, way: Way, operation: str
) -> None:
    assert exchange.sent[way][operation] == exchange.rows[way.name] * record_bytes(way, operation)


@pytest.mark.parametrize("operation", [SPREAD, GATHER])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_links_carry_what_is_said_to_be_sent(
    exchange: Exchange, way: Way, operation: str
) -> None:
    # Headers and acknowledgements are about 1.2%; counts, barriers and gloo's own words add a few
    # kilobytes.
    said = exchange.sent[way][operation]
    assert said < exchange.link[way][operation] < 1.05 * said


@pytest.mark.parametrize("operation", [SPREAD, GATHER])
def test_two_hops_cross_once_for_each_token_and_node(exchange: Exchange, operation: str) -> None:
    way = Way("two_hop", "exact")
    rows_alone = exchange.rows["two_hop"] * 2 * SIZES.hidden
    assert exchange.link[way][operation] <= 1.05 * rows_alone


@pytest.mark.parametrize("name", ["flat", "dedup", "two_hop"])
def test_fp8_dispatch_sends_little_more_than_half(exchange: Exchange, name: str) -> None:
    fp8, bf16 = Way(name, "fp8"), Way(name, "exact")
    assert exchange.link[fp8][SPREAD] <= 0.55 * exchange.link[bf16][SPREAD]
    assert exchange.sent[fp8][GATHER] == exchange.sent[bf16][GATHER]  # sums travel in bfloat16


def test_each_dispatcher_sends_less_than_the_one_before(exchange: Exchange) -> None:
    flat, dedup, two_hop = (
        exchange.link[Way(name, "exact")][SPREAD] for name in ("flat", "dedup", "two_hop")
    )
    assert flat > dedup > two_hop
    assert flat > 2 * two_hop
