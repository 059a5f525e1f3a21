"""The verifier accepts exactly what can be executed, and names what is wrong where."""

import pickle
import re
from graphlib import CycleError, TopologicalSorter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.parallel.schedule import (
    Action,
    Op,
    Pair,
    Placement,
    Schedule,
    ScheduleError,
    Step,
    actions,
    build,
    forward_only,
    replay,
    verify,
)
from tests.cases_schedules import (
    all_actions,
    built_schedules,
    needed,
    random_schedules,
    with_rows,
)

F, B, I, W = Op.F, Op.B, Op.I, Op.W  # noqa: E741
SMALL = [
    build("1f1b", ranks=3, microbatches=4),
    build("dualpipe", ranks=4, microbatches=10),
    build("dualpipev", ranks=2, microbatches=5),
]


def rows_of(schedule: Schedule) -> list[list[Step]]:
    return [list(row) for row in schedule.rows]


def without(step: Step, action: Action) -> list[Step]:
    """What is left of a step when one of its actions is dropped."""
    return [other for other in actions(step) if other != action]


def refused(schedule: Schedule) -> ScheduleError:
    with pytest.raises(ScheduleError) as caught:
        verify(schedule)
    error = caught.value
    start = f"schedule {schedule.name!r}, rank {error.rank}, step {error.step}: "
    assert str(error).startswith(start)
    assert f"-> {'no ' if ' is missing' in str(error) else ''}" in str(error)
    return error


def executable(schedule: Schedule) -> bool:
    """Whether rows and needs together have no cycle: what a deadlock is, found another way."""
    step_of = {
        action: (rank, index)
        for rank, row in enumerate(schedule.rows)
        for index, step in enumerate(row)
        for action in actions(step)
    }
    graph: dict[tuple[int, int], set[tuple[int, int]]] = {}
    for (rank, index), wanted in [
        (step_of[a], {step_of[n] for n in needs})
        for a, needs in needed(set(all_actions(schedule))).items()
    ]:
        before = {(rank, index - 1)} if index else set()
        graph.setdefault((rank, index), set()).update(wanted | before)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError:
        return False
    return True


@given(random_schedules())
@settings(deadline=None, max_examples=100)
def test_whatever_can_be_executed_verifies(schedule: Schedule) -> None:
    assert executable(schedule)
    verify(schedule)
    verify(forward_only(schedule))


@given(random_schedules(), st.data())
@settings(deadline=None, max_examples=200)
def test_after_a_swap_in_a_row_exactly_the_executable_schedules_verify(
    schedule: Schedule, data: st.DataObject
) -> None:
    rows = rows_of(schedule)
    rank = data.draw(st.integers(0, len(rows) - 1))
    i, j = sorted(data.draw(st.integers(0, len(rows[rank]) - 1)) for _ in range(2))
    rows[rank][i], rows[rank][j] = rows[rank][j], rows[rank][i]
    swapped = with_rows(schedule, rows)
    if executable(swapped):
        verify(swapped)
        return
    error = refused(swapped)
    assert f"rank {rank}, step" in str(error)


def test_every_swap_of_neighbours_in_small_schedules_is_judged_rightly() -> None:
    verdicts = {True: 0, False: 0}
    for schedule in SMALL:
        for rank, row in enumerate(schedule.rows):
            for index in range(len(row) - 1):
                rows = rows_of(schedule)
                rows[rank][index : index + 2] = reversed(rows[rank][index : index + 2])
                swapped = with_rows(schedule, rows)
                verdict = executable(swapped)
                verdicts[verdict] += 1
                if verdict:
                    verify(swapped)
                else:
                    error = refused(swapped)
                    assert f"rank {rank}, step" in str(error)
                    if "stands before" in str(error):
                        assert (error.rank, error.step) == (rank, index)
                        assert error.action in actions(rows[rank][index])
    assert min(verdicts.values()) > 10


