"""Whether a schedule gets through where sends and receives wait for each other.

An order that is sound can still stand still: `verify` assumes that sends never block and receives
are matched by name, as `comm.p2p` does it. Other runtimes move bytes in other ways, and each of
those is a discipline here. All of them see the same messages (`messages.sends`); a rank takes up
its sends and receives between two steps: first the sends of what the step before made, then the
receives that the step after needs, of a pair the forward's first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from .actions import actions
from .messages import Message, sends, takers
from .schedule import Schedule


class Discipline(StrEnum):
    """How messages travel between two ranks.

    BUFFERED: sends return at once, a receive finds its message by name whenever it was sent, and a
        step waits for its receives. What this project's executor does.
    BATCHED: between two steps a rank posts its sends and receives as one group and waits for all of
        it (`batch_isend_irecv`, `ncclGroupStart` and `End`), as Megatron-LM runs 1F1B. Within a
        group operations do not wait for each other. Of one rank to one other, the n-th message sent
        is the n-th received, as NCCL knows no names. Published code that runs DualPipe or
        interleaved schedules in groups also posts some receives a step ahead and keeps some sends a
        step back, placed by hand; that is not modelled.
    IN_ORDER: each two ranks have one queue for both directions, as an NCCL communicator of two
        ranks on one stream: what torch makes for `isend` and `irecv` outside a group, as long as
        communicators come to be lazily. (After `init_process_group(device_id=...)` they all go
        through one communicator of all ranks, and a rank's operations wait for each other whoever
        the peer is: that is as BLOCKING.) A rank appends its operations without waiting; the heads
        of the two ends complete together, and only if one is the other's counterpart. A step waits
        for its receives, and the end of the row until all its queues are empty.
    BLOCKING: one operation after the other, each until the peer has come to its counterpart: plain
        `send` and `recv`, of gloo at any size, of NCCL and MPI for what they do not buffer. Of one
        rank to one other, the n-th message sent is the n-th received.

    What gets through BLOCKING does so under all others, and BUFFERED lets through all that verify.
    """

    BUFFERED = "buffered"
    BATCHED = "batched"
    IN_ORDER = "in-order"
    BLOCKING = "blocking"

    @classmethod
    def named(cls, name: str) -> Discipline:
        """The discipline of this name.

        Raises:
            ValueError: there is none; the message lists them.
        """
        if name not in list(cls):
            raise ValueError(f"unknown transfers {name!r}; known: {', '.join(cls)}")
        return cls(name)


class Halt(NamedTuple):
    """A rank that cannot go on.

    Attributes:
        rank: the rank.
        step: steps that it has executed, which is the index of the one it does not come to.
        awaited: its messages, sent or received, that it waits for in vain; in its own order.
    """

    rank: int
    step: int
    awaited: tuple[Message, ...]


class Clash(NamedTuple):
    """What two ranks, the lower first, would exchange next, which is not the same message."""

    lower: Message
    higher: Message


@dataclass(frozen=True)
class Rendezvous:
    """How far a schedule gets; as with a replay, how fast ranks are does not matter.

    Attributes:
        discipline: how messages travel.
        executed: per rank, how many steps of its row it executes.
        num_messages: messages that the schedule implies.
        num_delivered: those that get through.
        halts: the ranks that cannot finish, ascending; empty if the schedule gets through.
        clashes: ranks whose orders do not agree, ascending; each is a reason of its own.
    """

    discipline: Discipline
    executed: tuple[int, ...]
    num_messages: int
    num_delivered: int
    halts: tuple[Halt, ...]
    clashes: tuple[Clash, ...]

    @property
    def completes(self) -> bool:
        """Whether every rank comes to the end of its row, with all messages delivered."""
        return not self.halts


def rendezvous(schedule: Schedule, discipline: str) -> Rendezvous:
    """Run the rows against each other, without times, with messages that travel in a given way.

    Takes time linear in the number of steps.

    Args:
        schedule: any schedule that verifies.
        discipline: one of `Discipline`.

    Raises:
        ValueError: no such discipline.
    """
    chosen = Discipline.named(discipline)
    messages = [sent for rank in range(schedule.num_ranks) for sent in sends(schedule, rank)]
    rows = [_stops(gaps, chosen) for gaps in _operations(schedule, messages)]
    exchange = _Exchange(messages, chosen)
    reached = _walk(rows, exchange)
    halts = tuple(
        Halt(rank, rows[rank][at].step, exchange.missing(rows[rank][at].awaits))
        for rank, at in enumerate(reached)
        if at < len(rows[rank])
    )
    executed = list(map(len, schedule.rows))
    for halt in halts:
        executed[halt.rank] = halt.step
    return Rendezvous(
        chosen,
        tuple(executed),
        len(messages),
        sum(exchange.delivered),
        halts,
        exchange.clashes(),
    )


class _Stop(NamedTuple):
    """A place in a row where a rank takes up transfers: before `step`, or at the end of the row.

    Attributes:
        step: index of the step that comes next.
        posts: sends, the numbers of messages, and receives, their complements.
        awaits: numbers of the messages that must have got through before the rank goes on.
    """

    step: int
    posts: Sequence[int]
    awaits: list[int]


def _operations(schedule: Schedule, messages: Sequence[Message]) -> list[list[list[int]]]:
    """Per rank, before each of its steps and after the last: its sends and receives, in order.

    A send is the number of its message, a receive that number's complement.
    """
    going = {message.action: index for index, message in enumerate(messages)}
    coming = {
        taking: index
        for index, message in enumerate(messages)
        for taking in takers(message.action, schedule.num_stages)
    }
    rows: list[list[list[int]]] = []
    for row in schedule.rows:
        gaps: list[list[int]] = [[] for _ in range(len(row) + 1)]
        for index, step in enumerate(row):
            for action in actions(step):
                if action in coming:
                    gaps[index].append(~coming[action])
                if action in going:
                    gaps[index + 1].append(going[action])
        rows.append(gaps)
    return rows


def _stops(gaps: Sequence[list[int]], discipline: Discipline) -> list[_Stop]:
    """Where a rank posts which of its operations, and what it then waits for."""
    if discipline is Discipline.BLOCKING:
        return [_Stop(step, (op,), [max(op, ~op)]) for step, ops in enumerate(gaps) for op in ops]
    if discipline is Discipline.BATCHED:
        return [_Stop(step, ops, [max(op, ~op) for op in ops]) for step, ops in enumerate(gaps)]
    stops = [_Stop(step, ops, [~op for op in ops if op < 0]) for step, ops in enumerate(gaps)]
    if discipline is Discipline.IN_ORDER:
        stops[-1].awaits.extend(op for ops in gaps for op in ops if op >= 0)
    return stops


class _Exchange:
    """What ranks have posted, and what has got through."""

    def __init__(self, messages: Sequence[Message], discipline: Discipline) -> None:
        self._messages = messages
        self._discipline = discipline
        self._shared = discipline is Discipline.IN_ORDER
        # By source and destination, or by lower and higher rank where both directions share one:
        # what the lower and the higher rank have posted and what has not got through.
        self._queues: dict[tuple[int, int], tuple[deque[int], deque[int]]] = {}
        self.delivered = bytearray(len(messages))

    def post(self, operation: int) -> int | None:
        """Take up a send or receive; the message that gets through by it, if one does."""
        number = max(operation, ~operation)
        if self._discipline is Discipline.BUFFERED:
            if operation < 0:
                return None
            self.delivered[number] = True
            return number
        _, source, destination = self._messages[number]
        key = (source, destination)
        if self._shared and destination < source:
            key = (destination, source)
        if key not in self._queues:
            self._queues[key] = (deque(), deque())
        lower, higher = self._queues[key]
        by_lower = (operation >= 0) is (source < destination)
        (lower if by_lower else higher).append(number)
        if lower and higher and lower[0] == higher[0]:
            self.delivered[number] = True
            lower.popleft()
            return higher.popleft()
        return None

    def missing(self, awaited: Sequence[int]) -> tuple[Message, ...]:
        return tuple(self._messages[number] for number in awaited if not self.delivered[number])

    def clashes(self) -> tuple[Clash, ...]:
        return tuple(
            Clash(self._messages[lower[0]], self._messages[higher[0]])
            for _, (lower, higher) in sorted(self._queues.items())
            if lower and higher
        )

    def peers(self, number: int) -> tuple[int, int]:
        _, source, destination = self._messages[number]
        return source, destination


def _walk(rows: Sequence[Sequence[_Stop]], exchange: _Exchange) -> list[int]:
    """Let every rank go as far as it can; how many of its stops each has passed.

    Whatever has been posted stays posted and whatever has got through stays so: the order in which
    ranks are taken does not change how far they get.
    """
    reached = [0] * len(rows)
    seen = [0] * len(rows)  # of the awaits of the present stop, how many have got through
    posted = [False] * len(rows)
    ready = list(range(len(rows)))[::-1]
    while ready:
        rank = ready.pop()
        row = rows[rank]
        while reached[rank] < len(row):
            stop = row[reached[rank]]
            if not posted[rank]:
                posted[rank] = True
                for operation in stop.posts:
                    through = exchange.post(operation)
                    if through is not None:
                        ready += (peer for peer in exchange.peers(through) if peer != rank)
            while seen[rank] < len(stop.awaits) and exchange.delivered[stop.awaits[seen[rank]]]:
                seen[rank] += 1
            if seen[rank] < len(stop.awaits):
                break
            reached[rank] += 1
            seen[rank], posted[rank] = 0, False
    return reached
