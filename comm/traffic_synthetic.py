"""Made-up routings for studies. None of them comes from a model. No torch.

Shapes: R ranks, T tokens of a rank, K experts a token, E experts, G groups, M groups a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

# Scores that are held at once: small enough for caches, large enough that Python does not count.
_BLOCK = 1 << 20
# Popularity then spans more than a float32 sigmoid tells apart; far beyond, it overflows.
MOST_SKEW = 10.0


@dataclass(frozen=True)
class Choice:
    """How a router chooses: the K best experts of the M best groups (arXiv 2412.19437, 2.1.2).

    Attributes:
        num_experts: E; group g has experts g * E / G and those after it.
        top_k: K.
        num_groups: G, in V3 one a node.
        group_limit: M; equal to G for no limit.

    Raises:
        ValueError: sizes that do not fit together.
    """

    num_experts: int
    top_k: int
    num_groups: int = 1
    group_limit: int = 1

    def __post_init__(self) -> None:
        experts, groups, limit = self.num_experts, self.num_groups, self.group_limit
        if min(experts, self.top_k, groups, limit) < 1:
            raise ValueError(
                f"experts, top-k, groups and their limit must be from 1 up, got {self}"
            )
        if experts % groups:
            raise ValueError(f"{experts} experts do not divide among {groups} groups")
        if limit > groups:
            raise ValueError(
                f"a token cannot go to {limit} groups of {groups}; {groups} is no limit"
            )
        if self.top_k > limit * self.group_size:
            raise ValueError(
                f"{limit} of {groups} groups have {limit * self.group_size} experts, too few for "
                f"{self.top_k} a token; use fewer, or allow more groups"
            )

    @property
    def group_size(self) -> int:
        """Experts of a group."""
        return self.num_experts // self.num_groups


def random_routing(
    choice: Choice, *, num_ranks: int, num_tokens: int, skew: float = 0.0, seed: int = 0
) -> Ints:
    """What V3's router does with logits that are random numbers.

    A token's logit for an expert is a standard normal number of its own, plus one that all tokens
    share for that expert, `skew` times a standard normal number. Affinities are their sigmoids, a
    group's score is the sum of its two highest, as in `model.router`.

    Args:
        choice: how experts are chosen.
        num_ranks, num_tokens: R; T of each rank.
        skew: 0: all experts are equally popular; 1: popularity varies as much as tokens do; at most
            MOST_SKEW.
        seed: equal seeds give equal routings; a rank's tokens do not depend on how many ranks
            there are.

    Returns:
        [R, T, K], in no particular order within a token.

    Raises:
        ValueError: a skew beyond its limits.
    """
    if not 0 <= skew <= MOST_SKEW:
        raise ValueError(f"skew must be from 0 to {MOST_SKEW:g}, got {skew:g}")
    popularity_E = np.random.default_rng([seed, 1]).standard_normal(choice.num_experts) * skew
    experts = np.empty((num_ranks, num_tokens, choice.top_k), dtype=np.int64)
    block = max(1, _BLOCK // choice.num_experts)
    for rank in range(num_ranks):
        rng = np.random.default_rng([seed, 0, rank])
        for start in range(0, num_tokens, block):
            chosen_TK = experts[rank, start : start + block]
            logits_TE = rng.standard_normal(
                (len(chosen_TK), choice.num_experts), dtype=np.float32
            ) + popularity_E.astype(np.float32)
            chosen_TK[:] = select(1 / (1 + np.exp(-logits_TE)), choice)
    return experts


def balanced_routing(choice: Choice, *, num_ranks: int, num_tokens: int) -> Ints:
    """Every token goes to M groups and to K / M experts in each, far apart; all take turns.

    Where the number of all tokens is a multiple of E, so that turns come out even, all experts have
    the same load; otherwise loads differ by K at most.

    Returns:
        [R, T, K].

    Raises:
        ValueError: K is no multiple of M.
    """
    each, rest = divmod(choice.top_k, choice.group_limit)
    if rest:
        raise ValueError(
            f"a balanced routing needs top-k to be a multiple of the groups a token, got "
            f"{choice.top_k} and {choice.group_limit}"
        )
    token_T = np.arange(num_ranks * num_tokens)[:, None, None]
    group_TM = (token_T + np.arange(choice.group_limit)[:, None]) % choice.num_groups
    apart = np.arange(each) * (choice.group_size // each)
    inside_Tk = (token_T // choice.num_groups + apart) % choice.group_size
    experts = group_TM * choice.group_size + inside_Tk
    return experts.reshape(num_ranks, num_tokens, choice.top_k)


def hot_routing(choice: Choice, *, num_ranks: int, num_tokens: int) -> Ints:
    """Every token chooses experts 0..K-1: as uneven as can be.

    Returns:
        [R, T, K].
    """
    return np.broadcast_to(np.arange(choice.top_k), (num_ranks, num_tokens, choice.top_k)).copy()


def select(scores_TE: npt.NDArray[Any], choice: Choice) -> Ints:
    """[T, K]: the K best experts of the M best groups; a group's score is its two highest's sum."""
    groups, limit, size = choice.num_groups, choice.group_limit, choice.group_size
    if limit == groups:
        return _best(scores_TE, choice.top_k)
    scores_TGe = scores_TE.reshape(-1, groups, size)
    pair = min(2, size)
    group_TG = np.partition(scores_TGe, size - pair, axis=2)[:, :, size - pair :].sum(axis=2)
    kept_TM = _best(group_TG, limit)
    kept_TMe = np.take_along_axis(scores_TGe, kept_TM[:, :, None], axis=1)
    best_TK = _best(kept_TMe.reshape(len(scores_TE), -1), choice.top_k)
    return np.take_along_axis(kept_TM, best_TK // size, axis=1) * size + best_TK % size


def _best(values_TX: npt.NDArray[Any], count: int) -> Ints:
    """Indices of the `count` highest of each row."""
    last = values_TX.shape[1] - count
    return np.argpartition(values_TX, last, axis=1)[:, last:] if last else _all(values_TX)


def _all(values_TX: npt.NDArray[Any]) -> Ints:
    return np.broadcast_to(np.arange(values_TX.shape[1]), values_TX.shape)
