"""Why a rank waits, and which chain of steps and messages makes the step as long as it is."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, TypeAlias

from ..schedule import Action, Step
from ..schedule.clock import row_ends
from .events import Delivery, Finish, Result, Transfer


class Wait(NamedTuple):
    """Time in which a rank can do nothing, because a message is not there.

    Attributes:
        rank: the one that waits.
        step: the step that cannot start.
        start, end: of the wait; at `end` the step starts.
        action: the last that the step lacks.
        source: the rank that does `action`.
        travelling: how much of the wait passes after `source` has ended it.
    """

    rank: int
    step: Step
    start: float
    end: float
    action: Action
    source: int
    travelling: float


@dataclass(frozen=True)
class Idle:
    """A rank's idle time by its cause. The parts sum to `Result.idle`, but for rounding.

    Attributes:
        on_rank: per rank waited for, the time until it had ended what was lacking.
        travelling: waiting for messages under way.
        finish: after its row, waiting for other ranks' gradients.
        end: done, while others are not.
    """

    on_rank: dict[int, float]
    travelling: float
    finish: float
    end: float


class StepLink(NamedTuple):
    """A step of a rank, as part of the critical path."""

    rank: int
    step: Step
    start: float
    end: float


class TransferLink(NamedTuple):
    """A message, as part of the critical path.

    From `transfer.start` to its arrival; where the next link is a message that had to wait for it,
    to when it leaves the lane.
    """

    transfer: Transfer
    start: float
    end: float


class FinishLink(NamedTuple):
    """A reduction or optimizer step, as part of the critical path."""

    rank: int
    finish: Finish
    start: float
    end: float


Link: TypeAlias = StepLink | TransferLink | FinishLink


def waits(result: Result) -> tuple[tuple[Wait, ...], ...]:
    """Per rank, its waits within its row, in their order."""
    graph = result.plan.graph
    last = _last_deliveries(result)
    found: list[tuple[Wait, ...]] = []
    for rank, row in enumerate(result.plan.rows):
        mine: list[Wait] = []
        free = 0.0
        for number, step in enumerate(row, start=graph.first[rank]):
            start = result.starts[number]
            if start > free:
                source, _, transfer = last[number]
                travelling = start - max(free, result.ends[source])
                mine.append(
                    Wait(rank, step, free, start, transfer.action, transfer.source, travelling)
                )
            free = result.ends[number]
        found.append(tuple(mine))
    return tuple(found)


def idle_by_cause(result: Result) -> tuple[Idle, ...]:
    """Per rank, where its idle time goes."""
    found: list[Idle] = []
    row_end = row_ends(result.plan, result.ends)
    for rank, mine in enumerate(waits(result)):
        on_rank: dict[int, float] = {}
        travelling = 0.0
        for wait in mine:
            travelling += wait.travelling
            waited = wait.end - wait.start - wait.travelling
            if waited > 0:
                on_rank[wait.source] = on_rank.get(wait.source, 0.0) + waited
        finish = result.finish[rank]
        after = finish[-1].end - row_end[rank] if finish else 0.0
        in_finish = after - sum(part.end - part.start for part in finish)
        found.append(
            Idle(
                dict(sorted(on_rank.items())),
                travelling,
                max(0.0, in_finish),
                result.makespan - result.done[rank],
            )
        )
    return tuple(found)


def critical_path(result: Result) -> tuple[Link, ...]:
    """The chain of steps and messages, without a gap, that lasts from 0 to the makespan.

    As long as it takes as long, the makespan does: shortening anything that is not on it changes
    nothing. Where several chains are as long, the one that stays on its rank.
    """
    graph = result.plan.graph
    last = _last_deliveries(result)
    before = _deliveries_before(result)
    rank = max(range(result.ranks), key=lambda r: result.done[r])
    path: list[Link] = []
    number = _finish_path(result, rank, path)
    while True:
        rank, index = graph.position(number)
        start, end = result.starts[number], result.ends[number]
        path.append(StepLink(rank, result.plan.rows[rank][index], start, end))
        if index and result.ends[number - 1] == start:
            number -= 1
            continue
        if start == 0:
            return tuple(reversed(path))
        delivery, until = last[number], start
        while True:
            path.append(TransferLink(delivery.transfer, delivery.transfer.start, until))
            if delivery.transfer.start == result.ends[delivery.source]:
                break
            delivery, until = before[delivery], delivery.transfer.start  # it kept the lane busy
        number = delivery.source


def _deliveries_before(result: Result) -> dict[Delivery, Delivery]:
    """Of each delivery, the one that its rank sent before."""
    return {
        after: before
        for before, after in pairwise(result.deliveries)
        if before.transfer.source == after.transfer.source
    }


def _finish_path(result: Result, rank: int, path: list[Link]) -> int:
    """Walk back through what follows the rows; the number of the last step of the row reached."""
    index = len(result.finish[rank])
    while index:
        part = result.finish[rank][index - 1]
        path.append(FinishLink(rank, part, part.start, part.end))
        rank, index = _ended_at(result, part, rank, index - 1)
    return result.plan.graph.first[rank + 1] - 1


def _ended_at(result: Result, part: Finish, rank: int, index: int) -> tuple[int, int]:
    """Who let a part start that follows `rank`'s first `index` ones: itself, if it can be.

    Returns:
        A rank and how many parts of what follows its row had ended then.
    """
    met = {
        "reduce": (),
        "mirror": result.plan.placement.replicas(part.stage),
        "optimizer": range(result.ranks),
    }[part.kind]
    row_end = row_ends(result.plan, result.ends)
    others = ((r, len(result.finish[r])) for r in met if r != rank)
    for candidate, most in ((rank, index), *others):
        ends = [row_end[candidate], *(done.end for done in result.finish[candidate])]
        for count in range(most, -1, -1):
            if ends[count] == part.start:
                return candidate, count
    raise AssertionError("what follows a row starts when something ends")


def _last_deliveries(result: Result) -> dict[int, Delivery]:
    """Per step that has messages to wait for, the one that arrives last."""
    last: dict[int, Delivery] = {}
    for delivery in result.deliveries:
        known = last.get(delivery.target)
        if known is None or delivery.transfer.end > known.transfer.end:
            last[delivery.target] = delivery
    return last
