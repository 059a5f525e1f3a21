"""DualPipeV: DualPipe folded at the middle, so that one copy of the parameters is enough."""

from __future__ import annotations

from ..placement import Placement
from ..schedule import Schedule
from .dualpipe import eight_steps
from .sizes import require_counts


def dualpipev(ranks: int, microbatches: int) -> Schedule:
    """DualPipeV, the V-shaped half of DualPipe (github.com/deepseek-ai/DualPipe).

    The model is cut in 2 * ranks stages. Every micro-batch goes down the ranks with stages
    0..ranks-1 and back up with the rest, so rank r holds stages r and 2*ranks-1-r and does what
    rank r of DualPipe on 2 * ranks ranks does, with the second leg in the place of the other
    direction.

    With P = 2 * ranks stages, m >= P micro-batches and F, B, W and F&B the times of one stage's
    forward, full backward, its weight half and a pair, each rank idles for (P/2-1)(F&B + B - 3W),
    exactly so where F = I = W and F&B = F+B (elsewhere `simulate` tells), and holds the activations
    of P+1 chunks of one stage at its peak, whatever m is. Fewer micro-batches than the published
    code takes are done as in DualPipe: makespan and peak are DualPipe's for P ranks and 2m
    micro-batches, rank r being r ranks from the nearer end. Its micro-batches pass the ranks twice:
    where messages take time and there are very few of them, the makespan can be up to 1.47 of
    1F1B's (2 of them on 4 ranks, a message taking as long as a forward of 1F1B's).

    Args:
        ranks: pipeline ranks, half the number of stages; from 1 up.
        microbatches: micro-batches a step; from 1 up, better at least 2 * ranks.

    Raises:
        ValueError: a size is not a whole number from 1 up.
    """
    require_counts("dualpipev", ranks=ranks, microbatches=microbatches)
    rows = tuple(eight_steps(rank, ranks, microbatches, (0, 0)) for rank in range(ranks))
    down = tuple(range(ranks))
    return Schedule("dualpipev", Placement((down + down[::-1],), (0,) * microbatches), rows)
