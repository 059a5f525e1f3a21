"""The schedule itself: a plain value that says which rank does what, in which order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from .actions import Action, Op, Step, actions, dependencies
from .graph import StepGraph, step_graph
from .messages import takers
from .placement import Placement


class Position(NamedTuple):
    """A place in a schedule: the rank, and the index of the step in its row, from 0."""

    rank: int
    step: int


@dataclass(frozen=True)
class Schedule:
    """Per rank, a list of steps, and where the stages are.

    Constructing one checks its outline only; `verify` proves that it can be executed.

    Attributes:
        name: one printable line, such as "dualpipe".
        placement: which rank runs which stage of which micro-batch.
        rows: one tuple a rank: its steps, in order.

    Raises:
        ValueError: the name is not one printable line, the rows are not tuples, or rows and ranks
            differ in number.
    """

    name: str
    placement: Placement
    rows: tuple[tuple[Step, ...], ...]

    def __post_init__(self) -> None:
        if not self.name or not self.name.isprintable() or self.name != self.name.strip():
            raise ValueError(
                f"schedule name {self.name!r} must be one printable line with no space around it"
            )
        # Rows of lists could change after they were verified, and what was derived from them not.
        for row in (self.rows, *self.rows):
            if type(row) is not tuple:
                kind = type(row).__name__
                raise ValueError(
                    f"schedule {self.name!r}: rows must be a tuple of tuples, not {kind}"
                )
        if len(self.rows) != self.placement.num_ranks:
            raise ValueError(
                f"schedule {self.name!r} has {len(self.rows)} rows, but its placement has "
                f"{self.placement.num_ranks} ranks; one row a rank is needed"
            )

    @property
    def num_ranks(self) -> int:
        return self.placement.num_ranks

    @property
    def num_stages(self) -> int:
        return self.placement.num_stages

    @property
    def num_microbatches(self) -> int:
        return self.placement.num_microbatches

    @cached_property
    def positions(self) -> Mapping[Action, Position]:
        """Where each action stands; of a duplicate, the first place by rank and then step."""
        graph = self.graph
        return {a: Position(*graph.position(n)) for a, n in self.numbers.items()}

    @cached_property
    def graph(self) -> StepGraph:
        """The steps, numbered row after row, and what each one needs."""
        return step_graph(self.rows, self.numbers, self.num_stages)

    @cached_property
    def numbers(self) -> Mapping[Action, int]:
        """Of each action, the number of its step in `graph`; of a duplicate, of the first."""
        numbers: dict[Action, int] = {}
        number = 0
        for row in self.rows:
            for step in row:
                for action in actions(step):
                    numbers.setdefault(action, number)
                number += 1
        return numbers

    @cached_property
    def outgoing(self) -> Sequence[Sequence[tuple[int, Action]]]:
        """Of each step of `graph`, what it sends to other ranks, in the order of sending.

        The steps there that need a result of it, and the action whose result that is.
        """
        numbers, rank_of = self.numbers, self.graph.rank_of
        steps = (step for row in self.rows for step in row)
        return [
            [
                (numbers[taking], action)
                for action in actions(step)
                for taking in takers(action, self.num_stages)
                if taking in numbers and rank_of[numbers[taking]] != rank
            ]
            for step, rank in zip(steps, rank_of, strict=True)
        ]

    @cached_property
    def needs(self) -> Mapping[Action, tuple[Action, ...]]:
        """What must have ended before each action starts, one action a requirement.

        Where a requirement has alternatives (B or I of the next stage), the one that the schedule
        holds; the first one where it holds none.
        """
        held = self.numbers
        return {
            action: tuple(
                next((choice for choice in choices if choice in held), choices[0])
                for choices in dependencies(action, self.num_stages)
            )
            for action in held
        }

    @cached_property
    def has_backward(self) -> bool:
        """False for a schedule that only runs forward, as evaluation does."""
        return any(action.op is not Op.F for action in self.numbers)


def forward_only(schedule: Schedule) -> Schedule:
    """The forwards of each row in their order, as evaluation runs them; named "<name>-forward"."""
    rows = tuple(
        tuple(action for step in row for action in actions(step) if action.op == Op.F)
        for row in schedule.rows
    )
    return Schedule(f"{schedule.name}-forward", schedule.placement, rows)
