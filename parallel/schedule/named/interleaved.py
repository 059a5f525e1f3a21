"""Interleaved 1F1B: several smaller stages a rank, so that the pipeline fills sooner."""

from __future__ import annotations

from ..actions import Action, Op, Step
from ..placement import Placement
from ..schedule import Schedule
from .sizes import require_counts


def interleaved(ranks: int, microbatches: int, *, stages_per_rank: int = 2) -> Schedule:
    """Interleaved 1F1B: stage s on rank s % P, full backwards, no pairs.

    From Narayanan et al., arXiv 2104.04473, section 2.2, as Megatron-LM runs it. Micro-batches go
    in groups: a rank runs its first stage on all of a group, then its next stage on the same group,
    and so on. A group of P micro-batches comes round just when it is needed again. Where m is not a
    multiple of P, Megatron-LM refuses; here the groups are then as equal as they can be and none is
    smaller than P, which keeps the idle time and takes the activations of a larger group.

    With P ranks, v stages a rank, m >= P micro-batches and F and B the times of one stage's forward
    and full backward, the makespan is (vm+P-1)(F+B) and each rank idles for (P-1)(F+B), 3(P-1)
    where F = I = W = 1: a v-th of what 1F1B does for the same model. Fewer micro-batches than ranks
    are one group, and the makespan is (vP+m-1)(F+B). Rank r warms up with 2(P-1-r)+(v-1)G forwards,
    G being the size of the largest group, P where m is a multiple of P, and at most vm; its peak is
    one chunk more, and at most vm (`peak_chunks` too).

    Args:
        ranks: pipeline ranks; from 1 up.
        microbatches: micro-batches a step; from 1 up, best a multiple of `ranks`.
        stages_per_rank: v, from 2 up; the model has `ranks * stages_per_rank` stages.

    Raises:
        ValueError: a size is not possible; the message says what to use.
    """
    require_counts(
        "interleaved", ranks=ranks, microbatches=microbatches, stages_per_rank=stages_per_rank
    )
    if stages_per_rank == 1:
        raise ValueError(
            "interleaved: stages_per_rank=1 leaves nothing to interleave; use 2, or 1f1b, which "
            "has one stage a rank"
        )
    groups = _groups(ranks, microbatches)
    rows = tuple(_row(rank, ranks, stages_per_rank, groups) for rank in range(ranks))
    route = tuple(range(ranks)) * stages_per_rank
    return Schedule("interleaved", Placement((route,), (0,) * microbatches), rows)


def _groups(ranks: int, microbatches: int) -> list[range]:
    """The micro-batches in as many groups of at least `ranks` as there can be, the larger first."""
    number = max(1, microbatches // ranks)
    size, larger = divmod(microbatches, number)
    starts = [size * i + min(i, larger) for i in range(number + 1)]
    return [range(starts[i], starts[i + 1]) for i in range(number)]


def _row(rank: int, ranks: int, stages_per_rank: int, groups: list[range]) -> tuple[Step, ...]:
    stages = range(rank, ranks * stages_per_rank, ranks)
    forwards = [Action(s, Op.F, m) for group in groups for s in stages for m in group]
    backwards = [Action(s, Op.B, m) for group in groups for s in reversed(stages) for m in group]
    warmup = 2 * (ranks - 1 - rank) + (stages_per_rank - 1) * len(groups[0])
    warmup = min(warmup, len(forwards))
    row: list[Step] = [*forwards[:warmup]]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        row += [forward, backward]
    row += backwards[len(forwards) - warmup :]
    return tuple(row)
