"""A search that changes a packing of experts while the heaviest rank gets lighter. numpy, no torch.

Shapes as in `packing`. `solve` is the whole of it: greedy starts, `improve`, and shakes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .packing import Bools, Floats, Ints, counts, doubles, least_share, loads, pack, replicate

# The fraction by which a swap must lower the heaviest load, and a change of copies: steps too small
# to matter would keep the search going for long.
SWAP_GAIN, COPY_GAIN = 1e-6, 1e-4
# Shaking stops where the heaviest rank is this close to the lower bound: statistics of past load
# foretell the next step's no better.
_CLOSE = 1e-3
_SHAKES, _AT_ONCE = 8, 4
# Numbers in the largest array, so that memory stays at about 200 MB.
_MOST_CANDIDATES = 1 << 22


def solve(load_XE: Floats, num_slots: int, num_ranks: int) -> Ints:
    """Copies and places for X problems: the expert in each slot, [X, R, P].

    The heaviest rank is never heavier than from `replicate` without a limit and `pack`, the plain
    greedy way, since that is one of the starts. A problem's result does not depend on the others.
    """
    # What `reassign_best` looks at: C * p * R, and p * R = S.
    num_redundant = min(num_slots, 2 * (num_slots - load_XE.shape[1]))
    step = max(1, _MOST_CANDIDATES // (_AT_ONCE * max(num_redundant, 1) * num_slots))
    parts = [
        _solve(load_XE[first : first + step], num_slots, num_ranks)
        for first in range(0, len(load_XE), step)
    ]
    return np.concatenate(parts)


def least_peak(load_XE: Floats, num_slots: int, num_ranks: int) -> Floats:
    """A lower bound for the load of the heaviest rank, [X]: the mean, or the highest share.

    An expert has no use for more copies than there are ranks.
    """
    mean_X = load_XE.sum(axis=1) / num_ranks
    return np.maximum(mean_X, least_share(load_XE, num_slots, num_ranks))


def _solve(load_XE: Floats, num_slots: int, num_ranks: int) -> Ints:
    every_X = np.arange(len(load_XE))
    plain_XRP = pack(load_XE, replicate(load_XE, num_slots), num_ranks, apart=False)
    apart_XRP = pack(load_XE, replicate(load_XE, num_slots, num_ranks), num_ranks, apart=True)
    bound_X = least_peak(load_XE, num_slots, num_ranks)
    plain_peak_X = loads(load_XE, plain_XRP).max(axis=1)
    best = _Best(
        load_XE, improve(load_XE, plain_XRP), np.minimum(bound_X * (1 + _CLOSE), plain_peak_X)
    )
    best.offer(improve(load_XE, apart_XRP), every_X)
    random = np.random.default_rng(0)  # the same draws for every problem: results repeat
    for _ in range(_SHAKES):
        draws = random.random((_AT_ONCE, 5))
        live_X = best.unfinished()
        if not live_X.size:
            break
        live_load_XE = np.tile(load_XE[live_X], (_AT_ONCE, 1))
        shaken = [_shake(load_XE[live_X], best.slots_XRP[live_X], draw) for draw in draws]
        found_XRP = improve(live_load_XE, np.concatenate(shaken))
        for offer_XRP in np.split(found_XRP, _AT_ONCE):
            best.offer(offer_XRP, live_X)
    return best.slots_XRP


class _Best:
    """The best packing of each problem so far: the lightest peak, then the fewest doubles.

    Peaks up to enough_X count as the same.
    """

    def __init__(self, load_XE: Floats, slots_XRP: Ints, enough_X: Floats) -> None:
        self._load_XE, self._enough_X = load_XE, enough_X
        self.slots_XRP = slots_XRP.copy()
        self._peak_X = loads(load_XE, slots_XRP).max(axis=1)
        self._doubles_X = doubles(slots_XRP)

    def offer(self, slots_XRP: Ints, which_X: Ints) -> None:
        """Take the packings, one for each problem of `which_X`, where they are better."""
        peak_X = loads(self._load_XE[which_X], slots_XRP).max(axis=1)
        doubles_X = doubles(slots_XRP)
        new_X = np.maximum(peak_X, self._enough_X[which_X])
        old_X = np.maximum(self._peak_X, self._enough_X)[which_X]
        fewer_X = doubles_X < self._doubles_X[which_X]
        better_X = (new_X < old_X) | (new_X == old_X) & fewer_X
        taken_X = which_X[better_X]
        self.slots_XRP[taken_X] = slots_XRP[better_X]
        self._peak_X[taken_X] = peak_X[better_X]
        self._doubles_X[taken_X] = doubles_X[better_X]

    def unfinished(self) -> Ints:
        """The problems whose peak is above enough_X."""
        return np.flatnonzero(self._peak_X > self._enough_X)


def _shake(load_XE: Floats, slots_XRP: Ints, draw: Floats) -> Ints:
    """Packings beside these, to search on from, [X, R, P].

    A redundant slot, if there is one, goes to the expert of another slot, half of the time one of
    the heaviest rank; and half of the time a slot of the heaviest rank and some other swap.

    Args:
        draw: 5 numbers in [0, 1), which say which.
    """
    num_problems, num_ranks, per_rank = slots_XRP.shape
    every, num_slots = np.arange(num_problems), num_ranks * per_rank
    slots_XS = slots_XRP.reshape(num_problems, num_slots).copy()
    heavy_X = loads(load_XE, slots_XRP).argmax(axis=1)
    spare_XS = np.take_along_axis(counts(slots_XS, load_XE.shape[1]), slots_XS, 1) > 1
    spare_first_XS = np.argsort(~spare_XS, axis=1, kind="stable")
    slot_X = spare_first_XS[every, (draw[0] * spare_XS.sum(axis=1)).astype(np.int64)]
    away = 0 if draw[1] < 0.5 else int(2 * (draw[1] - 0.5) * num_ranks)
    model_X = (heavy_X + away) % num_ranks * per_rank + int(draw[2] * per_rank)
    expert_X = slots_XS[every, model_X]
    has_X = spare_XS[every, slot_X]
    slots_XS[every[has_X], slot_X[has_X]] = expert_X[has_X]
    if draw[3] < 0.5:
        one_X = heavy_X * per_rank + int(2 * draw[3] * per_rank)
        other_X = np.full(num_problems, int(draw[4] * num_slots))
        both = slots_XS[every, one_X], slots_XS[every, other_X]
        slots_XS[every, other_X], slots_XS[every, one_X] = both
    return slots_XS.reshape(slots_XRP.shape)


def improve(load_XE: Floats, slots_XRP: Ints) -> Ints:
    """Change a packing while that makes the heaviest rank lighter: [X, R, P].

    Two kinds of change: a copy of the heaviest rank and one of another rank swap places; or a slot
    of an expert with several copies becomes one more copy of an expert of the heaviest rank. Of
    each the best is taken, and only if every rank it touches ends up lighter than the heaviest was;
    so the sorted loads fall and the search ends. No change puts two copies of an expert on a rank.
    The number of changes is limited to that of the slots.
    """
    slots_XRP = slots_XRP.copy()
    live_X = np.arange(len(slots_XRP))
    for _ in range(slots_XRP[0].size):
        state = Packings.of(load_XE[live_X], slots_XRP[live_X])
        done_X = swap_best(state)
        stuck_X = np.flatnonzero(~done_X)
        if stuck_X.size:
            stuck = state.only(stuck_X)
            done_X[stuck_X] = reassign_best(stuck)
            state.slots_XRP[stuck_X] = stuck.slots_XRP
        slots_XRP[live_X] = state.slots_XRP
        live_X = live_X[done_X]
        if not live_X.size:
            break
    return slots_XRP


@dataclass
class Packings:
    """Packings and what the search reads of them.

    Attributes:
        copies_XRE: copies of each expert on each rank.
        heavy_X: the heaviest rank of each problem; peak_X is its load.
    """

    load_XE: Floats
    slots_XRP: Ints
    copies_XRE: Ints
    count_XE: Ints
    share_XE: Floats
    load_XR: Floats
    heavy_X: Ints
    peak_X: Floats

    @classmethod
    def of(cls, load_XE: Floats, slots_XRP: Ints) -> Packings:
        num_problems, num_ranks, _ = slots_XRP.shape
        num_experts = load_XE.shape[1]
        of_rank = slots_XRP.reshape(num_problems * num_ranks, -1)
        copies_XRE = counts(of_rank, num_experts).reshape(num_problems, num_ranks, num_experts)
        count_XE = copies_XRE.sum(axis=1)
        share_XE = load_XE / count_XE
        load_XR = np.take_along_axis(share_XE[:, None], slots_XRP, axis=2).sum(axis=2)
        heavy_X, peak_X = load_XR.argmax(axis=1), load_XR.max(axis=1)
        return cls(
            load_XE, slots_XRP, copies_XRE, count_XE, share_XE, load_XR, heavy_X, peak_X
        )  # fmt: skip

    def only(self, which: Ints) -> Packings:
        return Packings(
            self.load_XE[which], self.slots_XRP[which], self.copies_XRE[which],
            self.count_XE[which], self.share_XE[which], self.load_XR[which],
            self.heavy_X[which], self.peak_X[which],
        )  # fmt: skip


def swap_best(state: Packings) -> Bools:
    """Do the best swap of a copy of the heaviest rank; whether there was one, [X].

    A swap takes `less` from the heaviest rank, the difference of the two shares, and gives it to
    the other rank. The best one leaves the heavier of these two lightest. Neither rank may have
    the expert that it gets.

    Axes of the candidates: p is the slot of the heaviest rank, (R, P) the other slot.
    """
    slots_XRP, num_problems = state.slots_XRP, len(state.slots_XRP)
    _, num_ranks, per_rank = slots_XRP.shape
    every = np.arange(num_problems)
    mine_Xp = slots_XRP[every, state.heavy_X]
    share_XRP = np.take_along_axis(state.share_XE[:, None], slots_XRP, axis=2)
    less_XpRP = (
        np.take_along_axis(state.share_XE, mine_Xp, 1)[:, :, None, None] - share_XRP[:, None]
    )
    peak_XpRP = np.maximum(
        state.peak_X[:, None, None, None] - less_XpRP, state.load_XR[:, None, :, None] + less_XpRP
    )
    there_XpR = state.copies_XRE[every[:, None], :, mine_Xp] > 0
    here_XRP = state.copies_XRE[every, state.heavy_X][every[:, None, None], slots_XRP] > 0
    peak_XpRP[there_XpR] = np.inf
    peak_XpRP[np.broadcast_to(here_XRP[:, None], peak_XpRP.shape)] = np.inf
    best_X = peak_XpRP.reshape(num_problems, -1).argmin(axis=1)
    p_X, rank_X, slot_X = np.unravel_index(best_X, (per_rank, num_ranks, per_rank))
    done_X = peak_XpRP[every, p_X, rank_X, slot_X] < state.peak_X * (1 - SWAP_GAIN)
    x, p, rank, slot = every[done_X], p_X[done_X], rank_X[done_X], slot_X[done_X]
    slots_XRP[x, state.heavy_X[x], p] = slots_XRP[x, rank, slot]
    slots_XRP[x, rank, slot] = mine_Xp[x, p]
    return done_X


def reassign_best(state: Packings) -> Bools:
    """Give the best redundant slot to an expert of the heaviest rank; whether there was one, [X].

    The slot is on rank r; its expert `old` loses a copy, so that its others grow, and `new` gains
    one, so that all of its shrink. Then rank R has

        load[R] + copies[R, old] * rise[old] + copies[R, new] * fall[new]

    and rank r, besides, the shrunk copy of `new` for the grown one of `old` (`own`). The best
    change leaves the heaviest of the ranks that it touches lightest. Rank r may not have `new`.

    Axes of the candidates: C redundant slots, p the heaviest rank's slots, one of which has `new`.
    """
    slots_XRP, num_problems = state.slots_XRP, len(state.slots_XRP)
    num_ranks, per_rank = slots_XRP.shape[1:]
    every = np.arange(num_problems)
    slots_XS = slots_XRP.reshape(num_problems, -1)
    spare_XS = np.take_along_axis(state.count_XE, slots_XS, 1) > 1
    num_spare = int(spare_XS.sum(axis=1).max())
    if not num_spare:
        return np.zeros(num_problems, dtype=bool)
    spot_XC = np.argsort(~spare_XS, axis=1, kind="stable")[:, :num_spare]
    rank_XC = spot_XC // per_rank
    old_XC = np.take_along_axis(slots_XS, spot_XC, 1)
    new_Xp = slots_XRP[every, state.heavy_X]

    # The slots beyond a problem's own redundant ones have one copy only; they are ruled out below.
    grown_XE = state.load_XE / np.maximum(state.count_XE - 1, 1)
    shrunk_XE = state.load_XE / (state.count_XE + 1)
    rise_XC = np.take_along_axis(grown_XE - state.share_XE, old_XC, 1)
    fall_Xp = np.take_along_axis(shrunk_XE - state.share_XE, new_Xp, 1)
    olds_XCR = state.copies_XRE[every[:, None], :, old_XC]
    news_XpR = state.copies_XRE[every[:, None], :, new_Xp]
    own_XCp = (
        np.take_along_axis(shrunk_XE, new_Xp, 1)[:, None]
        - np.take_along_axis(grown_XE, old_XC, 1)[:, :, None]
    )
    load_XCR = state.load_XR[:, None] + olds_XCR * rise_XC[:, :, None]
    load_XCpR = load_XCR[:, :, None] + (news_XpR * fall_Xp[:, :, None])[:, None]
    c = np.arange(num_spare)
    load_XCpR[every[:, None], c, :, rank_XC] += own_XCp
    touched_XCpR = (olds_XCR > 0)[:, :, None] | (news_XpR > 0)[:, None]
    touched_XCpR[every[:, None], c, :, rank_XC] = True
    peak_XCp = np.where(touched_XCpR, load_XCpR, -np.inf).max(axis=3)
    # Not where the rank has the expert already; that rules out old = new as well.
    has_XCp = state.copies_XRE[every[:, None, None], rank_XC[:, :, None], new_Xp[:, None]] > 0
    peak_XCp[has_XCp | ~np.take_along_axis(spare_XS, spot_XC, 1)[:, :, None]] = np.inf
    best_X = peak_XCp.reshape(num_problems, -1).argmin(axis=1)
    c_X, p_X = np.unravel_index(best_X, (num_spare, per_rank))
    done_X = peak_XCp[every, c_X, p_X] < state.peak_X * (1 - COPY_GAIN)
    x = every[done_X]
    slots_XS[x, spot_XC[x, c_X[x]]] = new_Xp[x, p_X[x]]
    state.slots_XRP = slots_XS.reshape(num_problems, num_ranks, per_rank)
    return done_X
