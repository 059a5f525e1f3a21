"""ZB-H2: more forwards ahead than ZB-H1, so that no rank waits between its first and last step."""

from __future__ import annotations

from ..schedule import Schedule
from .zb_h1 import split_1f1b


def zb_h2(ranks: int, microbatches: int) -> Schedule:
    """The hand-made zero-bubble schedule ZB-H2: stage r on rank r, split backwards, no pairs.

    From Qi et al., arXiv 2401.10241, section 2.2. Rank r runs 2(P-1-r)+1 forwards before its first
    input half, which is what fits in before that can come, and keeps up to 2r weight halves
    waiting: they follow when the others have run out.

    With P ranks, m >= 2P-1 micro-batches and F, I and W the times of a forward, an input half and a
    weight half, the rank that waits longest between its first and its last step waits for
    (P-1)(F+I-2W), exactly so where F = I >= W: not at all where F = I = W = 1, and the makespan is
    3m+P-1, the steps of the last rank and the time until it can begin. (That is ZB-H1's makespan
    too: there the ranks end together, here they begin and end one after another.) With fewer
    micro-batches fewer weight halves wait, and the makespan is the larger of 3m+P-1 and 2m+2P-1.
    Rank r holds the activations of min(2(P-1-r)+1, m) chunks at its peak, and with what the waiting
    weight halves need (`peak_chunks`) every rank holds min(2P-1, m).

    Args:
        ranks: pipeline ranks, which are the stages too; from 1 up.
        microbatches: micro-batches a step; from 1 up, better at least 2 * ranks - 1.

    Raises:
        ValueError: a size is not a whole number from 1 up.
    """

    def waiting(rank: int) -> int:
        # With few micro-batches the wait is between input halves, and weight halves must fill it.
        return min(2 * rank, rank + max(0, microbatches - ranks))

    return split_1f1b("zb-h2", ranks, microbatches, lambda r: 2 * (ranks - 1 - r), waiting)
