"""What no schedule can be faster than."""

from __future__ import annotations

from ..schedule import Placement, Times


def lower_bound(placement: Placement, times: Times) -> float:
    """A makespan below which there is no schedule on this placement, whatever its memory.

    The largest of: the way of one micro-batch through all stages and back; for each rank, what is
    before its first work and then all of that work; and what is before its first work, then all its
    forwards and input gradients, then the way of the last gradient back to stage 0.

    Args:
        placement: which rank runs which stage.
        times: of its stages.
    """
    stages = range(times.num_stages)
    # The least that a forward takes, and a backward until its gradient goes on, or until its end.
    forward = [min(times.F[s], min(times.pair[s])) for s in stages]
    paired = [min(times.pair[f][s] for f in stages) for s in stages]
    onward = [min(times.I[s], times.B[s], paired[s]) for s in stages]
    whole = [min(times.I[s] + times.W[s], times.B[s], paired[s]) for s in stages]

    # By route and stage: from the start to the first input, and from a backward's end to the end.
    heads: list[list[float]] = []
    tails: list[list[float]] = []
    bound = 0.0
    for route in placement.routes:
        hops = [
            times.send + (times.occupy[s] if times.occupy else 0.0)
            if route[s] != route[s + 1]
            else 0.0
            for s in stages[:-1]
        ]
        head, tail = [0.0], [0.0]
        for s in stages[:-1]:
            head.append(head[s] + forward[s] + hops[s])
            tail.append(tail[s] + hops[s] + (onward[s] if s else whole[0]))
        heads.append(head)
        tails.append(tail)
        last = stages[-1]
        turn = forward[last] + (onward[last] if last else whole[0])
        bound = max(bound, head[last] + turn + tail[last])
    for rank in range(placement.num_ranks):
        bound = max(bound, _rank_bound(placement, times, rank, heads, tails))
    return bound


def _rank_bound(
    placement: Placement,
    times: Times,
    rank: int,
    heads: list[list[float]],
    tails: list[list[float]],
) -> float:
    held = [
        (route, stage)
        for route, path in enumerate(placement.routes)
        for stage, holder in enumerate(path)
        if holder == rank
    ]
    count = [placement.route_of.count(route) for route in range(len(placement.routes))]
    halves = {s: min(times.I[s], times.B[s]) for _, s in held}
    wholes = {s: min(times.I[s] + times.W[s], times.B[s]) for _, s in held}

    def work(backward: dict[int, float]) -> float:
        """All forwards and backwards, each forward saving the most that it could in a pair."""
        return sum(
            count[route]
            * (
                times.F[stage]
                + backward[stage]
                - max(
                    max(0.0, times.F[stage] + backward[other] - times.pair[stage][other])
                    for _, other in held
                )
            )
            for route, stage in held
        )

    head = min(heads[route][stage] for route, stage in held)
    tail = min(tails[route][stage] for route, stage in held)
    return head + max(work(wholes), work(halves) + tail)
