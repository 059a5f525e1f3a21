"""Which messages a schedule implies, and in which order: the lowering to sends and receives."""

from __future__ import annotations

from ..comm.messages import Message
from .schedule import Action, Op, Schedule, actions


def activation(stage: int, microbatch: int) -> Message:
    """What stage `stage` sends to stage + 1."""
    return Message(f"the output of stage {stage}", microbatch)


def gradient(stage: int, microbatch: int) -> Message:
    """What stage + 1 sends back to stage `stage`: the gradient of its output."""
    return Message(f"the output gradient of stage {stage}", microbatch)


def sends(schedule: Schedule, rank: int) -> list[tuple[int, Message]]:
    """(destination rank, message) of everything that `rank` sends, in the order of its row.

    Stages that are neighbours on one rank need no message. Within a pair the forward comes first.
    """
    result: list[tuple[int, Message]] = []
    for step in schedule.rows[rank]:
        for action in actions(step):
            made = _sent_after(schedule, action)
            if made is not None and made[0] != rank:
                result.append(made)
    return result


def receives(schedule: Schedule, rank: int) -> dict[int, list[Message]]:
    """What comes to `rank` from each source rank, in the order of its sending."""
    result: dict[int, list[Message]] = {}
    for source in range(schedule.num_ranks):
        messages = [
            message for destination, message in sends(schedule, source) if destination == rank
        ]
        if messages and source != rank:
            result[source] = messages
    return result


def _sent_after(schedule: Schedule, action: Action) -> tuple[int, Message] | None:
    stage, microbatch = action.stage, action.microbatch
    if action.op is Op.F and stage + 1 < schedule.num_stages:
        return schedule.placement.rank(stage + 1, microbatch), activation(stage, microbatch)
    if action.op in (Op.B, Op.I) and stage > 0:
        return schedule.placement.rank(stage - 1, microbatch), gradient(stage - 1, microbatch)
    return None
