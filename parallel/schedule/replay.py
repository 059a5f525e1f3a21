"""Replays a schedule: every rank takes its steps in order, each as soon as its needs are met."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from .actions import Action, actions
from .schedule import Position, Schedule


class Blocked(NamedTuple):
    """A rank that cannot go on: `action`, at `position`, needs `awaited`, which never ends."""

    position: Position
    action: Action
    awaited: Action


class Replay(NamedTuple):
    """What a replay did.

    Attributes:
        order: every step that could run, after everything that it needs.
        blocked: the ranks that could not finish, ascending; empty if the schedule is free of
            deadlock.
    """

    order: tuple[Position, ...]
    blocked: tuple[Blocked, ...]


def replay(schedule: Schedule) -> Replay:
    """Run the rows against each other, without times: `StepGraph.order` with names.

    A step runs once all its actions' needs have ended; a pair starts when both members' needs are
    met. An action that stands in the rows twice has ended when the first one has.
    """
    graph = schedule.graph
    order = tuple(Position(*graph.position(number)) for number in graph.order)
    ran = set(order)
    reached = [0] * schedule.num_ranks
    for rank, step in order:
        reached[rank] = step + 1
    blocked = tuple(
        _blocked(schedule, Position(rank, step), ran)
        for rank, step in enumerate(reached)
        if step < len(schedule.rows[rank])
    )
    return Replay(order, blocked)


def circle_of(waits_for: Mapping[int, int]) -> list[int]:
    """Ranks that wait for each other in a circle, the lowest first.

    Args:
        waits_for: per blocked rank, a rank that it waits for, which is blocked too.
    """
    rank = min(waits_for)
    path: list[int] = []
    while rank not in path:
        path.append(rank)
        rank = waits_for[rank]
    circle = path[path.index(rank) :]
    start = circle.index(min(circle))
    return [*circle[start:], *circle[:start]]


def _blocked(schedule: Schedule, position: Position, ran: Collection[Position]) -> Blocked:
    return next(
        Blocked(position, action, need)
        for action in actions(schedule.rows[position.rank][position.step])
        for need in schedule.needs[action]
        if schedule.positions.get(need) not in ran
    )
