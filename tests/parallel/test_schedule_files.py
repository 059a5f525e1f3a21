"""The text form keeps a schedule whole; the CSV form is torch's."""

import csv
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from torch.distributed.pipelining import schedules as torch_schedules

from counterflow.parallel.schedule import (
    Action,
    Op,
    Placement,
    Schedule,
    ScheduleError,
    Step,
    build,
    forward_only,
    load,
    save,
    verify,
)
from counterflow.parallel.schedule.csv_form import from_csv, to_csv
from counterflow.parallel.schedule.text_form import from_text, to_text
from tests.cases_schedules import built_schedules, random_schedules


class StageOfTorch:
    """What torch's schedules ask of a stage before they run it."""

    def __init__(self, index: int, num_stages: int, rank: int, ranks: int) -> None:
        self.stage_index, self.num_stages = index, num_stages
        self.group_rank, self.group_size, self.group = rank, ranks, None
        self.submod = None


def stages_of_torch(schedule: Schedule, rank: int) -> list[Any]:
    held = schedule.placement.stages(rank)
    return [StageOfTorch(s, schedule.num_stages, rank, schedule.num_ranks) for s in held]


def texts(order: list[Any]) -> list[str]:
    """Torch's actions as text, without idle time and gradient reductions."""
    kept = (a for a in order if a is not None and "REDUCE_GRAD" not in str(a))
    return [str(a).removesuffix("OVERLAP_F_B") for a in kept]


def test_the_text_form_round_trips_every_built_schedule() -> None:
    for schedule in built_schedules(max_ranks=6):
        for kept in (schedule, forward_only(schedule)):
            text = to_text(kept)
            assert from_text(text) == kept
            assert to_text(from_text(text)) == text


@given(random_schedules())
@settings(deadline=None, max_examples=50)
def test_both_forms_round_trip_schedules_with_any_routes(schedule: Schedule) -> None:
    assert from_text(to_text(schedule)) == schedule
    assert from_csv(to_csv(schedule), schedule.name) == schedule


def test_the_text_form_keeps_schedules_that_cannot_run_and_routes_in_their_order() -> None:
    placement = Placement(((1, 0), (0, 1)), (1, 0, 1, 1, 0))
    schedule = Schedule("über: # 2", placement, ((Action(7, Op.W, 9),), ()))
    assert from_text(to_text(schedule)) == schedule


def test_the_text_form_reads_as_it_says() -> None:
    lines = to_text(build("dualpipe", ranks=2, microbatches=4)).splitlines()
    assert all(line.startswith("# ") for line in lines[:4])
    assert lines[4:] == [
        "name: dualpipe",
        "route: ranks 0 1, micro-batches 0-1",
        "route: ranks 1 0, micro-batches 2-3",
        "rank 0: 0F0  1F2  0F1  1B2  (1F3;0B0)  1B3  0I1  0W1",
        "rank 1: 0F2  1F0  0F3  1B0  (1F1;0B2)  1B1  0I3  0W3",
    ]


def test_a_text_may_be_written_by_hand() -> None:
    text = """
        # mine
        name:one
        route : ranks  0 ,micro-batches 1 0
        rank 0:0F0 0F1\t0B0
          # and the last one
    """
    schedule = from_text(text + "\n".replace("\n", ""))
    assert schedule.name == "one"
    assert schedule.placement == Placement(((0,),), (0, 0))
    assert list(map(str, schedule.rows[0])) == ["0F0", "0F1", "0B0"]


def test_csv_round_trips_every_built_schedule_placement_included(tmp_path: Path) -> None:
    for schedule in built_schedules(max_ranks=6):
        for kept in (schedule, forward_only(schedule)):
            path = tmp_path / f"{kept.name}.csv"
            save(kept, path)
            assert load(path) == kept


def test_files_take_the_form_of_their_suffix_and_are_read_by_their_content(tmp_path: Path) -> None:
    schedule = build("dualpipe", ranks=4, microbatches=8)
    save(schedule, tmp_path / "a.CSV")
    save(schedule, str(tmp_path / "b.txt"))
    rows = list(csv.reader((tmp_path / "a.CSV").open()))
    assert [len(row) for row in rows] == [len(row) for row in schedule.rows]
    assert rows[1][6] == "(2F6;1B0)OVERLAP_F_B"
    assert (tmp_path / "b.txt").read_text() == to_text(schedule)
    (tmp_path / "a.CSV").rename(tmp_path / "renamed.txt")
    (tmp_path / "b.txt").rename(tmp_path / "renamed.csv")
    assert load(tmp_path / "renamed.txt") == Schedule("renamed", schedule.placement, schedule.rows)
    assert load(tmp_path / "renamed.csv") == schedule


