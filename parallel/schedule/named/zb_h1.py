"""ZB-H1: 1F1B with split backwards, whose weight halves fill the wait at the end."""

from __future__ import annotations

from collections.abc import Callable

from ..actions import Action, Op, Step
from ..placement import Placement
from ..schedule import Schedule
from .sizes import require_counts


def zb_h1(ranks: int, microbatches: int) -> Schedule:
    """The hand-made zero-bubble schedule ZB-H1: stage r on rank r, split backwards, no pairs.

    From Qi et al., arXiv 2401.10241, section 2.1. Rank r warms up with P-1-r forwards as in 1F1B,
    and keeps up to r weight halves waiting, so that the input halves that others wait for come
    first. With P ranks, m >= P micro-batches and F, I and W the times of a forward, an input half
    and a weight half, each rank idles for (P-1)(F+I-W), exactly so where F = I >= W: P-1 where
    F = I = W = 1, a makespan of 3m+P-1. With m < P that is 2m+2P-1. Rank r holds the activations of
    min(P-r, m) chunks at its peak, as in 1F1B, and with what the waiting weight halves need
    (`peak_chunks`) every rank holds min(P, m).

    Args:
        ranks: pipeline ranks, which are the stages too; from 1 up.
        microbatches: micro-batches a step; from 1 up, better at least `ranks`.

    Raises:
        ValueError: a size is not a whole number from 1 up.
    """
    return split_1f1b("zb-h1", ranks, microbatches, lambda r: ranks - 1 - r, lambda r: r)


def split_1f1b(
    name: str,
    ranks: int,
    microbatches: int,
    warmup: Callable[[int], int],
    waiting: Callable[[int], int],
) -> Schedule:
    """1F1B with split backwards, each weight half as soon as more than so many wait.

    Args:
        name: of the schedule.
        ranks: pipeline ranks, which are the stages too.
        microbatches: micro-batches a step.
        warmup: the forwards of a rank before it alternates, where there are so many.
        waiting: the weight halves of a rank that wait.

    Raises:
        ValueError: a size is not a whole number from 1 up.
    """
    require_counts(name, ranks=ranks, microbatches=microbatches)
    rows = tuple(_row(r, microbatches, warmup(r), waiting(r)) for r in range(ranks))
    return Schedule(name, Placement((tuple(range(ranks)),), (0,) * microbatches), rows)


def _row(stage: int, microbatches: int, warmup: int, waiting: int) -> tuple[Step, ...]:
    warmup, waiting = min(warmup, microbatches), min(waiting, microbatches)
    row: list[Step] = [Action(stage, Op.F, m) for m in range(warmup)]
    for m in range(microbatches):
        if warmup + m < microbatches:
            row.append(Action(stage, Op.F, warmup + m))
        row.append(Action(stage, Op.I, m))
        if m >= waiting:
            row.append(Action(stage, Op.W, m - waiting))
    row += [Action(stage, Op.W, m) for m in range(microbatches - waiting, microbatches)]
    return tuple(row)
