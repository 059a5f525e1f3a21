"""When each step of a schedule runs: the rows against each other, in time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from .actions import Action, Op
from .schedule import Schedule
from .times import Times


def run(schedule: Schedule, times: Times) -> tuple[list[float], list[float]]:
    """Start and end of every step, numbered as in `schedule.graph`, in the unit of the times.

    Each step, when its end is known, says to those that need it from when on they have its message.
    Messages of a rank leave in the order of its row, in which its steps end, so that walking any
    order of the graph gives the lane's turns rightly.

    Args:
        schedule: any that verifies.
        times: of its stages.
    """
    graph = schedule.graph
    rank_of, first, remote = graph.rank_of, graph.first, graph.remote
    numbered = [step for row in schedule.rows for step in row]
    durations = list(map(times.of, numbered))
    send = times.send
    lane = [0.0] * schedule.num_ranks if any(times.occupy) else None
    starts = [0.0] * graph.num_steps
    ends = [0.0] * graph.num_steps
    arrived = [0.0] * graph.num_steps
    for step in graph.order:
        start = arrived[step]
        rank = rank_of[step]
        if step != first[rank] and ends[step - 1] > start:
            start = ends[step - 1]
        starts[step] = start
        ends[step] = end = start + durations[step]
        if lane is None:
            arrival = end + send
            for target in remote[step]:
                if arrival > arrived[target]:
                    arrived[target] = arrival
            continue
        for target, action in schedule.outgoing[step]:
            lane[rank] = max(end, lane[rank]) + occupied(times, action)
            arrived[target] = max(arrived[target], lane[rank] + send)
    return starts, ends


def occupied(times: Times, action: Action) -> float:
    """How long the message that an action makes keeps the sending lane of its rank."""
    boundary = action.stage if action.op is Op.F else action.stage - 1
    return times.occupy[boundary] if times.occupy else 0.0


def row_ends(schedule: Schedule, ends: Sequence[float]) -> list[float]:
    """Per rank, the end of its last step; 0 where it has none."""
    return [
        ends[after - 1] if start < after else 0.0 for start, after in pairwise(schedule.graph.first)
    ]