def test_a_forward_on_two_ranks_belongs_to_the_first(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("0F0,0B0\n1F0,1B0,0F0\n")
    schedule = load(path)
    assert schedule.placement == Placement(((0, 1),), (0,))
    with pytest.raises(ScheduleError, match="rank 1, step 2: 0F0 is on the wrong rank"):
        verify(schedule)


def test_csv_from_a_spreadsheet_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes('\ufeff"0F0", 0F1 ,,0B0,(0F2;0B1),0B2,\r\n\r\n'.encode())
    schedule = load(path)
    assert list(map(str, schedule.rows[0])) == ["0F0", "0F1", "0B0", "(0F2;0B1)", "0B2"]
    verify(schedule)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("0F0,0B0\n1F0,xx,1B0\n", "line 2, column 2: 'xx' is not a step; expected an action"),
        ("0F0,,0F\n", "line 1, column 3: '0F' is not a step"),
        ("0F0,(0B0;0F1)\n", r"line 1, column 2: '\(0B0;0F1\)' pairs B with F"),
        ("0F0,0SEND_F0\n", "line 1, column 2: '0SEND_F0' is one of torch's communication"),
        ("", "there is no step in it"),
        (" \n,,\n", "there is no step in it"),
        ("0F0\n1F1\n", "1F0 is on no rank"),
        ("0F0\n999999999F0\n", "1 is on any rank; .* is line 2"),
        ("0F0\n9999999999F0\n", "line 2, column 1: '9999999999F0' has a number of more than 9"),
        pytest.param(
            "0F0\n0F" + "9" * 5000,
            "line 2, column 1: '0F9+\\.\\.\\.' has a number of more than 9",
            id="digits of a cell",
        ),
        ("0F0\n\n1F0\n", "line 2: no step in it; a line is the row of a rank"),
        ("0F0,0B0\n,,\n1F0,1B0\n", "line 2: no step in it; a line is the row of a rank"),
        # Slips: 4F0 for 0F0, 1F9 for 1F1, and the last of three ranks with two stages each deleted.
        ("4F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n", "line 1, column 1: 4F0 brings in stage 4"),
        ("0F0,0F1,0B0,0B1\n1F0,1B0, ,1F9,1B1\n", "line 2, column 4: 1F9 brings in micro-batch 9"),
        ("0F0,0F1,3F0,3F1\n1F0,1F1,4F0,4F1\n", "nothing of stage 2 is on any .* is line 2"),
        ("name: x\nroute: ranks 0, micro-batches 0\nrank 0: 0F0 yy\n", "line 3, column 2: 'yy'"),
        ("name: x\nname: y\n", "line 2: a second name"),
        ("nme: x\n", "line 1: 'nme' begins no line; did you mean 'name:'?"),
        ("name: x\nsomething else\n", "line 2: 'something else' begins no line; expected 'name:'"),
        ("# x\nroute: ranks 0, micro-batches 0\nrank 0: 0F0\n", "no 'name:' line"),
        ("name: x\nrank 0: 0F0\n", "no 'route:' line"),
        ("name: x\nroute: 0 1\n", "line 2: '0 1' is not a route; expected one such as 'ranks 0"),
        ("name: x\nroute: ranks 0, micro-batches 3-1\n", "line 2: micro-batches 3-1 run backwards"),
        ("name: x\nroute: ranks 0, micro-batches 0-999999999\n", "line 2: .* more than the text"),
        (
            "name: x\nroute: ranks 0, micro-batches 0-1\nroute: ranks 1, micro-batches 1\n",
            "line 3: micro-batch 1 has a route already",
        ),
        ("name: x\nroute: ranks 0, micro-batches 1\nrank 0: 0F1\n", "micro-batch 0 is in no"),
        (
            "name: x\nroute: ranks 0 1, micro-batches 0\nrank 1: 1F0\n",
            "line 3: the row of rank 1 stands where that of rank 0 is expected",
        ),
        ("name: x\nroute: ranks 0 1, micro-batches 0\nrank 0: 0F0\n", "1 rows, .* 2 ranks"),
        ("name: x\nroute: ranks 0 2, micro-batches 0\nrank 0: 0F0\n", "rank 1 holds no stage"),
        pytest.param(
            f"name: x\nroute: ranks {'1' * 5000}, micro-batches 0\n",
            "line 2: .* not a route",
            id="digits of a rank",
        ),
        pytest.param(
            f"name: x\nroute: ranks 0, micro-batches {'1' * 5000}\n",
            "line 2: .* not a route",
            id="digits of a micro-batch",
        ),
        pytest.param(
            f"name: x\nrank {'1' * 5000}: 0F0\n",
            "line 2: 'rank 1+\\.\\.\\.' begins no line",
            id="digits of a row",
        ),
        ("name:\nroute: ranks 0, micro-batches 0\nrank 0: 0F0\n", "schedule name '' must be"),
    ],
)
def test_a_bad_file_is_refused_with_file_line_column_and_reason(
    content: str, says: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"^{path}[,:] .*{says}") as error:
        load(path)
    assert "\n" not in str(error.value)


def test_a_rank_far_away_is_refused_without_counting_up_to_it() -> None:
    text = f"name: x\nroute: ranks 0 {10**9 - 1}, micro-batches 0\nrank 0: 0F0\n"
    tracemalloc.start()
    with pytest.raises(ValueError, match="here: rank 1 holds no stage, and ranks up to 999999999"):
        from_text(text, "here")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1e6  # bytes


