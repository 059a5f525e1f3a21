"""Actions, placements and the built schedules."""

import subprocess
import sys
from itertools import product

import pytest

from counterflow.parallel.schedule import (
    Action,
    Op,
    Pair,
    Placement,
    Schedule,
    actions,
    build,
    dependencies,
    forward_only,
    grid,
    names,
    parse_step,
    verify,
)
from tests.cases_schedules import all_actions, built_schedules
from tests.clocks import least_seconds

F, B, I, W = Op.F, Op.B, Op.I, Op.W  # noqa: E741


def test_an_action_and_a_pair_read_as_torch_writes_them() -> None:
    pair = Pair(Action(0, F, 7), Action(7, B, 3))
    assert str(Action(2, F, 0)) == "2F0"
    assert str(pair) == "(0F7;7B3)"
    for cell, step in {
        "2F0": Action(2, F, 0),
        " 12I34 ": Action(12, I, 34),
        "(0F7;7B3)": pair,
        "( 0F7 ; 7B3 )": pair,
        "(0F7;7B3)OVERLAP_F_B": pair,
    }.items():
        assert parse_step(cell) == step
        assert type(parse_step(cell)) is type(step)


def test_every_step_survives_its_text() -> None:
    for op, stage, microbatch in product(Op, (0, 3, 17), (0, 9, 119)):
        action = Action(stage, op, microbatch)
        assert parse_step(str(action)) == action


