"""Proves that a schedule can be executed: complete, placed, ordered and free of deadlock."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import NoReturn

from .actions import Action, Op, Pair, Step, actions
from .rendezvous import Discipline, rendezvous
from .replay import circle_of, replay
from .schedule import Position, Schedule
from .standstill import standstill
from .text_grid import cells, draw

# How much of the schedule an error shows around its place.
_RANKS_AROUND = 2
_STEPS_AROUND = 3

# What a chunk has, as bits, and the two ways in which it can have all of it.
_BIT = {Op.F: 1, Op.B: 2, Op.I: 4, Op.W: 8}
_WHOLE = _BIT[Op.F] | _BIT[Op.B]
_SPLIT = _BIT[Op.F] | _BIT[Op.I] | _BIT[Op.W]

# Place of each kind of action in the life of a chunk.
_KIND = {Op.F: 0, Op.B: 1, Op.I: 1, Op.W: 2}


class ScheduleError(ValueError):
    """A schedule that cannot be executed.

    Attributes:
        rank: the rank that is wrong.
        step: index of the step in that rank's row; of a missing action, where it would stand.
        action: the action that is wrong.
    """

    # Defaults, because unpickling constructs an exception from its message and sets the rest after.
    def __init__(
        self, message: str, rank: int = 0, step: int = 0, action: Action | None = None
    ) -> None:
        super().__init__(message)
        self.rank = rank
        self.step = step
        self.action = action


def verify(schedule: Schedule, transfers: str = Discipline.BUFFERED) -> None:
    """Raise unless every rank can execute its row to the end.

    Complete: each stage has, for each micro-batch, one F and either one B or one I and one W, on
    the rank that the placement says; or, in a schedule without any backward, one F. Ordered: in
    each row an action stands after what it needs, and the members of a pair need nothing of each
    other. Free of deadlock: a replay of all rows reaches their ends, and does so with messages that
    travel in the given way.

    Args:
        schedule: any.
        transfers: one of `Discipline`. "buffered", in which sends never block, is what the executor
            does and the weakest demand; the others are those of other runtimes.

    Raises:
        ScheduleError: the first thing that is wrong, with rank, step and action, and the schedule
            around it. Of a deadlock, every blocked rank, what it waits for and where that stands;
            of transfers that stand still, the ranks that wait for each other, with what, and which
            disciplines get the schedule through.
        ValueError: no such discipline.
    """
    discipline = Discipline.named(transfers)
    _check_complete(schedule, _check_steps(schedule))
    _check_rows_ordered(schedule)
    _check_deadlock(schedule)
    if discipline is not Discipline.BUFFERED:
        _check_transfers(schedule, discipline)


def _check_steps(schedule: Schedule) -> list[int]:
    """Each step is possible in itself, stands on its rank, and is there once.

    Returns:
        Which kinds of action each chunk has, as the sum of their bits, by micro-batch and stage.
    """
    stages, microbatches = schedule.num_stages, schedule.num_microbatches
    home = [schedule.placement.routes[route] for route in schedule.placement.route_of]
    held = [0] * (stages * microbatches)
    for rank, row in enumerate(schedule.rows):
        for index, step in enumerate(row):
            members: tuple[Action, ...]
            if isinstance(step, Pair):
                _check_pair(schedule, Position(rank, index), step)
                members = step
            else:
                if step.__class__ is not Action:
                    _fail_step(schedule, Position(rank, index), step)
                members = (step,)
            for action in members:
                stage, op, microbatch = action
                if op.__class__ is not Op:
                    _fail_kind(schedule, Position(rank, index), action)
                if stage.__class__ is not int or microbatch.__class__ is not int:
                    _fail_number(schedule, Position(rank, index), action)
                if not (0 <= stage < stages and 0 <= microbatch < microbatches):
                    _fail_unknown(schedule, Position(rank, index), action)
                if home[microbatch][stage] != rank:
                    _fail_misplaced(schedule, Position(rank, index), action)
                chunk = microbatch * stages + stage
                if held[chunk] & _BIT[op]:
                    _fail_twice(schedule, Position(rank, index), action)
                held[chunk] |= _BIT[op]
    return held


def _check_pair(schedule: Schedule, position: Position, step: Pair) -> None:
    if step.forward.__class__ is not Action or step.backward.__class__ is not Action:
        _fail_step(schedule, position, step)
    if step.forward.op != Op.F or step.backward.op != Op.B:
        _fail(schedule, position, step, "is not a pair of a forward and a full backward")
    # A micro-batch's backwards need all its forwards, and micro-batches need nothing of each other.
    if step.forward.microbatch == step.backward.microbatch:
        _fail(
            schedule,
            position,
            step,
            f"cannot overlap: {step.backward} needs {step.forward}, both being of micro-batch "
            f"{step.forward.microbatch}",
        )


def _fail_step(schedule: Schedule, position: Position, step: object) -> NoReturn:
    # Whatever it is, it cannot be drawn, nor be the `action` of the error.
    rank, index = position
    raise ScheduleError(
        f"schedule {schedule.name!r}, rank {rank}, step {index}: {step!r} is not a step; it must "
        "be an Action, or a Pair of two",
        rank,
        index,
    )


def _fail_number(schedule: Schedule, position: Position, action: Action) -> NoReturn:
    _fail(
        schedule,
        position,
        action,
        f"has stage {action.stage!r} and micro-batch {action.microbatch!r}; both must be of type "
        "int",
    )


def _fail_kind(schedule: Schedule, position: Position, action: Action) -> NoReturn:
    # A text equals the member of Op that it spells, but is not it: its time would be another's.
    known = ", ".join(f"Op.{op.name}" for op in Op)
    _fail(schedule, position, action, f"has {action.op!r} as its kind; it must be one of {known}")


def _fail_unknown(schedule: Schedule, position: Position, action: Action) -> NoReturn:
    _fail(
        schedule,
        position,
        action,
        f"does not exist: there are stages 0 to {schedule.num_stages - 1} and micro-batches 0 to "
        f"{schedule.num_microbatches - 1}",
    )


def _fail_misplaced(schedule: Schedule, position: Position, action: Action) -> NoReturn:
    home = schedule.placement.rank(action.stage, action.microbatch)
    _fail(
        schedule,
        position,
        action,
        f"is on the wrong rank: stage {action.stage} of micro-batch {action.microbatch} is "
        f"placed on rank {home}",
    )


def _fail_twice(schedule: Schedule, position: Position, action: Action) -> NoReturn:
    first = schedule.positions[action]
    _fail(
        schedule,
        position,
        action,
        f"is there twice: it also stands at {_where(first)}",
        also=[first],
    )


def _check_complete(schedule: Schedule, held: Sequence[int]) -> None:
    """Each stage has all its work on each micro-batch, and none of it in two ways."""
    possible = (_WHOLE, _SPLIT) if schedule.has_backward else (_BIT[Op.F],)
    for chunk, kinds in enumerate(held):
        if kinds not in possible:
            microbatch, stage = divmod(chunk, schedule.num_stages)
            _fail_incomplete(schedule, stage, microbatch, kinds)


def _fail_incomplete(schedule: Schedule, stage: int, microbatch: int, kinds: int) -> NoReturn:
    f, b, i, w = (Action(stage, op, microbatch) for op in (Op.F, Op.B, Op.I, Op.W))
    if not kinds & _BIT[Op.F]:
        _fail_missing(schedule, f, "")
    where = schedule.positions
    for half in (i, w):
        if kinds & _BIT[Op.B] and kinds & _BIT[half.op]:
            _fail(
                schedule,
                where[half],
                half,
                f"repeats work: the full backward {b} stands at {_where(where[b])}",
                also=[where[b]],
            )
    if not kinds & (_BIT[Op.I] | _BIT[Op.W]):
        _fail_missing(schedule, b, f", and so are {i} and {w}")
    missing, other = (i, w) if kinds & _BIT[Op.W] else (w, i)
    _fail_missing(schedule, missing, f", though {other} is there")


def _check_rows_ordered(schedule: Schedule) -> None:
    graph = schedule.graph
    for start, end in pairwise(graph.first):
        for number in range(start, end):
            for need in graph.needs[number]:
                if number < need < end:
                    _fail_order(schedule, Position(*graph.position(number)))


def _fail_order(schedule: Schedule, position: Position) -> NoReturn:
    for action in actions(schedule.rows[position.rank][position.step]):
        for need in schedule.needs[action]:
            there = schedule.positions[need]
            if there.rank == position.rank and there.step > position.step:
                _fail(
                    schedule,
                    position,
                    action,
                    f"stands before {need} (step {there.step}), which it needs",
                    also=[there],
                )
    raise AssertionError("called for a step that stands before what it needs")


def _check_deadlock(schedule: Schedule) -> None:
    if len(schedule.graph.order) == schedule.graph.num_steps:
        return
    order, blocked = replay(schedule)
    circle = circle_of({b.position.rank: schedule.positions[b.awaited].rank for b in blocked})
    lines = [
        f"can never start: deadlock after {len(order)} of {sum(map(len, schedule.rows))} steps",
        *(
            f"  rank {b.position.rank}, step {b.position.step}: {b.action} waits for {b.awaited}, "
            f"which stands at {_where(schedule.positions[b.awaited])}"
            for b in blocked
        ),
        "  the circle: rank " + ", which waits for rank ".join(map(str, (*circle, circle[0]))),
    ]
    culprit = next(b for b in blocked if b.position.rank == circle[0])
    _fail(
        schedule,
        culprit.position,
        culprit.action,
        "\n".join(lines),
        also=[b.position for b in blocked],
    )


def _check_transfers(schedule: Schedule, discipline: Discipline) -> None:
    outcome = rendezvous(schedule, discipline)
    if not outcome.completes:
        position, action, message, also = standstill(schedule, outcome)
        _fail(schedule, position, action, message, also)


def _where(position: Position) -> str:
    return f"step {position.step} of rank {position.rank}"


def _fail_missing(schedule: Schedule, action: Action, more: str) -> NoReturn:
    """Report an action that is nowhere, at the first place in its row where it could stand."""
    rank = schedule.placement.rank(action.stage, action.microbatch)
    row = list(enumerate(schedule.rows[rank]))
    before = [i for i, s in row if any(_comes_before(a, action) for a in actions(s))]
    index = before[-1] + 1 if before else 0
    after = [i for i, s in row if any(_comes_before(action, a) for a in actions(s))]
    bounds = [f"after {schedule.rows[rank][i]} at step {i}" for i in before[-1:]]
    bounds += [f"before {schedule.rows[rank][i]} at step {i}" for i in after[:1] if i >= index]
    place = f"; it belongs {' and '.join(bounds)}" if bounds else ""
    rows = cells(schedule)
    rows[rank].insert(index, f"no {action}")
    position = Position(rank, index)
    _raise(schedule, rows, position, action, f"is missing{more}{place}", [position])


def _comes_before(one: Action, other: Action) -> bool:
    """Whether `one` stands before `other` in the row of a rank that does both in the usual order.

    The actions of one micro-batch go F, B or I, W; one kind of action goes by micro-batch.
    """
    if one.stage != other.stage:
        return False
    if one.microbatch == other.microbatch:
        return _KIND[one.op] < _KIND[other.op]
    return _KIND[one.op] == _KIND[other.op] and one.microbatch < other.microbatch


def _fail(
    schedule: Schedule,
    position: Position,
    step: Step,
    message: str,
    also: Collection[Position] = (),
) -> NoReturn:
    _raise(schedule, cells(schedule), position, step, message, [position, *also])


def _raise(
    schedule: Schedule,
    rows: list[list[str]],
    position: Position,
    step: Step,
    message: str,
    marks: Collection[Position],
) -> NoReturn:
    rank, index = position
    near_ranks = range(max(0, rank - _RANKS_AROUND), min(len(rows), rank + _RANKS_AROUND + 1))
    longest = max(len(rows[r]) for r in near_ranks)
    near_steps = range(max(0, index - _STEPS_AROUND), min(longest, index + _STEPS_AROUND + 1))
    window = draw(rows, near_ranks, near_steps, marks)
    raise ScheduleError(
        f"schedule {schedule.name!r}, rank {rank}, step {index}: {step} {message}\n{window}",
        rank,
        index,
        actions(step)[0],
    )