def test_every_dropped_action_is_named_with_its_rank_and_place() -> None:
    for schedule in SMALL:
        for rank, row in enumerate(schedule.rows):
            for index, step in enumerate(row):
                for dropped in actions(step):
                    rows = rows_of(schedule)
                    rows[rank][index : index + 1] = without(step, dropped)
                    error = refused(with_rows(schedule, rows))
                    assert error.rank == rank
                    assert error.action == dropped
                    assert f": {dropped} is missing" in str(error)
                    assert f"-> no {dropped}" in str(error)
                    # Where it was cannot be known, only where it could stand first.
                    assert 0 <= error.step <= index


def test_a_missing_action_is_placed_between_its_neighbours() -> None:
    schedule = build("dualpipe", ranks=4, microbatches=8)
    rows = rows_of(schedule)
    assert str(rows[1].pop(9)) == "2B6"
    message = str(refused(with_rows(schedule, rows)))
    assert (
        "rank 1, step 8: 2B6 is missing, and so are 2I6 and 2W6; "
        "it belongs after (1F3;2B5) at step 7 and before 2I7 at step 10\n" in message
    )


def test_half_a_backward_alone_is_named() -> None:
    schedule = build("dualpipe", ranks=2, microbatches=4)
    for op, other in ((I, W), (W, I)):
        rank, index = next(p for a, p in schedule.positions.items() if a.op == op)
        rows = rows_of(schedule)
        (dropped,) = actions(rows[rank].pop(index))
        left = Action(dropped.stage, other, dropped.microbatch)
        error = refused(with_rows(schedule, rows))
        assert error.action == dropped
        assert f"{dropped} is missing, though {left} is there" in str(error)


def test_every_duplicate_is_named_with_both_its_places() -> None:
    for schedule in SMALL:
        for rank, row in enumerate(schedule.rows):
            for index, step in enumerate(row):
                for twice in actions(step):
                    error = refused(
                        with_rows(
                            schedule, [[*r, twice] if r is row else [*r] for r in schedule.rows]
                        )
                    )
                    assert (error.rank, error.step, error.action) == (rank, len(row), twice)
                    assert f"is there twice: it also stands at step {index} of rank {rank}" in str(
                        error
                    )


def test_every_action_on_a_wrong_rank_is_named_with_the_right_one() -> None:
    for schedule in SMALL:
        for rank, row in enumerate(schedule.rows):
            for index, step in enumerate(row):
                for moved in actions(step):
                    rows = rows_of(schedule)
                    rows[rank][index : index + 1] = without(step, moved)
                    wrong = (rank + 1) % schedule.num_ranks
                    place = min(index, len(rows[wrong]))
                    rows[wrong].insert(place, moved)
                    error = refused(with_rows(schedule, rows))
                    assert (error.rank, error.step, error.action) == (wrong, place, moved)
                    assert f"micro-batch {moved.microbatch} is placed on rank {rank}" in str(error)


def test_a_full_backward_beside_its_half_is_refused() -> None:
    schedule = build("1f1b", ranks=2, microbatches=2)
    for op in (I, W):
        rows = rows_of(schedule)
        rows[1].append(Action(1, op, 0))
        error = refused(with_rows(schedule, rows))
        assert (error.rank, error.step, error.action) == (1, 4, Action(1, op, 0))
        assert "repeats work: the full backward 1B0 stands at step 1 of rank 1" in str(error)


@pytest.mark.parametrize("action", [Action(2, F, 0), Action(0, F, 2), Action(-1, F, 0)])
def test_an_action_outside_the_placement_is_refused(action: Action) -> None:
    schedule = build("1f1b", ranks=2, microbatches=2)
    rows = rows_of(schedule)
    rows[0].append(action)
    error = refused(with_rows(schedule, rows))
    assert (error.rank, error.step, error.action) == (0, 4, action)
    assert "does not exist: there are stages 0 to 1 and micro-batches 0 to 1" in str(error)


@pytest.mark.parametrize("kind", ["F", "X"])
def test_a_kind_that_is_a_text_is_refused(kind: str) -> None:
    schedule = build("1f1b", ranks=2, microbatches=2)
    rows = rows_of(schedule)
    rows[1][2] = Action(1, kind, 1)  # pyright: ignore[reportArgumentType]
    error = refused(with_rows(schedule, rows))
    assert (error.rank, error.step, error.action) == (1, 2, rows[1][2])
    assert f"has '{kind}' as its kind; it must be one of Op.F, Op.B, Op.I, Op.W" in str(error)


