"""Over how many nodes and ranks a token's experts spread, and what is sent because of that.

`comm.traffic_expected` has this in closed form where groups are drawn evenly. A router that takes
the groups with good experts, as V3's, has its experts in more of the groups that it may take: with
8 experts in 4 of 8 groups, 3.97 groups and not 3.63. That has no closed form and is counted, by
tokens whose scores are random.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import ceil
from typing import NamedTuple

from ..comm.dispatch.grid import NodeGrid
from ..comm.dispatch.layout import ExpertLayout
from ..comm.traffic import Hop, Traffic, route
from ..comm.traffic_expected import chance_to_reach, expected_nodes, expected_traffic
from ..comm.traffic_synthetic import Choice, random_routing
from ..model import ModelConfig

_TOKENS = 8192  # tell the mean to half a per cent


def choice_of(model: ModelConfig) -> Choice:
    """How a model's tokens choose experts, all of them equally popular."""
    grouped = model.topk_method != "greedy"
    return Choice(
        model.n_routed_experts,
        model.num_experts_per_tok,
        model.n_group if grouped else 1,
        model.topk_group if grouped else 1,
    )


class Reach(NamedTuple):
    """How many nodes and ranks of its expert group a token goes to on average, its own included."""

    nodes: float
    ranks: float


@lru_cache(maxsize=1024)
def reach(choice: Choice, layout: ExpertLayout, grid: NodeGrid) -> Reach:
    """Where tokens go that have no favourites among experts.

    Args:
        choice: how they choose; groups by the sum of their two highest scores.
        layout: which expert each slot has; one slot an expert.
        grid: which ranks share a node.
    """
    if choice.group_limit == choice.num_groups:
        return _drawn_evenly(choice, layout, grid)
    tokens = ceil(_TOKENS / grid.num_ranks)
    experts = random_routing(choice, num_ranks=grid.num_ranks, num_tokens=tokens)
    routes = route(experts, layout, grid)
    return Reach(float(routes.nodes_per_token.mean()), float(routes.ranks_per_token.mean()))


def mean_traffic(
    backend: str, choice: Choice, *, num_tokens: int, layout: ExpertLayout, grid: NodeGrid
) -> Traffic:
    """What a backend sends on average: as where groups are drawn evenly, but as many records.

    Args and errors: as of `comm.traffic_expected.expected_traffic`.
    """
    traffic = expected_traffic(backend, choice, num_tokens=num_tokens, layout=layout, grid=grid)
    found, evenly = reach(choice, layout, grid), _drawn_evenly(choice, layout, grid)
    more = {
        "flat": (1.0,),
        "dedup": (found.ranks / evenly.ranks,),
        "two_hop": (found.nodes / evenly.nodes, found.ranks / evenly.ranks),
    }[backend]
    hops = tuple(
        Hop(hop.name, hop.records_RR * factor)
        for hop, factor in zip(traffic.hops, more, strict=True)
    )
    return replace(traffic, hops=hops)


def _drawn_evenly(choice: Choice, layout: ExpertLayout, grid: NodeGrid) -> Reach:
    return Reach(
        expected_nodes(choice, layout, grid),
        sum(chance_to_reach(choice, layout.experts_of(rank)) for rank in range(grid.num_ranks)),
    )
