"""ZB-1p and ZB-2p: zero-bubble schedules found by search under a memory limit."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from ..clock import run
from ..greedy import Built
from ..lanes import ROUNDING, Lanes, lay_out
from ..placement import Placement
from ..schedule import Schedule
from ..times import Times
from ..tuning import Tuner, as_1f1b, shared
from .sizes import require_counts
from .zb_h1 import zb_h1

# Constructions: as many as gain anything, fewer where each places many actions.
_MOST, _FEWEST, _ACTIONS = 150, 12, 1_300_000

# What W still holds of a chunk after I, as the paper counts: 32h of (34h + 5as) for a layer, here
# with sequences of s = 1024 and heads of h/a = 128, as in most of its models.
_HELD_FOR_W = 32 / (34 + 5 * 1024 / 128)


def zb_1p(
    ranks: int, microbatches: int, *, times: Times | None = None, pending: float = 1.0
) -> Schedule:
    """ZB-1p: searched with the memory of 1F1B, P chunks a rank.

    From Qi et al., "Zero Bubble Pipeline Parallelism" (arXiv 2401.10241, sections 3 and 4): stage
    r on rank r, backwards split, and W where it fills gaps. What is made small is not the makespan
    but the longest time that any rank takes from its first start to its end: steps follow each
    other without a barrier there. It is never worse than ZB-H1 and, as in the paper, hardly better:
    with F = I = W the excess over a rank's own work is (P-1)F where there are P micro-batches or
    more. At most P chunks are alive on a rank, each counted until its W has ended.

    Args:
        ranks: pipeline ranks, which are the stages too; from 1 up.
        microbatches: micro-batches a step; from 1 up.
        times: of the stages; F = I = W and no time for messages if not given.
        pending: share of a chunk's memory that is held between its I and its W.

    Raises:
        ValueError: a size is not possible, or the times are of another number of stages.
    """
    return _searched("zb-1p", ranks, microbatches, times, ranks, pending)


def zb_2p(
    ranks: int,
    microbatches: int,
    *,
    times: Times | None = None,
    pending: float | None = None,
) -> Schedule:
    """ZB-2p: searched with twice the memory of 1F1B, 2P chunks a rank.

    As `zb_1p` otherwise, and with the limit in whole chunks as long as that costs no time; else it
    is one in the paper's count, in which a chunk of which only W is left weighs 16/37: then more
    than 2P chunks can be alive on a rank (`peak_chunks`). With F = I = W no rank idles between its
    first start and its end, given 2P micro-batches or more.

    The last rank must still owe about (P-1)(F + I + 2 send)/W + 1 weight halves when its last I
    ends, or rank 0 waits for it. Where that is more than 2P, what the paper prints can only be
    reached by counting as it does. Such a schedule is taken only if it is better than that with
    whole chunks; `pending=1` never takes one.

    Args:
        ranks: pipeline ranks, which are the stages too; from 1 up.
        microbatches: micro-batches a step; from 1 up.
        times: of the stages; F = I = W and no time for messages if not given.
        pending: share of a chunk's memory that is held between its I and its W; if not given, 1,
            or 16/37 where that gives the better schedule: the paper's 32h of 34h + 5as with
            sequences of 1024 and heads of 128.

    Raises:
        ValueError: a size is not possible, or the times are of another number of stages.
    """
    return _searched("zb-2p", ranks, microbatches, times, 2 * ranks, pending)


def _searched(
    name: str,
    ranks: int,
    microbatches: int,
    times: Times | None,
    limit: int,
    pending: float | None,
) -> Schedule:
    require_counts(name, ranks=ranks, microbatches=microbatches)
    if times is None:
        times = Times.uniform(ranks)
    if times.num_stages != ranks:
        raise ValueError(
            f"{name}: times of {times.num_stages} stages, but there is one stage a rank and "
            f"ranks={ranks}"
        )
    if pending is not None and not 0 <= pending <= 1:
        raise ValueError(f"{name}: pending={pending!r} must be a share of a chunk, from 0 to 1")
    placement = Placement((tuple(range(ranks)),), (0,) * microbatches)
    whole = lay_out(placement, times, limit=limit, pairs=False)
    constructions = max(_FEWEST, min(_MOST, _ACTIONS // whole.num_actions))
    best = None
    if pending is not None:
        best = _tune(replace(whole, pending=pending), limit, constructions // 2)
    else:
        paper = replace(whole, pending=_HELD_FOR_W)
        if _bound(whole, limit) == _bound(paper, limit):  # else whole chunks cost time, surely
            best = _tune(whole, limit, constructions // 2)
        if best is None or max(best.spans) > _bound(paper, limit) * (1 + ROUNDING):
            other = _tune(paper, limit, constructions)
            best = other if best is None else min(best, other, key=_score)
    made = best.schedule(name)
    # ZB-H1 fits either limit, and can be what the search missed: with few micro-batches, or where
    # messages queue, of which the list scheduler knows nothing.
    h1 = replace(zb_h1(ranks, microbatches), name=name)
    return h1 if _longest(h1, times) < _longest(made, times) else made


def _tune(lanes: Lanes, limit: int, constructions: int) -> Built:
    """The best that so many constructions find."""
    ranks = lanes.placement.num_ranks
    tuner = Tuner(lanes, _score, constructions, enough=_bound(lanes, limit))
    for most in sorted({ranks, limit}):
        tuner.attempt(as_1f1b(ranks, most))
    even = tuner.priorities
    tuner.sweep(shared(ranks), until=tuner.left * 2 // 3)
    if even is not None:
        tuner.sweep(even, until=tuner.left * 3 // 4)
    tuner.wander()
    assert tuner.best is not None, "the starts were tried"
    return tuner.best


def _score(built: Built) -> tuple[float, ...]:
    """The longest that a rank takes; then the other ranks; then the makespan."""
    return (max(built.spans), sum(span * span for span in built.spans), built.makespan)


def _longest(schedule: Schedule, times: Times) -> float:
    """The longest that a rank takes from its first start to its end; messages queue."""
    starts, ends = run(schedule, times)
    return max(ends[after - 1] - starts[first] for first, after in pairwise(schedule.graph.first))


def _bound(lanes: Lanes, limit: int) -> float:
    """What the longest that a rank takes cannot be below.

    When rank r ends its last I it owes at most as many W as memory allows, and has done the rest of
    its work; then each rank before it, up to rank q, has an I to do, and q its last W.
    """
    times, m = lanes.times, lanes.placement.num_microbatches
    work = [m * sum(of) for of in zip(times.F, times.I, times.W, strict=True)]
    owed = min(m, limit / lanes.pending + ROUNDING) if lanes.pending else m
    bound = max(work)
    for last in range(len(work)):
        path = work[last] - int(owed) * times.W[last]
        for first in range(last - 1, -1, -1):
            path += times.F[first] + times.I[first] + 2 * lanes.onward[first]
            bound = max(bound, path + times.W[first])
    return bound
