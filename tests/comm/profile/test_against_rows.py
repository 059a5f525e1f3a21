"""How rows are cut: every moment counts once, for what it is put down to."""

from hypothesis import given
from hypothesis import strategies as st

from counterflow.comm.profile.comparison import (
    AFTER,
    BEFORE,
    BETWEEN,
    COMPUTING,
    PARTS,
    STANDING,
    TRANSFER,
    WAITING,
)
from counterflow.comm.profile.rows import (
    Action,
    Row,
    RowRun,
    parts_of,
    phase_runs,
    simulated_row,
    stretches,
)
from counterflow.comm.profile.simulated import SimulatedAction, SimulatedPhase

NAMES = ("0F0", "1B0", "1I1", "1W1", "(0F2;1B0)")
KINDS = {"0F0": "F", "1B0": "B", "1I1": "I", "1W1": "W", "(0F2;1B0)": "pair"}
TIMES = st.tuples(st.integers(0, 40), st.integers(0, 12))


@st.composite
def rows(draw: st.DrawFn) -> Row:
    """Runs and actions that overlap, touch, are empty or reach out of the row."""
    runs = [
        RowRun(start, start + length, part, phase, None, number)
        for number, ((start, length), part, phase) in enumerate(
            draw(
                st.lists(
                    st.tuples(TIMES, st.sampled_from(PARTS[:-1]), st.sampled_from(["", "a", "b"])),
                    max_size=12,
                )
            )
        )
    ]
    actions = [
        Action(name, start, start + length)
        for name, (start, length) in draw(
            st.lists(st.tuples(st.sampled_from(NAMES), TIMES), min_size=1, max_size=5)
        )
    ]
    actions.sort(key=lambda action: action.start)
    first = min(action.start for action in actions) - draw(st.integers(0, 3))
    last = max(action.end for action in actions) + draw(st.integers(0, 3))
    return Row("0", first, last, tuple(actions), tuple(runs))


@given(rows())
def test_stretches_fill_the_row_without_gap_or_overlap(row: Row) -> None:
    found = stretches(row)
    reached = row.start
    for stretch in found:
        assert stretch.start == reached < stretch.end
        reached = stretch.end
    assert reached == row.end
    assert sum(parts_of(row).values()) == row.length


@given(rows())
def test_each_moment_has_the_first_part_that_runs_and_a_phase_and_action_of_that_moment(
    row: Row,
) -> None:
    for start, end, kind, part, phase in stretches(row):
        for moment in range(start, end):
            running = [run for run in row.runs if run.start <= moment < run.end]
            parts = [known for known in PARTS if known in {run.part for run in running}]
            assert part == (parts[0] if parts else STANDING)
            now = [run for run in running if run.part == part]
            assert phase == "" if not now else phase in {run.phase for run in now}
            assert kind in kinds_at(row, moment)


def kinds_at(row: Row, moment: int) -> set[str]:
    lasting = [one for one in row.actions if one.start < one.end]
    acting = {KINDS[one.name] for one in lasting if one.start <= moment < one.end}
    if acting or not lasting:
        return acting or {BETWEEN}
    if moment < min(one.start for one in lasting):
        return {BEFORE}
    return {AFTER} if moment >= max(one.end for one in lasting) else {BETWEEN}


def test_what_started_first_counts_where_two_run_at_once() -> None:
    runs = (
        RowRun(0, 6, COMPUTING, "a"),
        RowRun(4, 9, COMPUTING, "b"),
        RowRun(2, 12, TRANSFER, "c"),
    )
    row = Row("0", 0, 14, (Action("0F0", 0, 10), Action("0W0", 8, 13)), runs)
    assert [tuple(stretch) for stretch in stretches(row)] == [
        (0, 6, "F", COMPUTING, "a"),
        (6, 9, "F", COMPUTING, "b"),
        (9, 10, "F", TRANSFER, "c"),
        (10, 12, "W", TRANSFER, "c"),
        (12, 13, "W", STANDING, ""),
        (13, 14, AFTER, STANDING, ""),
    ]


def test_a_phase_run_has_its_busy_times_and_what_no_computation_hid() -> None:
    runs = (
        RowRun(0, 4, WAITING, "dispatch(F)", 0, 7),
        RowRun(3, 10, TRANSFER, "dispatch(F)", 0, 7),
        RowRun(2, 5, COMPUTING, "mlp(B)", 0, 8),
        RowRun(8, 9, COMPUTING, "", None, 0),
        RowRun(20, 21, TRANSFER, "dispatch(F)", 0, 9),
        RowRun(15, 16, WAITING, "dispatch(F)", None, -1),
    )
    (first, compute, second) = phase_runs(Row("0", 0, 30, (Action("0F0", 0, 12),), runs))
    assert (first.kind, first.phase, first.layer) == ("F", "dispatch(F)", 0)
    assert (first.transfer, first.waiting, first.computing) == (7, 3, 0)
    assert first.exposed == 2 + 3 + 1
    assert (compute.computing, compute.transfer, compute.exposed) == (3, 0, 0)
    assert (second.kind, second.transfer, second.waiting) == (AFTER, 1, 0), "waits are no runs"


def test_a_simulated_row_is_whole_nanoseconds_and_without_phases_it_computes() -> None:
    phases = (
        SimulatedPhase("attn(F)", 0, "compute", 0.0, 0.1),
        SimulatedPhase("dispatch(F)", 0, "communication", 0.1, 0.3),
    )
    row = simulated_row(
        [SimulatedAction("0F0", 0.0, 0.3, phases), SimulatedAction("0B0", 0.4, 0.7)], 1e6
    )
    assert (row.start, row.end) == (0, 700_000)
    assert parts_of(row) == {
        ("F", COMPUTING, "attn(F)"): 100_000,
        ("F", TRANSFER, "dispatch(F)"): 200_000,
        (BETWEEN, STANDING, ""): 100_000,
        ("B", COMPUTING, ""): 300_000,
    }