def test_a_row_of_bidirectional_dualpipe_that_is_missing_blames_no_cell() -> None:
    """Half of its stages' actions are left, which are no slips."""
    text = to_csv(build("dualpipe", ranks=4, microbatches=8))
    with pytest.raises(ValueError, match=r"^here: 3F0 is on no rank"):
        from_csv(text[: text.rindex("\n", 0, -1)], "x", "here")


def test_a_file_that_is_not_text_is_refused_and_a_missing_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(b"\x89PNG\xff\x00")
    with pytest.raises(ValueError, match=r"x\.csv: not a schedule, because it is not UTF-8"):
        load(path)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv"):
        load(tmp_path / "nowhere.csv")


def test_any_text_is_read_or_refused_with_the_name_of_its_source() -> None:
    """Cells and lines of real schedules, cut up at random: no other error, no endless work."""
    draw = random.Random(0)
    parts = to_text(build("dualpipe", ranks=2, microbatches=4)).replace("  ", ",").split(" ")
    for _ in range(500):
        text = "".join(draw.choice([*parts, "\n", ",", ":", "-"]) for _ in range(30))
        for read in (lambda t: from_text(t, "here"), lambda t: from_csv(t, "x", "here")):
            try:
                read(text)
            except ValueError as error:
                message = str(error)
            else:
                message = ""
            assert message == "" or message.startswith("here")


def loaded_by_torch(schedule: Schedule, tmp_path: Path) -> Any:
    path = tmp_path / "x.csv"
    save(schedule, path)
    runtime = torch_schedules._PipelineScheduleRuntime(
        stages_of_torch(schedule, 0), schedule.num_microbatches
    )
    runtime._load_csv(str(path))  # validates it and works out the transfers
    return runtime


@pytest.mark.parametrize("name", ["1f1b", "dualpipev"])
@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (3, 7), (4, 8), (4, 13)])
def test_torch_loads_our_csv_and_can_run_it(
    name: str, ranks: int, microbatches: int, tmp_path: Path
) -> None:
    schedule = build(name, ranks=ranks, microbatches=microbatches)
    runtime = loaded_by_torch(schedule, tmp_path)
    for rank, row in enumerate(schedule.rows):
        assert texts(runtime.pipeline_order[rank]) == list(map(str, row))
    assert runtime.stage_index_to_group_rank == dict(enumerate(schedule.placement.routes[0]))


def test_torch_refuses_bidirectional_csv_which_only_we_can_express(tmp_path: Path) -> None:
    schedule = build("dualpipe", ranks=2, microbatches=4)
    with pytest.raises(AssertionError, match="assigned to both rank"):
        loaded_by_torch(schedule, tmp_path)


@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 2), (2, 4), (2, 5), (4, 8), (8, 19)])
def test_dualpipev_is_torchs_order_and_its_csv_loads_here(
    ranks: int, microbatches: int, tmp_path: Path
) -> None:
    ours = build("dualpipev", ranks=ranks, microbatches=microbatches)
    theirs = torch_schedules.ScheduleDualPipeV(stages_of_torch(ours, 0), microbatches)
    for rank, row in enumerate(ours.rows):
        assert texts(theirs.pipeline_order[rank]) == list(map(str, row))
    theirs._dump_csv(str(tmp_path / "dualpipev.csv"), format="compute_only")
    assert load(tmp_path / "dualpipev.csv") == ours


@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 3), (2, 2), (4, 8), (4, 4), (8, 11)])
def test_1f1b_is_torchs_order(ranks: int, microbatches: int) -> None:
    ours = build("1f1b", ranks=ranks, microbatches=microbatches)
    (stage,) = stages_of_torch(ours, 0)
    theirs = torch_schedules.Schedule1F1B(stage, microbatches)._get_pipeline_order()
    assert theirs is not None
    for rank, row in enumerate(ours.rows[:-1]):
        assert texts(theirs[rank]) == list(map(str, row))
    # Torch lists the last rank's forwards from 1 instead of 0 (it runs them from 0).
    last = ranks - 1
    assert list(map(str, ours.rows[last])) == [
        f"{last}{op}{m}" for m in range(microbatches) for op in "FB"
    ]


@pytest.mark.parametrize(
    "kind",
    [torch_schedules.ScheduleInterleaved1F1B, torch_schedules.ScheduleZBVZeroBubble],
    ids=lambda kind: kind.__name__,
)
def test_schedules_that_torch_wrote_load_and_verify(
    kind: Callable[..., Any], tmp_path: Path
) -> None:
    ranks, microbatches = 4, 8
    loop = kind is torch_schedules.ScheduleInterleaved1F1B
    down = tuple(range(ranks))
    placement = Placement((down + (down if loop else down[::-1]),), (0,) * microbatches)
    empty: tuple[Step, ...] = ()
    stages = stages_of_torch(Schedule("x", placement, (empty,) * ranks), 0)
    theirs = kind(stages, microbatches)
    theirs._dump_csv(str(tmp_path / "x.csv"), format="compute_only")
    ours = load(tmp_path / "x.csv")
    assert ours.placement == placement
    verify(ours)
    for rank, row in enumerate(ours.rows):
        assert texts(theirs.pipeline_order[rank]) == list(map(str, row))
