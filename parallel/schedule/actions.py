"""What a rank does: one action on one micro-batch of one stage, or a pair of actions that overlap.

F(s, m)  2F0        forward of stage 2 on micro-batch 0
B(s, m)  2B0        its full backward; B always means input and weight gradients here
I(s, m)  2I0        the input-gradient half of the backward
W(s, m)  2W0        the weight-gradient half
(F; B)   (0F7;7B3)  a forward and a full backward whose computation and communication interleave
"""

from __future__ import annotations

import re
from enum import StrEnum
from typing import NamedTuple, TypeAlias

_ACTION = re.compile(r"([0-9]+)([FBIW])([0-9]+)")
_PAIR = re.compile(r"\(([^;()]*);([^;()]*)\)(?:OVERLAP_F_B)?")
# What torch's lowered schedules hold besides computation; named in the error, because a file that
# torch wrote with its default format is full of them.
_TORCH_ONLY = re.compile(r"[0-9]+(?:UNSHARD|RESHARD|REDUCE_GRAD|SEND_F|RECV_F|SEND_B|RECV_B)[0-9]*")
_MOST_DIGITS = 9  # no such number is meant, and Python refuses to read one of thousands
_EXPECTED = "an action such as 2F0 (stage, one of F B I W, micro-batch) or a pair such as (0F7;7B3)"


class Op(StrEnum):
    """Kind of an action."""

    F = "F"
    B = "B"
    I = "I"  # noqa: E741  the field's name for the input-gradient half
    W = "W"

    # Enum's own is written in Python and hashes the member's name; actions are hashed everywhere.
    __hash__ = str.__hash__


class Action(NamedTuple):
    """One operation of stage `stage` on micro-batch `microbatch`; `str` gives "2F0"."""

    stage: int
    op: Op
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.op}{self.microbatch}"


class Pair(NamedTuple):
    """A forward and a full backward executed as one overlapped step; `str` gives "(0F7;7B3)"."""

    forward: Action
    backward: Action

    def __str__(self) -> str:
        return f"({self.forward};{self.backward})"


Step: TypeAlias = Action | Pair


def actions(step: Step) -> tuple[Action, ...]:
    """The actions of a step: a pair's forward and backward, or the one action itself."""
    return (step.forward, step.backward) if isinstance(step, Pair) else (step,)


def dependencies(action: Action, num_stages: int) -> tuple[tuple[Action, ...], ...]:
    """What must have ended before `action` can start.

    The only place that knows it: the verifier, the simulation and the executor all ask here,
    through `Schedule.needs`, which picks the alternative that a schedule holds.

    Args:
        action: any action of a pipeline of `num_stages` stages.
        num_stages: number of stages of the pipeline.

    Returns:
        One entry a requirement; any one action of an entry meets it.
    """
    stage, op, microbatch = action
    if op == Op.F:
        return ((Action(stage - 1, Op.F, microbatch),),) if stage > 0 else ()
    if op == Op.W:
        return ((Action(stage, Op.I, microbatch),),)
    own = (Action(stage, Op.F, microbatch),)
    if stage == num_stages - 1:
        return (own,)
    gradient = (Action(stage + 1, Op.B, microbatch), Action(stage + 1, Op.I, microbatch))
    return (own, gradient)


def parse_step(text: str) -> Step:
    """The step that a cell such as "2F0", "(0F7;7B3)" or torch's "(0F7;7B3)OVERLAP_F_B" stands for.

    Raises:
        ValueError: the cell is anything else; the message quotes it and says what was expected.
    """
    cell = text.strip()
    pair = _PAIR.fullmatch(cell)
    if pair is None:
        return _parse_action(cell, cell)
    forward, backward = (_parse_action(part.strip(), cell) for part in pair.groups())
    if forward.op != Op.F or backward.op != Op.B:
        raise ValueError(
            f"{cell!r} pairs {forward.op} with {backward.op}; a pair is a forward and then a full "
            "backward, such as (0F7;7B3)"
        )
    return Pair(forward, backward)


def _parse_action(text: str, cell: str) -> Action:
    match = _ACTION.fullmatch(text)
    if match is not None:
        stage, op, microbatch = match.groups()
        if len(stage) > _MOST_DIGITS or len(microbatch) > _MOST_DIGITS:
            shown = cell if len(cell) <= 40 else cell[:37] + "..."
            raise ValueError(f"{shown!r} has a number of more than {_MOST_DIGITS} digits")
        return Action(int(stage), Op(op), int(microbatch))
    if _TORCH_ONLY.fullmatch(text):
        raise ValueError(
            f"{cell!r} is one of torch's communication actions, and a schedule here holds only "
            "computation; save torch's schedule with format='compute_only', without REDUCE_GRAD"
        )
    raise ValueError(f"{cell!r} is not a step; expected {_EXPECTED}")
