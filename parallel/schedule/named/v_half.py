"""V-Half: half of 1F1B's activations, and half of its idle time."""

from __future__ import annotations

from ..schedule import Schedule
from .building_block import repeat_block
from .sizes import require_counts


def v_half(ranks: int, microbatches: int) -> Schedule:
    """The schedule V-Half: stages r and 2P-1-r on rank r, split backwards, no pairs.

    From Qi et al., arXiv 2405.15362, section 3: a building block in which F and I take two ticks a
    rank on their first leg through the V and one tick on their second.

    With P >= 2 ranks, m >= P micro-batches and F = I = W = 1, in times of one stage, each rank
    idles for 3P-4 where P is odd and for 3P-7 where it is even (1 where P is 2), about half of
    1F1B's 6P-6 for the same model. Each rank holds at most 2(P//2+1) chunks of one stage, also with
    what the waiting weight halves need (`peak_chunks`), as much as P//2+1 chunks of 1F1B, which
    holds P.

    Args:
        ranks: pipeline ranks, half the number of stages; from 1 up.
        microbatches: micro-batches a step; from 1 up, better at least `ranks`.

    Raises:
        ValueError: a size is not a whole number from 1 up.
    """
    require_counts("v-half", ranks=ranks, microbatches=microbatches)
    # Where P is even the second half waits for 3 ticks, or two actions would share a tick.
    wait = 0 if ranks % 2 else 3
    block = [
        (2 * r, 3 * ranks - r - 2, 3 * ranks + wait + 2 * r - 1, 6 * ranks + wait - r - 2)
        for r in range(ranks)
    ]
    return repeat_block("v-half", ranks, microbatches, 2 * (ranks // 2 + 1), block)
