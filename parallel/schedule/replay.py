"""Replays a schedule: every rank takes its steps in order, each as soon as its needs are met."""

from __future__ import annotations

from collections import deque
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
    """Run the rows against each other, without times.

    A step runs once all its actions' needs have ended; a pair starts when both members' needs are
    met. Which steps can run does not depend on how fast ranks are, since rows are fixed and a step
    that can run stays so: what blocks here blocks under any timing.
    """
    order: list[Position] = []
    ended: set[Action] = set()
    waiting: dict[Action, list[Blocked]] = {}
    reached = [0] * schedule.num_ranks
    ready = deque(range(schedule.num_ranks))
    while ready:
        rank = ready.popleft()
        for index in range(reached[rank], len(schedule.rows[rank])):
            position = Position(rank, index)
            blocked = _blocked(schedule, position, ended)
            if blocked is not None:
                waiting.setdefault(blocked.awaited, []).append(blocked)
                break
            order.append(position)
            reached[rank] = index + 1
            for action in actions(schedule.rows[rank][index]):
                ended.add(action)
                ready.extend(woken.position.rank for woken in waiting.pop(action, ()))
    return Replay(tuple(order), tuple(sorted(b for group in waiting.values() for b in group)))


def _blocked(schedule: Schedule, position: Position, ended: set[Action]) -> Blocked | None:
    for action in actions(schedule.rows[position.rank][position.step]):
        for need in schedule.needs[action]:
            if need not in ended:
                return Blocked(position, action, need)
    return None
