"""How much is sent on average, in closed form, where a token's experts are drawn evenly.

Drawn are M of G groups, then K experts in them, every choice as likely as any other.
With M = G this is uniform routing. A router that takes its groups by their two highest scores, as
V3's does, spreads a token a little further: the groups it takes are those that have good experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from math import comb
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .traffic import ACROSS, ALL, BACKENDS, INSIDE, Hop, Traffic, places_of

if TYPE_CHECKING:
    from .dispatch.grid import NodeGrid
    from .dispatch.layout import ExpertLayout
    from .traffic_synthetic import Choice

Floats = npt.NDArray[np.float64]


def chance_to_reach(choice: Choice, experts: Collection[int]) -> float:
    """The probability that a token chooses at least one of some experts.

    Of the groups that hold these experts, j are chosen, with a of the experts in them; the token
    misses those with probability C(M S - a, K) / C(M S, K), where S is the size of a group.
    """
    held = Counter(expert // choice.group_size for expert in set(experts))
    # Ways to choose j of the groups that hold some, by (j, a).
    ways = Counter({(0, 0): 1})
    for count in held.values():
        ways += Counter({(j + 1, a + count): number for (j, a), number in ways.items()})
    groups, limit = choice.num_groups, choice.group_limit
    candidates = limit * choice.group_size
    missed = sum(
        number * comb(groups - len(held), limit - j) * comb(candidates - a, choice.top_k)
        for (j, a), number in ways.items()
        if j <= limit
    )
    return 1 - missed / (comb(groups, limit) * comb(candidates, choice.top_k))


def expected_traffic(
    backend: str, choice: Choice, *, num_tokens: int, layout: ExpertLayout, grid: NodeGrid
) -> Traffic:
    """What a backend sends on average; `hops` have fractions of records.

    Args:
        backend: one of BACKENDS.
        choice: how tokens choose.
        num_tokens: T of each rank.
        layout: which expert each slot has; one slot an expert.
        grid: which ranks share a node.

    Raises:
        ValueError: an unknown backend, experts with several slots, or sizes that do not fit.
    """
    if backend not in BACKENDS:
        raise ValueError(f"there is no traffic of {backend!r}; use one of {BACKENDS}")
    if layout.is_redundant:
        raise ValueError(
            "the expected traffic is known in closed form only where each expert has one slot; "
            "count that of a random routing instead"
        )
    if layout.num_experts != choice.num_experts or layout.num_ranks != grid.num_ranks:
        raise ValueError(
            f"the layout has {layout.num_experts} experts on {layout.num_ranks} ranks, but "
            f"{choice.num_experts} are chosen from and the grid has {grid.num_ranks} ranks"
        )
    ranks = grid.num_ranks
    if backend == "flat":
        rows = num_tokens * choice.top_k / ranks  # each rank has as many experts
        return Traffic(
            backend, grid, (Hop(ALL, np.full((ranks, ranks), rows)),), 1, layout.num_slots
        )
    reach_R = np.array([chance_to_reach(choice, layout.experts_of(r)) for r in range(ranks)])
    if backend == "dedup":
        records_RR = np.tile(num_tokens * reach_R, (ranks, 1))
        return Traffic(backend, grid, (Hop(ALL, records_RR),), choice.top_k, layout.num_slots)
    across = num_tokens * _reach_of_nodes(choice, layout, grid)
    return Traffic(
        backend,
        grid,
        (
            Hop(ACROSS, np.where(_same(places_of(grid) % grid.ranks_per_node), across, 0.0)),
            # A relay serves its rail: a rank of each node.
            Hop(
                INSIDE,
                np.where(
                    _same(places_of(grid) // grid.ranks_per_node),
                    grid.num_nodes * num_tokens * reach_R,
                    0.0,
                ),
            ),
        ),
        choice.top_k,
        layout.num_slots,
    )


def expected_nodes(choice: Choice, layout: ExpertLayout, grid: NodeGrid) -> float:
    """The mean number of distinct nodes that a token's experts are on."""
    return float(_reach_of_nodes(choice, layout, grid).sum() / grid.ranks_per_node)


def _reach_of_nodes(choice: Choice, layout: ExpertLayout, grid: NodeGrid) -> Floats:
    """[R], the chance that a token reaches the node of each rank."""
    reach_R = np.empty(grid.num_ranks)
    for row in grid.rows:
        reach_R[list(row)] = chance_to_reach(
            choice, [expert for rank in row for expert in layout.experts_of(rank)]
        )
    return reach_R


def _same(of_R: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """[R, R], whether two ranks have the same number."""
    return of_R[:, None] == of_R
