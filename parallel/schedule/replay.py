"""Replays a schedule: every rank takes its steps in order, each as soon as its needs are met."""

from __future__ import annotations

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
    met.
    """
    graph = schedule.graph
    ended: set[Action] = set()
    reached = list(graph.first[:-1])
    for number in graph.order:
        rank, index = graph.position(number)
        ended.update(actions(schedule.rows[rank][index]))
        reached[rank] = number + 1
    blocked = tuple(
        _blocked(schedule, Position(*graph.position(number)), ended)
        for rank, number in enumerate(reached)
        if number < graph.first[rank + 1]
    )
    return Replay(tuple(Position(*graph.position(n)) for n in graph.order), blocked)


def _blocked(schedule: Schedule, position: Position, ended: set[Action]) -> Blocked:
    return next(
        Blocked(position, action, need)
        for action in actions(schedule.rows[position.rank][position.step])
        for need in schedule.needs[action]
        if need not in ended
    )
