"""GPipe: all forwards, then all backwards."""

from __future__ import annotations

from ..actions import Action, Op, Step
from ..placement import Placement
from ..schedule import Schedule
from .sizes import require_counts


def gpipe(ranks: int, microbatches: int) -> Schedule:
    """The GPipe schedule: stage r on rank r, every forward of a step before its first backward.

    From Huang et al., arXiv 1811.06965, section 2.2, without its recomputation of activations;
    backwards are whole and go in the order of the forwards. With P ranks, m micro-batches and F and
    B the times of a forward and a full backward, the makespan is (m+P-1)(F+B), each rank idles for
    (P-1)(F+B), 3(P-1) where F = I = W = 1, and holds the activations of all m chunks at its peak
    (`peak_chunks` too).

    Args:
        ranks: pipeline ranks, which are the stages too; from 1 up.
        microbatches: micro-batches a step; from 1 up.

    Raises:
        ValueError: a size is not a whole number from 1 up.
    """
    require_counts("gpipe", ranks=ranks, microbatches=microbatches)
    rows = tuple(_row(rank, microbatches) for rank in range(ranks))
    return Schedule("gpipe", Placement((tuple(range(ranks)),), (0,) * microbatches), rows)


def _row(stage: int, microbatches: int) -> tuple[Step, ...]:
    return tuple(Action(stage, op, m) for op in (Op.F, Op.B) for m in range(microbatches))
