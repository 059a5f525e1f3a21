"""ZB-V: zero bubble with the activations of 1F1B, by folding the stages in a V."""

from __future__ import annotations

from collections.abc import Sequence

from ..schedule import Schedule
from .vee import Kind, Seat, run_clock

# An input half of the first stage belongs to an older micro-batch than one of the second, so it
# comes first: it ends what that micro-batch's gradient has to do on this rank.
_FORWARDS = (Kind.F_UP, Kind.F_DOWN)
_INPUTS = (Kind.I_DOWN, Kind.I_UP)
_AFTER_FORWARD = (*_FORWARDS, Kind.W, *_INPUTS)
_AFTER_OTHERS = (*_FORWARDS, *_INPUTS, Kind.W)


def zbv(ranks: int, microbatches: int) -> Schedule:
    """The schedule ZB-V: stages r and 2P-1-r on rank r, split backwards, no pairs.

    From Qi et al., arXiv 2401.10241, section 6, and arXiv 2405.15362. The papers give a picture,
    the activations and the bubble; the order here has those and comes from a rule on a clock in
    which F = I = W = 1: a forward if there is one and its activations fit, the second stage's
    first; else a weight half after a forward, and an input half after anything else.

    With P ranks and m >= 2P-1 micro-batches no rank then waits between its first and its last step,
    and the makespan is 6m+P-1 in times of one stage: the steps of the last rank and the time until
    it can begin. With fewer it is at most P/4 more, and below m = P at most 4P+3m-1 or that. Each
    rank holds the activations of 2P chunks of one stage where m >= 2P-1 and never more, also with
    what the waiting weight halves need (`peak_chunks`): as much as P chunks of 1F1B, which holds P.
    For other costs see `simulate`.

    Args:
        ranks: pipeline ranks, half the number of stages; from 1 up.
        microbatches: micro-batches a step; from 1 up, better at least 2 * ranks - 1.

    Raises:
        ValueError: a size is not a whole number from 1 up.
    """
    return run_clock("zbv", ranks, microbatches, 2 * ranks, _rule)


def _rule(seat: Seat, ready: Sequence[Kind]) -> Kind:
    wanted = _AFTER_FORWARD if seat.last in _FORWARDS else _AFTER_OTHERS
    return next(kind for kind in wanted if kind in ready)
