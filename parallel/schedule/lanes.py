"""A placement with its times and its memory, laid out as lists of numbers for list scheduling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .placement import Placement
from .times import Times

# Sums of times, and of fractions of chunks, differ by this much through rounding alone.
ROUNDING = 1e-9


@dataclass(frozen=True)
class Lanes:
    """A placement, its times and its memory, laid out for the constructor.

    A lane is one stage of one route: lane = route * stages + stage.

    Attributes:
        placement, times: what is laid out.
        limit: per rank, most memory, in chunks.
        pending: share of a chunk's memory that stays from the end of I to the end of W.
        microbatches: per route, the micro-batches that take it, ascending.
        of_rank: per rank, its lanes.
        pays: whether any pair saves time.
        rank, stage: per lane, where it is and what it runs.
        size: per lane, memory of one of its chunks.
        reserve: per lane, what must stay free beside a chunk of it so that later stages of its rank
            can always go on.
        onward, back: per lane, delay of a message to the next stage and to the one before.
    """

    placement: Placement
    times: Times
    limit: tuple[float, ...]
    pending: float
    microbatches: tuple[tuple[int, ...], ...]
    of_rank: tuple[tuple[int, ...], ...]
    pays: bool
    rank: tuple[int, ...]
    stage: tuple[int, ...]
    size: tuple[float, ...]
    reserve: tuple[float, ...]
    onward: tuple[float, ...]
    back: tuple[float, ...]

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
    rank_of = [rank for route in placement.routes for rank in route]
    of_rank: list[list[int]] = [[] for _ in range(ranks)]
    for lane, rank in enumerate(rank_of):
        of_rank[rank].append(lane)
    size = sizes * len(placement.routes)
    # Of one stage in two routes one chunk is enough: whichever runs goes on to its end.
    reserve = tuple(
        sum(sizes[s] for s in {v % stages for v in of_rank[rank]} if s > lane % stages)
        for lane, rank in enumerate(rank_of)
    )
    onward = tuple(_delay(times, route, s) for route in placement.routes for s in range(stages))
    for rank, held in enumerate(of_rank):
        smallest = max(size[v] + reserve[v] for v in held)
        if limits[rank] + ROUNDING < smallest:
            raise ValueError(
                f"memory limit {limits[rank]:g} of rank {rank} is too small for its stages; "
                f"the smallest possible is {smallest:g} chunks"
            )
    return Lanes(
        placement=placement,
        times=times,
        limit=limits,
        pending=pending,
        microbatches=tuple(map(tuple, members)),
        of_rank=tuple(map(tuple, of_rank)),
        pays=pairs and any(saved(times, f, b) > 0 for f in range(stages) for b in range(stages)),
        rank=tuple(rank_of),
        stage=tuple(range(stages)) * len(placement.routes),
        size=size,
        reserve=reserve,
        onward=onward,
        back=tuple(onward[lane - 1] if lane % stages else 0.0 for lane in range(len(onward))),
    )


def _delay(times: Times, route: Sequence[int], stage: int) -> float:
    """Of a message from a stage to the next one; 0 where both are on one rank, or there is none."""
    if stage == len(route) - 1 or route[stage] == route[stage + 1]:
        return 0.0
    return times.send + (times.occupy[stage] if times.occupy else 0.0)


def saved(times: Times, forward: int, backward: int) -> float:
    """What a pair of these stages saves against its members one after the other; 0 if nothing."""
    alone = times.F[forward] + min(times.B[backward], times.I[backward] + times.W[backward])
    saved = alone - times.pair[forward][backward]
    return saved if saved > ROUNDING * alone else 0.0
