"""1F1B: forwards fill the pipeline, then each rank alternates one forward and one backward."""

from __future__ import annotations

from ..actions import Action, Op, Step
from ..placement import Placement
from ..schedule import Schedule
from .sizes import require_counts


def one_f_one_b(ranks: int, microbatches: int) -> Schedule:
    """The 1F1B schedule: stage r on rank r, full backwards, no pairs.

    From PipeDream-Flush (Narayanan et al., arXiv 2006.09503) as Megatron-LM runs it. With P ranks,
    m micro-batches and F and B the times of a forward and a full backward, rank r warms up with
    min(P-1-r, m) forwards, the makespan is (m+P-1)(F+B), each rank idles for (P-1)(F+B), 3(P-1)
    where F = I = W = 1, and rank r holds the activations of min(P-r, m) chunks at its peak
    (`peak_chunks` too).

    Args:
        ranks: pipeline ranks, which are the stages too; from 1 up.
        microbatches: micro-batches a step; from 1 up, better at least `ranks`.

    Raises:
        ValueError: a size is not a whole number from 1 up.
    """
    require_counts("1f1b", ranks=ranks, microbatches=microbatches)
    rows = tuple(_row(rank, ranks, microbatches) for rank in range(ranks))
    return Schedule("1f1b", Placement((tuple(range(ranks)),), (0,) * microbatches), rows)


def _row(rank: int, ranks: int, microbatches: int) -> tuple[Step, ...]:
    forwards = [Action(rank, Op.F, m) for m in range(microbatches)]
    backwards = [Action(rank, Op.B, m) for m in range(microbatches)]
    warmup = min(ranks - 1 - rank, microbatches)
    row: list[Step] = [*forwards[:warmup]]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        row += [forward, backward]
    row += backwards[microbatches - warmup :]
    return tuple(row)
