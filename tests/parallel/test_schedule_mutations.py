"""No mutation that breaks a valid schedule gets past the verifier: 11,000 random ones, seeded."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from graphlib import CycleError, TopologicalSorter

import pytest

from counterflow.parallel.schedule import (
    Action,
    Op,
    Pair,
    Schedule,
    ScheduleError,
    Step,
    actions,
    build,
    names,
    verify,
)
from tests.cases_schedules import all_actions, needed, with_rows

F, B, I, W = Op.F, Op.B, Op.I, Op.W  # noqa: E741
SEED = 20_241_226
OF_EACH_KIND = 1000
SIZES = ((1, 4), (2, 2), (2, 5), (2, 8), (3, 6), (4, 4), (4, 8))

Rows = list[list[Step]]
Place = tuple[int, int]  # rank, index in its row


class Valid:
    """A valid schedule and its needs, worked out once and apart from the library's own rule."""

    def __init__(self, schedule: Schedule) -> None:
        verify(schedule)
        self.schedule = schedule
        self.needs = needed(set(all_actions(schedule)))
        places = [(r, i) for r, row in enumerate(schedule.rows) for i in range(len(row))]
        self.singles = [p for p in places if isinstance(self.step(p), Action)]
        self.pairs = [p for p in places if isinstance(self.step(p), Pair)]
        self.places = places

    def step(self, place: Place) -> Step:
        return self.schedule.rows[place[0]][place[1]]

    def rows(self) -> Rows:
        return [list(row) for row in self.schedule.rows]

    def can_run(self, rows: Rows) -> bool:
        """Whether these rows, of the same actions, have no circle of needs and order in rows."""
        step_of = {
            action: (rank, index)
            for rank, row in enumerate(rows)
            for index, step in enumerate(row)
            for action in actions(step)
        }
        graph: dict[Place, set[Place]] = {
            (rank, index): {(rank, index - 1)} if index else set()
            for rank, row in enumerate(rows)
            for index in range(len(row))
        }
        for action, place in step_of.items():
            graph[place].update(step_of[need] for need in self.needs[action])
        try:
            TopologicalSorter(graph).prepare()
        except CycleError:
            return False
        return True

    def stands_before_its_need(self, row: list[Step]) -> bool:
        """Whether a row alone shows what is wrong: an action before one that it needs."""
        seen: set[Action] = set()
        here = {action for step in row for action in actions(step)}
        for step in row:
            if any(self.needs[action] & here - seen for action in actions(step)):
                return True
            seen.update(actions(step))
        return False


# The mutated rows, or None where the choice made at random does not break the schedule.
Mutation = Callable[[Valid, random.Random], Rows | None]


def pick(valid: Valid, rng: random.Random) -> tuple[Place, Action, Rows]:
    """A random action, its place, and the rows without it."""
    rank, index = rng.choice(valid.places)
    rows = valid.rows()
    action = rng.choice(actions(rows[rank][index]))
    rows[rank][index : index + 1] = [a for a in actions(rows[rank][index]) if a != action]
    return (rank, index), action, rows


def insert(rows: Rows, rank: int, step: Step, rng: random.Random) -> Rows:
    rows[rank].insert(rng.randint(0, len(rows[rank])), step)
    return rows


def other_rank(valid: Valid, rank: int, rng: random.Random) -> int | None:
    others = [r for r in range(valid.schedule.num_ranks) if r != rank]
    return rng.choice(others) if others else None


def drop(valid: Valid, rng: random.Random) -> Rows | None:
    return pick(valid, rng)[2]


def duplicate_in_its_row(valid: Valid, rng: random.Random) -> Rows | None:
    (rank, _), action, _ = pick(valid, rng)
    return insert(valid.rows(), rank, action, rng)


def duplicate_on_another_rank(valid: Valid, rng: random.Random) -> Rows | None:
    (rank, _), action, _ = pick(valid, rng)
    there = other_rank(valid, rank, rng)
    return None if there is None else insert(valid.rows(), there, action, rng)


def move_to_another_rank(valid: Valid, rng: random.Random) -> Rows | None:
    (rank, _), action, rows = pick(valid, rng)
    there = other_rank(valid, rank, rng)
    return None if there is None else insert(rows, there, action, rng)


def swap(valid: Valid, rng: random.Random) -> tuple[Rows, int]:
    """Two random steps of a row exchanged, and its rank."""
    rows = valid.rows()
    rank, index = rng.choice(valid.places)
    other = rng.randrange(len(rows[rank]))
    rows[rank][index], rows[rank][other] = rows[rank][other], rows[rank][index]
    return rows, rank


def swap_across_a_need(valid: Valid, rng: random.Random) -> Rows | None:
    rows, rank = swap(valid, rng)
    return rows if valid.stands_before_its_need(rows[rank]) else None


def swap_across_other_ranks(valid: Valid, rng: random.Random) -> Rows | None:
    """The row alone looks right: only by way of other ranks does a step wait for itself."""
    rows, rank = swap(valid, rng)
    if valid.stands_before_its_need(rows[rank]) or valid.can_run(rows):
        return None
    return rows


def change_kind(valid: Valid, rng: random.Random) -> Rows | None:
    rank, index = rng.choice(valid.singles)
    rows = valid.rows()
    action = rows[rank][index]
    assert isinstance(action, Action)
    rows[rank][index] = action._replace(op=rng.choice([op for op in Op if op is not action.op]))
    return rows


def another_number(number: int, count: int, rng: random.Random) -> int:
    return rng.choice([n for n in (*range(-1, count + 1), 10**30) if n != number])


