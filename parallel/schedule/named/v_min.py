"""V-Min: a third of 1F1B's activations, and less idle time."""

from __future__ import annotations

from ..schedule import Schedule
from .building_block import repeat_block
from .sizes import require_counts


def v_min(ranks: int, microbatches: int) -> Schedule:
    """The schedule V-Min: stages r and 2P-1-r on rank r, split backwards, no pairs.

    From Qi et al., arXiv 2405.15362, section 3: a building block in which each action follows the
    one before it at once, so that chunks live as briefly as they can.

    With P >= 2 ranks, m >= P micro-batches and F = I = W = 1, in times of one stage, each rank
    idles for 4P-5 where P % 3 is 1 and for 4P-7 elsewhere, about two thirds of 1F1B's 6P-6 for the
    same model. Each rank holds at most 2((P+4)//3) chunks of one stage, also with what the waiting
    weight halves need (`peak_chunks`), as much as (P+4)//3 chunks of 1F1B, which holds P.

    Args:
        ranks: pipeline ranks, half the number of stages; from 1 up.
        microbatches: micro-batches a step; from 1 up, better at least `ranks`.

    Raises:
        ValueError: a size is not a whole number from 1 up.
    """
    require_counts("v-min", ranks=ranks, microbatches=microbatches)
    # Where P is a multiple of 3 the second half waits for 2 ticks, or two actions would share one.
    wait = 0 if ranks % 3 else 2
    block = [
        (r, 2 * ranks - r - 1, 2 * ranks + wait + r, 4 * ranks + wait - r - 1) for r in range(ranks)
    ]
    return repeat_block("v-min", ranks, microbatches, 2 * ((ranks + 4) // 3), block)
