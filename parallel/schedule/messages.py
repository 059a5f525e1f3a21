"""Which messages a schedule implies, from which rank to which: what its sends and receives are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from .actions import Action, Op, Step, actions

if TYPE_CHECKING:
    from .schedule import Schedule


class Message(NamedTuple):
    """What `action` made on rank `source`, for the rank that needs it.

    `str` gives "the output of stage 2 of micro-batch 5", or its gradient.
    """

    action: Action
    source: int
    destination: int

    def __str__(self) -> str:
        return f"{contents(self.action)} of micro-batch {self.action.microbatch}"


def contents(action: Action) -> str:
    """What the message that an action makes holds, whatever the micro-batch."""
    if action.op == Op.F:
        return f"the output of stage {action.stage}"
    return f"the output gradient of stage {action.stage - 1}"


def taker(action: Action, num_stages: int) -> int | None:
    """The stage that needs what an action makes; None where no other stage does.

    The output of F goes to the next stage, the gradient that B or I makes to the one before.
    """
    if action.op == Op.F:
        return action.stage + 1 if action.stage + 1 < num_stages else None
    return action.stage - 1 if action.op != Op.W and action.stage > 0 else None


def takers(action: Action, num_stages: int) -> tuple[Action, ...]:
    """The actions of another stage that need what `action` makes: `dependencies` read backwards.

    None, one F, or a B and an I, of which a schedule holds one.
    """
    stage = taker(action, num_stages)
    if stage is None:
        return ()
    ops = (Op.F,) if action.op == Op.F else (Op.B, Op.I)
    return tuple(Action(stage, op, action.microbatch) for op in ops)


def sends(
    schedule: Schedule, rank: int, ended: Callable[[Step], Sequence[Action]] = actions
) -> list[Message]:
    """Everything that `rank` sends, in the order of its row.

    Stages that are neighbours on one rank need no message.

    Args:
        schedule: of all ranks.
        rank: pipeline rank.
        ended: the actions of a step in the order in which their messages are sent; of a pair the
            forward's comes first by default.
    """
    placement, stages = schedule.placement, schedule.num_stages
    found: list[Message] = []
    for step in schedule.rows[rank]:
        for action in ended(step):
            stage = taker(action, stages)
            if stage is not None:
                destination = placement.rank(stage, action.microbatch)
                if destination != rank:
                    found.append(Message(action, rank, destination))
    return found