def change_number(valid: Valid, rng: random.Random) -> Rows | None:
    """The stage or the micro-batch of an action, or of a member of a pair."""
    (rank, index), action, _ = pick(valid, rng)
    if rng.random() < 0.5:
        stage = another_number(action.stage, valid.schedule.num_stages, rng)
        wrong = action._replace(stage=stage)
    else:
        number = another_number(action.microbatch, valid.schedule.num_microbatches, rng)
        wrong = action._replace(microbatch=number)
    rows = valid.rows()
    step = rows[rank][index]
    if isinstance(step, Pair):
        rows[rank][index] = Pair(*(wrong if member == action else member for member in step))
    else:
        rows[rank][index] = wrong
    return rows


def split_a_pair_wrongly(valid: Valid, rng: random.Random) -> Rows | None:
    """One member stays, the other goes where it cannot stand, in the row or on another rank."""
    if not valid.pairs:
        return None
    rank, index = rng.choice(valid.pairs)
    rows = valid.rows()
    stays, goes = rng.sample(actions(rows[rank][index]), 2)
    rows[rank][index] = stays
    there = other_rank(valid, rank, rng)
    if there is not None and rng.random() < 0.3:
        return insert(rows, there, goes, rng)
    insert(rows, rank, goes, rng)
    return None if valid.can_run(rows) else rows


def pair_across_a_dependency(valid: Valid, rng: random.Random) -> Rows | None:
    """A forward and a full backward of one row overlapped though one must wait for the other."""
    rank = rng.randrange(valid.schedule.num_ranks)
    rows = valid.rows()
    forwards = [a for step in rows[rank] for a in actions(step) if a.op is F]
    backwards = [a for step in rows[rank] for a in actions(step) if a.op is B]
    if not backwards:
        return None
    pair = Pair(rng.choice(forwards), rng.choice(backwards))
    row: list[Step] = []
    for step in rows[rank]:  # pairs that lose a member fall apart
        row += actions(step) if set(actions(step)) & set(pair) else (step,)
    row[row.index(rng.choice(pair))] = pair
    rows[rank] = [step for step in row if step not in (pair.forward, pair.backward)]
    return None if valid.can_run(rows) else rows


def wrong_kind_in_a_pair(valid: Valid, rng: random.Random) -> Rows | None:
    """A pair turned round, a member of another kind, or a pair of any two steps."""
    rows = valid.rows()
    if valid.pairs and rng.random() < 0.5:
        rank, index = rng.choice(valid.pairs)
        forward, backward = actions(rows[rank][index])
        wrong_forward = forward._replace(op=rng.choice((B, I, W)))
        wrong_backward = backward._replace(op=rng.choice((F, I, W)))
        rows[rank][index] = rng.choice(
            (Pair(backward, forward), Pair(wrong_forward, backward), Pair(forward, wrong_backward))
        )
        return rows
    rank, index = rng.choice(valid.singles)
    one, other = rows[rank][index : index + 2] if index + 1 < len(rows[rank]) else (None, None)
    if not isinstance(one, Action) or not isinstance(other, Action):
        return None
    if (one.op, other.op) == (F, B):
        one, other = other, one
    rows[rank][index : index + 2] = [Pair(one, other)]
    return rows


MUTATIONS: tuple[Mutation, ...] = (
    drop,
    duplicate_in_its_row,
    duplicate_on_another_rank,
    move_to_another_rank,
    swap_across_a_need,
    swap_across_other_ranks,
    change_kind,
    change_number,
    split_a_pair_wrongly,
    pair_across_a_dependency,
    wrong_kind_in_a_pair,
)


def valid_schedules() -> Iterable[Valid]:
    for name in names():
        for ranks, microbatches in SIZES:
            try:
                schedule = build(name, ranks=ranks, microbatches=microbatches)
            except ValueError:  # not a size of this schedule
                continue
            yield Valid(schedule)


def check_refused(schedule: Schedule) -> ScheduleError:
    """Refused, with attributes and an arrow that agree with each other."""
    with pytest.raises(ScheduleError) as caught:
        verify(schedule)
    error = caught.value
    row = schedule.rows[error.rank]
    assert str(error).startswith(
        f"schedule {schedule.name!r}, rank {error.rank}, step {error.step}: "
    )
    if f": {error.action} is missing" in str(error):
        assert 0 <= error.step <= len(row)
        assert f"-> no {error.action}" in str(error)
    else:
        assert error.action in actions(row[error.step])
        assert f"-> {row[error.step]}" in str(error)
    return error


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_every_mutation_is_refused_with_its_place_and_an_arrow(mutate: Mutation) -> None:
    rng = random.Random(f"{SEED} {mutate.__name__}")
    every = list(valid_schedules())
    tried: Counter[str] = Counter()
    while tried.total() < OF_EACH_KIND:
        valid = rng.choice(every)
        rows = mutate(valid, rng)
        if rows is not None:
            check_refused(with_rows(valid.schedule, rows))
            tried[valid.schedule.name] += 1
    possible = every
    if mutate is split_a_pair_wrongly:
        possible = [valid for valid in every if valid.pairs]
    if mutate is pair_across_a_dependency:
        possible = [valid for valid in every if any(action.op is B for action in valid.needs)]
    assert set(tried) == {valid.schedule.name for valid in possible}


def test_there_are_ten_thousand_mutations() -> None:
    assert len(MUTATIONS) * OF_EACH_KIND >= 10_000
