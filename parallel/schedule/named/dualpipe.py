"""DualPipe: micro-batches enter from both ends, so that every rank overlaps an F with a B."""

from __future__ import annotations

from collections import deque
from itertools import count

from ..actions import Action, Op, Pair, Step, actions
from ..placement import Placement
from ..schedule import Schedule
from .sizes import require_counts


def dualpipe(ranks: int, microbatches: int) -> Schedule:
    """Bidirectional DualPipe (DeepSeek-V3, arXiv 2412.19437, section 3.2.1 and figure 5).

    The order is that of the published code (github.com/deepseek-ai/DualPipe). Micro-batches
    0..m/2-1 enter at rank 0 and have stage s on rank s; micro-batches m/2..m-1 enter at the last
    rank and have stage s on rank P-1-s. So rank r holds stages r and P-1-r: two copies of the
    parameters.

    With P ranks, m >= 2P micro-batches and F, B, W and F&B the times of a forward, a full backward,
    its weight half and a pair, each rank idles for (P/2-1)(F&B + B - 3W), exactly so where
    F = I = W and F&B = F+B (elsewhere `simulate` tells), and holds the activations of P+1 chunks at
    its peak, whatever m is.

    The published code takes no fewer than 2P micro-batches. Here the steps for fewer are those for
    2P without the last micro-batches of each direction; a pair that loses a member is the other one
    alone. With F = I = W = 1 and F&B = 3 the makespan is 3m+P-2 for m >= 2P, 2m+3P-2 for
    P < m <= 2P and 2m+5P/2-3 for m <= P, always less than 1F1B's 3m+3P-3. In simulations with other
    times, uneven stages and messages that take time it was never more than 1F1B's where B = I + W
    and no pair takes longer than its F + B; with pairs up to 1.3 times that it was up to 1.16 of
    1F1B's. The peak of a rank that is h ranks from the nearer end is min(P+1, m, m/2+1+h) chunks
    (`peak_chunks` too).

    Args:
        ranks: pipeline ranks, which are the stages too; even.
        microbatches: micro-batches a step of both directions together; even, better at least
            2 * ranks.

    Raises:
        ValueError: a size is not possible; the message says what to use.
    """
    require_counts("dualpipe", ranks=ranks, microbatches=microbatches)
    wrong: list[str] = []
    if ranks % 2:
        wrong.append(
            f"ranks={ranks} is odd, but stages s and ranks-1-s share two ranks; use "
            f"{_even_beside(ranks)} ranks"
        )
    if microbatches % 2:
        wrong.append(
            f"microbatches={microbatches} is odd, but half of them enter at each end; use "
            f"{_even_beside(microbatches)} micro-batches"
        )
    if wrong:
        raise ValueError(
            f"dualpipe: {'; '.join(wrong)}; or use dualpipev or 1f1b, which take any number"
        )
    entering = microbatches // 2
    rows: list[tuple[Step, ...]] = []
    for rank in range(ranks):
        near = min(rank, ranks - 1 - rank)
        # Phase 0 is the direction that enters at the nearer end.
        first = (0, entering) if rank == near else (entering, 0)
        rows.append(eight_steps(near, ranks // 2, entering, first))
    ahead = tuple(range(ranks))
    placement = Placement((ahead, ahead[::-1]), (0,) * entering + (1,) * entering)
    return Schedule("dualpipe", placement, tuple(rows))


def _even_beside(odd: int) -> str:
    return f"{odd - 1} or {odd + 1}" if odd > 1 else "2"


def eight_steps(
    near: int, half: int, microbatches: int, first: tuple[int, int]
) -> tuple[Step, ...]:
    """One rank's row of DualPipe or DualPipeV, in the eight steps of the published code.

    The rank holds stage `near` for phase 0 and stage 2 * half - 1 - near for phase 1. The eight
    steps need 2 * half micro-batches in each phase; of fewer, the row for so many is what is left
    without the others.

    Args:
        near: distance to the nearer end of the pipeline, 0 to half - 1.
        half: half the number of stages.
        microbatches: micro-batches in each phase.
        first: the first micro-batch of phase 0 and of phase 1.
    """
    row = _full_row(near, half, max(microbatches, 2 * half), first)
    if microbatches >= 2 * half:
        return row
    end = {near: first[0] + microbatches, 2 * half - 1 - near: first[1] + microbatches}
    kept = [[a for a in actions(step) if a.microbatch < end[a.stage]] for step in row]
    return tuple(Pair(*left) if len(left) == 2 else left[0] for left in kept if left)


def _full_row(near: int, half: int, microbatches: int, first: tuple[int, int]) -> tuple[Step, ...]:
    stages = (near, 2 * half - 1 - near)
    next_forward = (count(first[0]), count(first[1]))
    next_backward = (count(first[0]), count(first[1]))
    deferred: deque[Action] = deque()

    def forward(phase: int) -> Action:
        return Action(stages[phase], Op.F, next(next_forward[phase]))

    def backward(phase: int) -> Action:
        return Action(stages[phase], Op.B, next(next_backward[phase]))

    def inputs(phase: int) -> Action:
        microbatch = next(next_backward[phase])
        deferred.append(Action(stages[phase], Op.W, microbatch))
        return Action(stages[phase], Op.I, microbatch)

    to_middle = half - 1 - near
    row: list[Step] = []
    # 1: fill with the near direction.
    row += [forward(0) for _ in range(2 * to_middle)]
    # 2: the far direction arrives.
    for _ in range(near + 1):
        row += [forward(0), forward(1)]
    # 3: its first backwards, split, so that the gradient goes on before the weights are done.
    for _ in range(to_middle):
        row += [inputs(1), deferred.popleft(), forward(1)]
    # 4: the main part, all pairs. The middle ranks leave the first one apart, as the published code
    # does to make the bubble smaller; whether it does depends on the costs (see `simulate`).
    for i in range(microbatches - 2 * half + near + 1):
        if i == 0 and to_middle == 0:
            row += [forward(0), backward(1)]
        else:
            row.append(Pair(forward(0), backward(1)))
        row.append(Pair(forward(1), backward(0)))
    # 5: the near direction has no forwards left.
    for _ in range(to_middle):
        row += [backward(1), Pair(forward(1), backward(0))]
    # 6: no forwards left; the second half of the backwards is split.
    for i in range(2 * (near + 1)):
        phase = 1 - i % 2
        row.append(backward(phase) if i <= near else inputs(phase))
    # 7: weights fill the wait for the last gradients of the near direction.
    for _ in range(to_middle):
        row += [deferred.popleft(), inputs(0)]
    # 8: what is left of the weights.
    row += deferred
    return tuple(row)
