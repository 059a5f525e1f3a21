"""Greedy starts for packing copies of experts onto ranks. numpy, no torch.

Many problems of one size are solved side by side, because each is small and Python is slow.
Shapes: X problems, E experts, R ranks, P slots a rank, S = R * P slots.

A copy's share is its expert's load over the number of its copies, since tokens are dealt out among
them in turn.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def replicate(load_XE: Floats, num_slots: int, most_copies: int | None = None) -> Ints:
    """The expert of each of S copies, [X, S]: one of each expert, then more of the heaviest.

    Each further copy goes to the expert with the highest share, which makes the highest share as
    low as can be.

    Args:
        most_copies: an expert gets no more than this, and among equal shares the expert with the
            fewest copies comes first. None: no limit, the lowest expert first.
    """
    num_problems, num_experts = load_XE.shape
    if most_copies is not None:  # room for all the slots comes before the limit
        most_copies = max(most_copies, -(-num_slots // num_experts))
    every = np.arange(num_problems)
    expert_XS = np.empty((num_problems, num_slots), dtype=np.int64)
    expert_XS[:, :num_experts] = np.arange(num_experts)
    count_XE = np.ones(load_XE.shape, dtype=np.int64)
    for slot in range(num_experts, num_slots):
        share_XE = load_XE / count_XE
        if most_copies is not None:
            share_XE[count_XE >= most_copies] = -1.0
            top_XE = share_XE == share_XE.max(axis=1, keepdims=True)
            chosen_X = np.where(top_XE, count_XE, num_slots + 1).argmin(axis=1)
        else:
            chosen_X = share_XE.argmax(axis=1)
        expert_XS[:, slot] = chosen_X
        count_XE[every, chosen_X] += 1
    return expert_XS


def pack(load_XE: Floats, expert_XS: Ints, num_ranks: int, *, apart: bool) -> Ints:
    """Deal copies out to ranks, the heaviest first, each to the lightest rank with a free slot.

    Args:
        expert_XS: the expert of each copy, as from `replicate`.
        apart: prefer ranks that have no copy of the same expert yet.

    Returns:
        The expert in each slot, [X, R, P].
    """
    num_problems, num_slots = expert_XS.shape
    per_rank = num_slots // num_ranks
    every = np.arange(num_problems)
    share_XS = np.take_along_axis(load_XE / counts(expert_XS, load_XE.shape[1]), expert_XS, 1)
    order_XS = np.argsort(-share_XS, axis=1, kind="stable")
    slots_XRP = np.empty((num_problems, num_ranks, per_rank), dtype=np.int64)
    load_XR = np.zeros((num_problems, num_ranks))
    filled_XR = np.zeros((num_problems, num_ranks), dtype=np.int64)
    has_XRE = np.zeros((num_problems, num_ranks, load_XE.shape[1]), dtype=bool)
    for copy_X in order_XS.T:
        expert_X = expert_XS[every, copy_X]
        free_XR = filled_XR < per_rank
        if apart:
            better_XR = free_XR & ~has_XRE[every, :, expert_X]
            free_XR = np.where(better_XR.any(axis=1, keepdims=True), better_XR, free_XR)
        rank_X = np.where(free_XR, load_XR, np.inf).argmin(axis=1)
        slots_XRP[every, rank_X, filled_XR[every, rank_X]] = expert_X
        has_XRE[every, rank_X, expert_X] = True
        load_XR[every, rank_X] += share_XS[every, copy_X]
        filled_XR[every, rank_X] += 1
    return slots_XRP


def loads(load_XE: Floats, slots_XRP: Ints) -> Floats:
    """The load of each rank, [X, R]."""
    num_problems, num_ranks, _ = slots_XRP.shape
    expert_XS = slots_XRP.reshape(num_problems, -1)
    share_XE = load_XE / counts(expert_XS, load_XE.shape[1])
    share_XS = np.take_along_axis(share_XE, expert_XS, 1)
    return share_XS.reshape(num_problems, num_ranks, -1).sum(axis=2)


def least_share(load_XE: Floats, num_slots: int, most_copies: int) -> Floats:
    """The highest share there must be with so many slots, and no more copies of an expert, [X]."""
    num_slots = min(num_slots, most_copies * load_XE.shape[1])
    expert_XS = replicate(load_XE, num_slots, most_copies)
    return (load_XE / counts(expert_XS, load_XE.shape[1])).max(axis=1)


def doubles(slots_XRP: Ints) -> Ints:
    """How many slots of each problem repeat an expert of their rank, [X]."""
    sorted_XRP = np.sort(slots_XRP, axis=2)
    return (sorted_XRP[:, :, 1:] == sorted_XRP[:, :, :-1]).sum(axis=(1, 2))


def counts(expert_XS: Ints, num_experts: int) -> Ints:
    """How often each expert occurs, [X, E]."""
    num_problems = len(expert_XS)
    flat = expert_XS + np.arange(num_problems)[:, None] * num_experts
    counts = np.bincount(flat.reshape(-1), minlength=num_problems * num_experts)
    return counts.reshape(num_problems, num_experts)
