"""Which messages travel for a schedule, by the names that `comm` knows them by.

Which there are, and in which order, is worked out in `schedule.messages`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from ..comm.messages import Message
from .schedule import Action, Op, Schedule, Step, actions, messages

Ended: TypeAlias = Callable[[Step], Sequence[Action]]


def activation(stage: int, microbatch: int) -> Message:
    """What stage `stage` sends to stage + 1."""
    return _made_by(Action(stage, Op.F, microbatch))


def gradient(stage: int, microbatch: int) -> Message:
    """What stage + 1 sends back to stage `stage`: the gradient of its output."""
    return _made_by(Action(stage + 1, Op.B, microbatch))


def sends(schedule: Schedule, rank: int, ended: Ended = actions) -> list[tuple[int, Message]]:
    """(destination rank, message) of everything that `rank` sends, in the order of its row.

    `ended` is as of `schedule.messages.sends`.
    """
    sent = messages.sends(schedule, rank, ended)
    return [(message.destination, _made_by(message.action)) for message in sent]


def receives(schedule: Schedule, rank: int, ended: Ended = actions) -> dict[int, list[Message]]:
    """What comes to `rank` from each source rank, in the order of its sending."""
    result: dict[int, list[Message]] = {}
    for source in range(schedule.num_ranks):
        coming = [
            message
            for destination, message in sends(schedule, source, ended)
            if destination == rank
        ]
        if coming:
            result[source] = coming
    return result


def _made_by(action: Action) -> Message:
    return Message(messages.contents(action), action.microbatch)