def test_a_number_beyond_any_list_is_refused() -> None:
    schedule = build("1f1b", ranks=2, microbatches=2)
    for wrong in (Action(10**30, F, 0), Action(0, F, 10**30), Action(0, F, -1)):
        rows = rows_of(schedule)
        rows[0][0] = wrong
        error = refused(with_rows(schedule, rows))
        assert (error.rank, error.step, error.action) == (0, 0, wrong)


def test_empty_rows_lack_the_first_forward() -> None:
    schedule = build("1f1b", ranks=2, microbatches=2)
    error = refused(with_rows(schedule, [[], []]))
    assert (error.rank, error.step, error.action) == (0, 0, Action(0, F, 0))
    error = refused(with_rows(schedule, [list(schedule.rows[0]), []]))
    assert (error.rank, error.step, error.action) == (1, 0, Action(1, F, 0))
    order, blocked = replay(with_rows(schedule, [[], []]))
    assert order == blocked == ()


def test_a_replay_counts_an_action_that_stands_twice_as_ended_when_the_first_one_has() -> None:
    schedule = build("1f1b", ranks=2, microbatches=1)
    rows: list[list[Step]] = [
        [Action(0, B, 0), Action(0, F, 0)],
        [Action(0, F, 0), Action(1, F, 0)],
    ]
    order, blocked = replay(with_rows(schedule, rows))
    assert order == ((1, 0),)
    assert [b.awaited for b in blocked] == [Action(0, F, 0), Action(0, F, 0)]


@pytest.mark.parametrize(
    ("pair", "says"),
    [
        (Pair(Action(0, F, 1), Action(0, I, 0)), "is not a pair of a forward and a full backward"),
        (Pair(Action(0, B, 0), Action(0, F, 1)), "is not a pair of a forward and a full backward"),
        (Pair(Action(0, F, 0), Action(0, B, 0)), "cannot overlap: 0B0 needs 0F0"),
    ],
)
def test_a_pair_whose_members_cannot_overlap_is_refused(pair: Pair, says: str) -> None:
    placement = Placement(((0,),), (0, 0))
    rest = {Action(0, op, m) for op in (F, B) for m in (0, 1)} - set(pair)
    schedule = Schedule("x", placement, ((*sorted(rest), pair),))
    error = refused(schedule)
    assert (error.rank, error.step) == (0, len(rest))
    assert says in str(error)


def test_a_weight_half_before_its_input_half_is_refused() -> None:
    schedule = build("dualpipe", ranks=2, microbatches=4)
    rows = rows_of(schedule)
    i, w = (next(n for n, step in enumerate(rows[0]) if str(step)[1] == op) for op in "IW")
    rows[0][i], rows[0][w] = rows[0][w], rows[0][i]
    error = refused(with_rows(schedule, rows))
    assert (error.rank, error.step, error.action) == (0, i, rows[0][i])
    assert f"stands before {rows[0][w]} (step {w}), which it needs" in str(error)


@pytest.mark.parametrize(
    "slip",
    [
        (0, F, 0),
        Pair(Action(0, F, 0), (1, B, 0)),  # pyright: ignore[reportArgumentType]
        "0F0",
        None,
    ],
)
def test_what_is_no_step_is_refused(slip: object) -> None:
    schedule = build("1f1b", ranks=2, microbatches=2)
    rows = rows_of(schedule)
    rows[0][1] = slip  # pyright: ignore[reportCallIssue, reportArgumentType]
    with pytest.raises(ScheduleError, match=r"rank 0, step 1: .* is not a step; it must be an Act"):
        verify(with_rows(schedule, rows))


@pytest.mark.parametrize("action", [Action(False, F, 0), Action(0, F, 0.0), Action(0.5, F, 0)])  # pyright: ignore[reportArgumentType]
def test_stages_and_micro_batches_are_ints(action: Action) -> None:
    schedule = build("1f1b", ranks=2, microbatches=2)
    rows = rows_of(schedule)
    rows[0][0] = action
    assert "both must be of type int" in str(refused(with_rows(schedule, rows)))