@pytest.mark.parametrize(
    ("cell", "says"),
    [
        ("", "expected an action such as 2F0"),
        ("2X0", "expected an action such as 2F0"),
        ("F0", "expected an action such as 2F0"),
        ("2F", "expected an action such as 2F0"),
        ("-1F0", "expected an action such as 2F0"),
        ("2F0 2F1", "expected an action such as 2F0"),
        ("٢F0", "expected an action such as 2F0"),
        ("(0F7)", "expected an action such as 2F0"),
        ("(0F7;7B3", "expected an action such as 2F0"),
        ("(0F7;7B3;1F2)", "expected an action such as 2F0"),
        ("(0F7;7B3)OVERLAP", "expected an action such as 2F0"),
        ("(7B3;0F7)", "pairs B with F"),
        ("(0F7;7I3)", "pairs F with I"),
        ("0SEND_F1", "torch's communication actions"),
        ("0REDUCE_GRAD", "torch's communication actions"),
    ],
)
def test_a_cell_that_is_no_step_is_refused_with_what_was_expected(cell: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        parse_step(cell)
    assert repr(cell) in str(error.value)


def test_actions_need_their_stage_before_their_own_forward_and_their_input_half() -> None:
    assert dependencies(Action(0, F, 5), 3) == ()
    assert dependencies(Action(2, F, 5), 3) == ((Action(1, F, 5),),)
    gradient = (Action(2, B, 5), Action(2, I, 5))
    for op in (B, I):
        assert dependencies(Action(1, op, 5), 3) == ((Action(1, F, 5),), gradient)
        assert dependencies(Action(2, op, 5), 3) == ((Action(2, F, 5),),)
    assert dependencies(Action(1, W, 5), 3) == ((Action(1, I, 5),),)


def test_a_schedule_needs_whichever_backward_of_the_next_stage_it_holds() -> None:
    placement = Placement(((0, 1),), (0,))
    own, needy = Action(0, F, 0), Action(0, B, 0)
    for held, needed in (((I, W), I), ((B,), B), ((), B)):
        row = tuple(Action(1, op, 0) for op in (F, *held))
        schedule = Schedule("x", placement, ((own, needy), row))
        assert schedule.needs[needy] == (own, Action(1, needed, 0))


def test_a_placement_knows_ranks_stages_and_replicas() -> None:
    placement = Placement(((0, 1, 2, 3), (3, 2, 1, 0)), (0, 0, 1, 1))
    assert (placement.num_stages, placement.num_ranks, placement.num_microbatches) == (4, 4, 4)
    assert [placement.rank(s, 0) for s in range(4)] == [0, 1, 2, 3]
    assert [placement.rank(s, 3) for s in range(4)] == [3, 2, 1, 0]
    assert [placement.stages(r) for r in range(4)] == [(0, 3), (1, 2), (1, 2), (0, 3)]
    assert [placement.replicas(s) for s in range(4)] == [(0, 3), (1, 2), (1, 2), (0, 3)]
    assert Placement.of([(0, 1, 2, 3)] * 2 + [(3, 2, 1, 0)] * 2) == placement


@pytest.mark.parametrize(
    ("routes", "route_of", "says"),
    [
        ((), (), "at least one route"),
        (((),), (0,), "at least one route"),
        (((0,),), (), "one micro-batch"),
        (((0, 1), (1,)), (0, 1), "route 1 has 1 stages and route 0 has 2"),
        (((0, 1), (0, 1)), (0, 1), "routes 0 and 1 are the same"),
        (((0, 1),), (0, 1), "micro-batch 1 takes route 1"),
        (((0, 1),), (-1,), "micro-batch 0 takes route -1"),
        (((0, 1), (1, 0)), (0, 0), "no micro-batch takes route 1"),
        (((0, -1),), (0,), "rank -1"),
        (((0, 2),), (0,), "rank 1 holds no stage"),
        (((1, 2),), (0,), "rank 0 holds no stage, and ranks up to 2"),
    ],
)
def test_an_impossible_placement_is_refused(
    routes: tuple[tuple[int, ...], ...], route_of: tuple[int, ...], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        Placement(routes, route_of)


def test_a_schedule_needs_a_row_for_each_rank_and_a_printable_name() -> None:
    placement = Placement(((0, 1),), (0,))
    with pytest.raises(ValueError, match="1 rows, but its placement has 2 ranks"):
        Schedule("x", placement, ((),))
    for name in ("", " x", "x\n", "a\nb"):
        with pytest.raises(ValueError, match="printable line"):
            Schedule(name, placement, ((), ()))


def test_rows_that_could_change_are_refused() -> None:
    placement, row = Placement(((0,),), (0,)), (Action(0, F, 0),)
    for rows in ([row], ([*row],)):
        with pytest.raises(ValueError, match="rows must be a tuple of tuples, not list"):
            Schedule("x", placement, rows)  # pyright: ignore[reportArgumentType]


def test_equal_schedules_are_equal_values_whatever_was_derived_from_them() -> None:
    one, other = (build("dualpipe", ranks=2, microbatches=4) for _ in range(2))
    verify(one)
    assert one == other
    assert hash(one) == hash(other)


def test_every_built_schedule_verifies_forward_only_too() -> None:
    for schedule in built_schedules(max_ranks=8):
        verify(schedule)
        evaluation = forward_only(schedule)
        verify(evaluation)
        everything = all_actions(schedule)
        assert all_actions(evaluation) == [a for a in everything if a.op == F]
        assert evaluation.placement == schedule.placement
        assert evaluation.name != schedule.name


def test_dualpipe_has_the_published_steps_on_four_ranks() -> None:
    """Checked once against the published code, whose order of calls gives exactly these rows."""
    schedule = build("dualpipe", ranks=4, microbatches=10)
    assert [" ".join(map(str, row)) for row in schedule.rows[:2]] == [
        "0F0 0F1 0F2 3F5 3I5 3W5 3F6 (0F3;3B6) (3F7;0B0) (0F4;3B7) (3F8;0B1) 3B8 (3F9;0B2) "
        "3B9 0I3 0W3 0I4 0W4",
        "1F0 2F5 1F1 2F6 1F2 2B5 (2F7;1B0) (1F3;2B6) (2F8;1B1) (1F4;2B7) (2F9;1B2) "
        "2B8 1B3 2I9 1I4 2W9 1W4",
    ]


def test_the_two_ends_of_dualpipe_mirror_each_other() -> None:
    for ranks, microbatches in product((2, 4, 6, 8), (2, 6, 16, 18, 22)):
        schedule = build("dualpipe", ranks=ranks, microbatches=microbatches)
        half = microbatches // 2
        for rank, row in enumerate(schedule.rows):
            mirrored = schedule.rows[ranks - 1 - rank]
            assert [
                tuple((a.stage, a.op, (a.microbatch + half) % microbatches) for a in actions(s))
                for s in row
            ] == [tuple(map(tuple, actions(s))) for s in mirrored]


def test_dualpipev_is_the_first_half_of_dualpipe_folded() -> None:
    for ranks, microbatches in product((1, 2, 3, 4), (1, 3, 8, 9, 12)):
        folded = build("dualpipev", ranks=ranks, microbatches=microbatches)
        whole = build("dualpipe", ranks=2 * ranks, microbatches=2 * microbatches)
        for rank in range(ranks):
            assert [tuple(map(tuple, actions(s))) for s in folded.rows[rank]] == [
                tuple((a.stage, a.op, a.microbatch % microbatches) for a in actions(s))
                for s in whole.rows[rank]
            ]


@pytest.mark.parametrize(
    ("name", "ranks", "microbatches", "says"),
    [
        ("dualpipe", 7, 20, "ranks=7 is odd.*use 6 or 8 ranks; or use dualpipev"),
        ("dualpipe", 8, 21, "microbatches=21 is odd.*use 20 or 22 micro-batches; or use dual"),
        ("dualpipe", 1, 1, "ranks=1 is odd.*use 2 ranks; microbatches=1 .*use 2 micro-batches;"),
        *(
            (name, 0, 0.5, "ranks must be.*got 0; microbatches must be.*got 0.5")
            for name in names()
        ),
        *((name, 0, 8, "ranks must be a whole number from 1 up, got 0") for name in names()),
        *((name, 4, -8, "microbatches must be a whole number.*got -8") for name in names()),
        *((name, 4.0, 8, "ranks must be a whole number.*got 4.0") for name in names()),
        *((name, True, 8, "ranks must be a whole number.*got True") for name in names()),
        *((name, 4, "8", "microbatches must be a whole number.*got '8'") for name in names()),
    ],
)
def test_impossible_sizes_are_refused_with_what_to_use(
    name: str, ranks: int, microbatches: int, says: str
) -> None:
    with pytest.raises(ValueError, match=f"^{name}: .*{says}"):
        build(name, ranks=ranks, microbatches=microbatches)


def test_the_advice_on_sizes_works() -> None:
    verify(build("dualpipe", ranks=8, microbatches=20))
    verify(build("dualpipe", ranks=8, microbatches=22))
    verify(build("dualpipev", ranks=7, microbatches=21))
    verify(build("1f1b", ranks=7, microbatches=21))


def test_options_are_those_of_the_schedule() -> None:
    assert build("interleaved", ranks=2, microbatches=4).num_stages == 4
    assert build("interleaved", ranks=2, microbatches=4, stages_per_rank=3).num_stages == 6
    with pytest.raises(ValueError, match=r"^1f1b: unknown option 'stages_per_rank'; it has no opt"):
        build("1f1b", ranks=2, microbatches=4, stages_per_rank=3)
    with pytest.raises(ValueError, match=r"^interleaved: unknown .*its options: stages_per_rank$"):
        build("interleaved", ranks=2, microbatches=4, stages=3)
    with pytest.raises(ValueError, match=r"^interleaved: stages_per_rank=1 .*use 2, or 1f1b"):
        build("interleaved", ranks=2, microbatches=4, stages_per_rank=1)
    with pytest.raises(ValueError, match=r"^interleaved: stages_per_rank must be a whole number"):
        build("interleaved", ranks=2, microbatches=4, stages_per_rank=2.5)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'DualPip'; did you mean 'dualpipe'\?"):
        build("DualPip", ranks=2, microbatches=4)
    with pytest.raises(ValueError, match=r"unknown schedule 'xyz'; known: gpipe, 1f1b, .*v-min,"):
        build("xyz", ranks=2, microbatches=4)


def test_the_grid_has_a_line_a_step_and_a_column_a_rank() -> None:
    assert grid(build("1f1b", ranks=2, microbatches=2)).splitlines() == [
        "step  rank 0  rank 1",
        "   0  0F0     1F0",
        "   1  0F1     1B0",
        "   2  0B0     1F1",
        "   3  0B1     1B1",
    ]


@pytest.mark.alone
def test_schedule_and_simulate_start_fast_and_without_torch() -> None:
    program = (
        "import counterflow.parallel.schedule, counterflow.parallel.simulate, sys, time\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)\n"
        "print(time.process_time())"
    )

    def seconds() -> float:
        ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        return float(ran.stdout)

    # The first may have to compile.
    assert least_seconds(seconds, enough_s=0.5, tries=5) < 0.5
