"""What chance does to routing: how rows of ranks vary, and which ranks a token reaches.

Shapes: R ranks of an expert group, E experts.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from ..comm.dispatch.layout import ExpertLayout
from ..comm.traffic_expected import chance_to_reach
from ..comm.traffic_synthetic import Choice
from .loads import Floats


@lru_cache(maxsize=64)
def shares_of(experts: ExpertLayout) -> Floats:
    """[R, E], the share of each expert's rows that each rank gets: copies take turns."""
    shares = np.zeros((experts.num_ranks, experts.num_experts))
    for expert, slots in enumerate(experts.copies):
        for slot in slots:
            shares[experts.rank_of(slot), expert] += 1 / len(slots)
    return shares


@lru_cache(maxsize=64)
def root_of_covariance(choice: Choice, experts: ExpertLayout) -> Floats:
    """[R, R], a root of the covariance of one token's rows on the ranks."""
    size = choice.num_experts
    chosen = choice.top_k / size
    candidates = choice.group_limit * choice.group_size
    both = choice.top_k * (choice.top_k - 1) / max(candidates * (candidates - 1), 1)
    group = choice.group_limit / choice.num_groups
    other = group * (choice.group_limit - 1) / max(choice.num_groups - 1, 1)
    of = np.arange(size) // choice.group_size
    covariance = np.where(of[:, None] == of, group * both, other * both) - chosen**2
    np.fill_diagonal(covariance, chosen * (1 - chosen))
    shares = shares_of(experts)
    values, vectors = np.linalg.eigh(shares @ covariance @ shares.T)
    return vectors * np.sqrt(np.maximum(values, 0.0))  # 0 is there: the sum is no chance


@lru_cache(maxsize=256)
def mean_chance(choice: Choice, experts: ExpertLayout, ranks: int) -> float:
    """That a token reaches the experts of so many neighbouring ranks; the mean over such runs."""
    runs = range(0, experts.num_ranks, ranks)
    held = ([e for r in range(run, run + ranks) for e in experts.experts_of(r)] for run in runs)
    return sum(chance_to_reach(choice, some) for some in held) / len(runs)


def reached(popular: Floats, chance: float) -> Floats:
    """Tokens that reach a part of popularity p, over those that reach one of popularity 1."""
    return (1 - (1 - chance) ** popular) / chance