def test_a_deadlock_lists_every_blocked_rank_and_the_circle() -> None:
    schedule = build("1f1b", ranks=3, microbatches=3)
    rows = rows_of(schedule)
    # Rank 1 wants the gradient of micro-batch 0 before it has sent micro-batch 0 on.
    rows[0] = [Action(0, F, 0), Action(0, B, 0), Action(0, F, 1), Action(0, B, 1)]
    rows[0] += [Action(0, F, 2), Action(0, B, 2)]
    rows[1] = [Action(1, F, 1), Action(1, F, 0), Action(1, B, 0), Action(1, B, 1)]
    rows[1] += [Action(1, F, 2), Action(1, B, 2)]
    error = refused(with_rows(schedule, rows))
    assert (error.rank, error.step, error.action) == (0, 1, Action(0, B, 0))
    for line in (
        "can never start: deadlock after 1 of 18 steps",
        "rank 0, step 1: 0B0 waits for 1B0, which stands at step 2 of rank 1",
        "rank 1, step 0: 1F1 waits for 0F1, which stands at step 2 of rank 0",
        "rank 2, step 0: 2F0 waits for 1F0, which stands at step 1 of rank 1",
        "the circle: rank 0, which waits for rank 1, which waits for rank 0",
        "   0     0F0     -> 1F1     -> 2F0",
        "   1  -> 0B0        1F0        2B0",
    ):
        assert line in str(error)


def test_a_deadlock_blames_the_ranks_in_the_circle_and_not_those_that_wait_for_them() -> None:
    schedule = build("dualpipe", ranks=4, microbatches=8)
    rows = rows_of(schedule)
    rows[1][:5] = [Action(*a) for a in ((1, F, 2), (1, F, 1), (2, F, 5), (1, F, 0), (2, F, 4))]
    rows[2][:2] = reversed(rows[2][:2])  # 2F0, which needs 1F0, now stands before 1F4
    error = refused(with_rows(schedule, rows))
    assert (error.rank, error.step, error.action) == (1, 2, Action(2, F, 5))
    assert "rank 0, step 3: 3F4 waits for 2F4, which stands at step 4 of rank 1" in str(error)
    assert "the circle: rank 1, which waits for rank 2, which waits for rank 1\n" in str(error)


def test_the_neighbourhood_shows_the_ranks_and_steps_around_the_arrow() -> None:
    schedule = build("1f1b", ranks=8, microbatches=16)
    rows = rows_of(schedule)
    rows[4].insert(10, rows[4][9])
    window = str(refused(with_rows(schedule, rows))).splitlines()[1:]
    assert re.findall(r"rank (\d)", window[0]) == ["2", "3", "4", "5", "6"]
    assert [line.split()[0] for line in window[1:]] == [str(n) for n in range(7, 14)]
    assert [line.split()[0] for line in window[1:] if "->" in line] == ["9", "10"]
    assert f"-> {rows[4][10]}" in window[4]


def test_forward_only_schedules_need_every_forward() -> None:
    schedule = forward_only(build("dualpipe", ranks=2, microbatches=4))
    rows = rows_of(schedule)
    (dropped,) = actions(rows[1].pop(2))
    assert refused(with_rows(schedule, rows)).action == dropped
    assert refused(with_rows(schedule, [[], []])).action == Action(0, F, 0)


def test_a_replay_runs_every_step_once_after_all_it_needs() -> None:
    for schedule in built_schedules(max_ranks=4):
        order, blocked = replay(schedule)
        assert not blocked
        assert len(set(order)) == len(order) == sum(map(len, schedule.rows))
        needs = needed(set(all_actions(schedule)))
        done: set[Action] = set()
        reached = [0] * schedule.num_ranks
        for rank, index in order:
            assert reached[rank] == index
            reached[rank] += 1
            step = schedule.rows[rank][index]
            assert all(needs[action] <= done for action in actions(step))
            done |= set(actions(step))


def test_an_error_crosses_processes_whole() -> None:
    schedule = build("1f1b", ranks=2, microbatches=2)
    error = refused(
        with_rows(schedule, [[*schedule.rows[0], Action(0, F, 1)], [*schedule.rows[1]]])
    )
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error)
    assert (copy.rank, copy.step, copy.action) == (0, 4, Action(0, F, 1))
