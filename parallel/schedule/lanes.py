"""A placement with its times and its memory, laid out as lists of numbers for list scheduling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from .placement import Placement
from .times import Times

# Sums of times, and of fractions of chunks, differ by this much through rounding alone.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Lanes:
    """A placement, its times and its memory, laid out for the constructor.

    A lane is one stage of one route: lane = route * stages + stage. Entries of lists are by lane
    unless they say otherwise.
    """

    placement: Placement
    times: Times
    limit: tuple[float, ...]
    chunk: tuple[float, ...]
    pending: float
    microbatches: tuple[tuple[int, ...], ...]
    rank: list[int] = field(default_factory=list[int])
    stage: list[int] = field(default_factory=list[int])
    size: list[float] = field(default_factory=list[float])
    # What must stay free beside a chunk of this lane so that later stages can always go on.
    reserve: list[float] = field(default_factory=list[float])
    onward: list[float] = field(default_factory=list[float])  # delay to the next stage
    back: list[float] = field(default_factory=list[float])  # delay to the stage before
    of_rank: list[list[int]] = field(default_factory=list[list[int]])  # by rank
    pays: bool = False  # whether any pair saves time

    @property
    def num_stages(self) -> int:
        return len(self.times.F)

    @property
    def num_actions(self) -> int:
        """Actions of a schedule with split backwards: what one construction costs."""
        return 3 * self.num_stages * self.placement.num_microbatches


def lay_out(
    placement: Placement,
    times: Times,
    *,
    limit: float | Sequence[float] = math.inf,
    chunk: Sequence[float] | None = None,
    pending: float = 1.0,
    pairs: bool = True,
) -> Lanes:
    """Prepare a placement for `construct`.

    Args:
        placement: any.
        times: of its stages. Messages are delayed by `occupy` too, but do not queue here.
        limit: most memory of each rank, or of every rank, in chunks.
        chunk: what a chunk of each stage counts; 1 if not given.
        pending: share of a chunk's memory that stays until W has run; the rest ends with I.
        pairs: whether pairs are formed where they save time.

    Raises:
        ValueError: a limit is too small for this constructor; the message names the smallest.
    """
    ranks, stages = placement.num_ranks, placement.num_stages
    sizes = tuple(chunk) if chunk is not None else (1.0,) * stages
    limits = tuple(limit) if isinstance(limit, Sequence) else (float(limit),) * ranks
    members: list[list[int]] = [[] for _ in placement.routes]
    for microbatch, route in enumerate(placement.route_of):
        members[route].append(microbatch)
    pays = pairs and any(saved(times, f, b) > 0 for f in range(stages) for b in range(stages))
    lanes = Lanes(placement, times, limits, sizes, pending, tuple(map(tuple, members)), pays=pays)
    lanes.of_rank.extend([] for _ in range(ranks))
    for route in placement.routes:
        for stage, rank in enumerate(route):
            lanes.of_rank[rank].append(len(lanes.rank))
            lanes.rank.append(rank)
            lanes.stage.append(stage)
            lanes.size.append(sizes[stage])
            boundary = times.send + (times.occupy[stage] if stage < len(times.occupy) else 0.0)
            last = stage == stages - 1
            lanes.onward.append(0.0 if last or route[stage + 1] == rank else boundary)
            lanes.back.append(lanes.onward[-2] if stage else 0.0)
    for lane, rank in enumerate(lanes.rank):
        # Of one stage in two routes one chunk is enough: whichever runs goes on to its end.
        later = {lanes.stage[v]: lanes.size[v] for v in lanes.of_rank[rank]}
        lanes.reserve.append(sum(s for at, s in later.items() if at > lanes.stage[lane]))
    for rank, held in enumerate(lanes.of_rank):
        smallest = max(lanes.size[v] + lanes.reserve[v] for v in held)
        if limits[rank] + ROUNDING < smallest:
            raise ValueError(
                f"memory limit {limits[rank]:g} of rank {rank} is too small for its stages; "
                f"the smallest possible is {smallest:g} chunks"
            )
    return lanes


def saved(times: Times, forward: int, backward: int) -> float:
    """What a pair of these stages saves against its members one after the other; 0 if nothing."""
    alone = times.F[forward] + min(times.B[backward], times.I[backward] + times.W[backward])
    saved = alone - times.pair[forward][backward]
    return saved if saved > ROUNDING * alone else 0.0
