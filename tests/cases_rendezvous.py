"""Whether a schedule gets through, found apart from the library: by graphs and by threads."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from graphlib import CycleError, TopologicalSorter
from typing import TypeVar

from counterflow.parallel.schedule import Action, Discipline, Schedule, actions
from tests.cases_schedules import needed

BUFFERED, BATCHED, IN_ORDER, BLOCKING = Discipline

Parcel = tuple[Action, Action]  # what makes a message, and what needs it
Operation = tuple[str, Parcel]  # "send" or "receive"
Node = TypeVar("Node")


def programs(schedule: Schedule) -> list[list[list[Operation]]]:
    """Per rank, before each step and at the end: its transfers, worked out apart from the library.

    First the sends of the step before, then the receives for the step after.
    """
    rank_of = {a: r for r, row in enumerate(schedule.rows) for s in row for a in actions(s)}
    needs = needed(set(rank_of))
    needed_by = {
        made: taking
        for taking, wanted in needs.items()
        for made in wanted
        if rank_of[made] != rank_of[taking]
    }
    found: list[list[list[Operation]]] = []
    for row in schedule.rows:
        gaps: list[list[Operation]] = [[]]
        for step in row:
            gaps[-1] += [
                ("receive", (made, action))
                for action in actions(step)
                for made in needs[action]
                if rank_of[made] != rank_of[action]
            ]
            gaps.append([("send", (a, needed_by[a])) for a in actions(step) if a in needed_by])
        found.append(gaps)
    return found


def acyclic(graph: dict[Node, set[Node]]) -> bool:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError:
        return False
    return True


def sequences_agree(schedule: Schedule, *, both_directions: bool) -> bool:
    """Whether the two ends of each channel have its messages in the same order."""
    ends: dict[object, dict[int, list[Parcel]]] = defaultdict(lambda: defaultdict(list))
    rank = schedule.placement.rank
    for here, gaps in enumerate(programs(schedule)):
        for _, (made, taking) in (operation for gap in gaps for operation in gap):
            way = (rank(made.stage, made.microbatch), rank(taking.stage, taking.microbatch))
            ends[frozenset(way) if both_directions else way][here].append((made, taking))
    return all(one == other for one, other in (tuple(end.values()) for end in ends.values()))


def blocking_completes(schedule: Schedule) -> bool:
    """A message is one event of two ranks; a rank's events follow each other."""
    graph: dict[Parcel, set[Parcel]] = {}
    for gaps in programs(schedule):
        events = [parcel for gap in gaps for _, parcel in gap]
        for before, after in zip([None, *events], events, strict=False):
            graph.setdefault(after, set()).update([before] if before else [])
    return acyclic(graph)


def batched_completes(schedule: Schedule) -> bool:
    """A group is posted after the one before it and all counterparts of that have been."""
    plan = programs(schedule)
    at: dict[Parcel, dict[int, int]] = defaultdict(dict)
    for rank, gaps in enumerate(plan):
        for index, gap in enumerate(gaps):
            for _, parcel in gap:
                at[parcel][rank] = index
    graph = {
        (rank, index + 1): {(rank, index)} | {e for _, p in gap for e in at[p].items()}
        for rank, gaps in enumerate(plan)
        for index, gap in enumerate(gaps)
    }
    return acyclic(graph) and sequences_agree(schedule, both_directions=False)


EXPECTED: dict[Discipline, Callable[[Schedule], bool]] = {
    BUFFERED: lambda schedule: True,  # for those that verify
    BATCHED: batched_completes,
    IN_ORDER: lambda schedule: sequences_agree(schedule, both_directions=True),
    BLOCKING: blocking_completes,
}


class StuckError(Exception):
    pass


class Threads:
    """One thread a rank, which executes its row and meets the others; finds out if all wait."""

    def __init__(self, schedule: Schedule, discipline: Discipline) -> None:
        self.schedule, self.discipline = schedule, discipline
        self.plan = programs(schedule)
        self.posted: dict[object, list[Parcel]] = defaultdict(list)  # by channel and end
        self.executed = [0] * schedule.num_ranks
        self.stuck: set[int] = set()
        self.running = schedule.num_ranks
        self.waiting: dict[int, list[Operation]] = {}
        self.standstill = False
        self.changed = threading.Condition()

    def run(self) -> tuple[tuple[int, ...], set[int]]:
        """(steps executed by rank, ranks that are stuck)."""
        threads = [
            threading.Thread(target=self.rank, args=(rank,), daemon=True)
            for rank in range(self.schedule.num_ranks)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        return tuple(self.executed), self.stuck

    def rank(self, rank: int) -> None:
        try:
            for index, gap in enumerate(self.plan[rank]):
                if self.discipline is BLOCKING:
                    for operation in gap:
                        self.meet(rank, [operation], [operation])
                elif self.discipline is BATCHED:
                    self.meet(rank, gap, gap)
                else:
                    self.meet(rank, gap, [o for o in gap if o[0] == "receive"])
                self.executed[rank] = min(index + 1, len(self.schedule.rows[rank]))
            self.meet(rank, [], [operation for gap in self.plan[rank] for operation in gap])
        except StuckError:
            self.stuck.add(rank)
        with self.changed:
            self.running -= 1
            self.changed.notify_all()

    def meet(self, rank: int, post: list[Operation], wait: list[Operation]) -> None:
        with self.changed:
            for kind, parcel in post:
                self.ends(parcel)[kind == "receive"].append(parcel)
            self.changed.notify_all()
            self.waiting[rank] = wait
            while not self.through(wait):
                if len(self.waiting) == self.running:  # and so nobody else will change anything
                    self.standstill |= not any(map(self.through, self.waiting.values()))
                if self.standstill:
                    self.changed.notify_all()
                    raise StuckError
                assert self.changed.wait(timeout=30)
            del self.waiting[rank]

    def ends(self, parcel: Parcel) -> tuple[list[Parcel], list[Parcel]]:
        """What the sender and the receiver of a message have posted on its channel."""
        source, destination = (self.schedule.placement.rank(a.stage, a.microbatch) for a in parcel)
        ways = (source, destination)
        channel = frozenset(ways) if self.discipline is IN_ORDER else ways
        return self.posted[channel, source], self.posted[channel, destination]

    def through(self, operations: list[Operation]) -> bool:
        for _, parcel in operations:
            sent, received = self.ends(parcel)
            if self.discipline is BUFFERED:
                if parcel not in sent:
                    return False
                continue
            if parcel not in sent or parcel not in received:
                return False
            upto = sent.index(parcel) + 1
            if sent[:upto] != received[:upto]:
                return False
        return True
