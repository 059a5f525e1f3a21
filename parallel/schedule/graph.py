"""A schedule as a graph of numbered steps, which the replay, the verifier and `simulate` walk."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

from .actions import Action, Op, Step, actions, dependencies

# In `StepGraph.needs`: a need that stands nowhere in the schedule.
MISSING = -1


@dataclass(frozen=True)
class StepGraph:
    """Steps numbered row after row, and which others each one needs.

    Integers in lists, because everything that asks what a schedule costs walks them: 100,000 steps
    are verified and simulated in about a second.

    Attributes:
        first: number of the first step of each rank, and after the last rank the number of steps.
        rank_of: the rank of each step.
        needs: per step, the steps that must have ended before it starts, besides the one before it
            in its row; MISSING for a need that the schedule does not hold.
    """

    first: tuple[int, ...]
    rank_of: Sequence[int]
    needs: Sequence[tuple[int, ...]]

    @property
    def num_steps(self) -> int:
        return self.first[-1]

    def position(self, number: int) -> tuple[int, int]:
        """(rank, index in its row) of a step."""
        rank = bisect_right(self.first, number) - 1
        return rank, number - self.first[rank]

    @cached_property
    def remote(self) -> Sequence[tuple[int, ...]]:
        """Per step, the steps on other ranks that need it."""
        rank_of = self.rank_of
        found: list[tuple[int, ...]] = [()] * self.num_steps
        for target, needs in enumerate(self.needs):
            rank = rank_of[target]
            for source in needs:
                if source != MISSING and rank_of[source] != rank:
                    found[source] += (target,)
        return found

    @cached_property
    def order(self) -> Sequence[int]:
        """Every step that can run, each after what it needs; all of them if there is no deadlock.

        Which steps can run does not depend on how fast ranks are, since rows are fixed and a step
        that can run stays so: what blocks here blocks under any timing.
        """
        needs = self.needs
        done = bytearray(self.num_steps + 1)  # one more, never set: done[MISSING]
        reached = list(self.first[:-1])
        waiting: dict[int, list[int]] = {}
        order: list[int] = []
        ready = list(range(len(reached)))[::-1]
        while ready:
            rank = ready.pop()
            step, end = reached[rank], self.first[rank + 1]
            while step < end:
                for need in needs[step]:
                    if not done[need]:
                        waiting.setdefault(need, []).append(rank)
                        break
                else:
                    done[step] = 1
                    order.append(step)
                    if step in waiting:
                        ready += waiting.pop(step)
                    step += 1
                    continue
                break
            reached[rank] = step
        return order


def step_graph(
    rows: Sequence[Sequence[Step]], positions: Mapping[Action, int], num_stages: int
) -> StepGraph:
    """The graph of a schedule's rows.

    Args:
        rows: per rank, its steps.
        positions: number of the step that holds each action.
        num_stages: of the pipeline.
    """
    first = [0]
    rank_of: list[int] = []
    needs: list[tuple[int, ...]] = []
    # A plain tuple finds an action as well as the action does, and is made in a fifth of the time.
    at = cast("Callable[[tuple[int, Op, int]], int | None]", positions.get)
    wanted: dict[tuple[int, Op], tuple[tuple[tuple[int, Op], ...], ...]] = {}
    for rank, row in enumerate(rows):
        rank_of += [rank] * len(row)
        first.append(len(rank_of))
        for step in row:
            found: list[int] = []
            for action in actions(step):
                stage, op, microbatch = action
                if (stage, op) not in wanted:  # the same for every micro-batch
                    wanted[stage, op] = tuple(
                        tuple((need.stage, need.op) for need in choices)
                        for choices in dependencies(action, num_stages)
                    )
                for choices in wanted[stage, op]:
                    for other, kind in choices:
                        place = at((other, kind, microbatch))
                        if place is not None:
                            found.append(place)
                            break
                    else:
                        found.append(MISSING)
            needs.append(tuple(found))
    return StepGraph(tuple(first), rank_of, needs)
