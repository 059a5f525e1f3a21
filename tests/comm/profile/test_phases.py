"""Which phase and layer each activity belongs to."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow.comm.profile.phases import Phases, innermost_by, is_exchange, marked_phases
from counterflow.comm.profile.trace import Activity, Annotation, Thread, Trace

MAIN: Thread = (1, 10)
AUTOGRAD: Thread = (1, 11)
OTHER_PROCESS: Thread = (2, 10)


def kernel(launched: int | None, launcher: Thread | None = MAIN, start: int = 1000) -> Activity:
    return Activity("k", start, start + 5, lane="stream 7", launched=launched, launcher=launcher)


def mark(name: str, start: int, end: int, thread: Thread | None = MAIN) -> Annotation:
    return Annotation(name, start, end, thread, "" if thread else "stream 7")


def found(
    activities: list[Activity],
    annotations: list[Annotation],
    *,
    on_gpu: bool = True,
    **options: str,
) -> tuple[Phases, list[str]]:
    """The phases, and the name of that of each activity."""
    ordered = sorted(annotations, key=lambda one: (one.start, -one.end))
    phases = marked_phases(Trace("t", tuple(activities), tuple(ordered), on_gpu), **options)
    return phases, [phases.runs[run].name if run >= 0 else "" for run in phases.of]


def test_a_kernel_belongs_to_the_innermost_phase_open_at_its_launch() -> None:
    marks = [mark("mlp(B)", 0, 100), mark("dispatch(F) layer 4", 20, 40), mark("attn(F)", 100, 110)]
    launches = [0, 19, 20, 39, 40, 99, 100, 110, None]
    _, names = found([kernel(launch) for launch in launches], marks)
    inner = ["dispatch(F)", "dispatch(F)"]
    assert names == ["mlp(B)", "mlp(B)", *inner, "mlp(B)", "mlp(B)", "attn(F)", "", ""]


def test_a_thread_without_phases_works_for_the_one_that_has_one_open() -> None:
    marks = [mark("mlp(B)", 0, 50), mark("combine(B)", 40, 90, OTHER_PROCESS)]
    activities = [kernel(10, AUTOGRAD), kernel(45, AUTOGRAD), kernel(60, AUTOGRAD)]
    assert found(activities, marks)[1] == ["mlp(B)", "mlp(B)", ""]


def test_with_two_phases_open_elsewhere_nothing_is_guessed() -> None:
    marks = [mark("mlp(B)", 0, 50), mark("attn(F)", 20, 90, (1, 12))]
    activities = [kernel(10, AUTOGRAD), kernel(30, AUTOGRAD), kernel(60, AUTOGRAD)]
    assert found(activities, marks)[1] == ["mlp(B)", "", "attn(F)"]


def test_what_the_profiler_drew_on_the_stream_stands_in_for_a_launch() -> None:
    marks = [mark("mlp(F)", 990, 1010, None), mark("attn(F)", 0, 5)]
    activities = [kernel(None, None), kernel(2), kernel(500), kernel(None, None, start=1010)]
    assert found(activities, marks)[1] == ["mlp(F)", "attn(F)", "mlp(F)", ""]


def test_an_operator_belongs_to_the_phases_of_its_own_thread_alone() -> None:
    marks = [mark("mlp(B)", 0, 50), mark("dispatch(F)", 0, 50, (1, 12))]
    operators = [
        Activity("aten::mm", 10, 20, "operator", "a", -1, None, MAIN),
        Activity("aten::mm", 10, 20, "operator", "b", -1, None, (1, 12)),
        Activity("aten::mm", 10, 20, "operator", "c", -1, None, AUTOGRAD),
    ]
    assert found(operators, marks, on_gpu=False)[1] == ["mlp(B)", "dispatch(F)", ""]


def test_layers_are_read_off_the_marks() -> None:
    marks = [mark("0F3", 0, 90), mark("attn(F) layer 7", 0, 40), mark("embed(F)", 50, 60)]
    phases, _ = found([], marks)
    assert [(run.name, run.layer) for run in phases.runs] == [("attn(F)", 7), ("embed(F)", None)]
    assert phases.missing == ()


def test_unnamed_layers_are_counted_within_the_range_around_them() -> None:
    marks = [mark("ProfilerStep#1", 0, 1000), mark("1F1B", 0, 100), mark("1F1B", 100, 200)]
    marks += [
        mark("attn(F)", 100 * chunk + at, 100 * chunk + at + 5)
        for chunk in (0, 1)
        for at in (3, 50)
    ]
    marks += [mark("attn(F)", 300, 310), mark("wait F of stage 2", 50, 99)]
    phases, _ = found([], marks)
    assert [run.layer for run in phases.runs] == [0, 1, 0, 1, 0]
    assert "numbered from 0" in phases.missing[0]


def test_unnamed_layers_of_a_thread_without_ranges_around_them_are_not_numbered() -> None:
    lane: Thread = (1, 12)
    moves = [mark("dispatch(F)", 10 * at, 10 * at + 5, lane) for at in range(8)]
    waits = [mark("wait dispatch(F)", 10 * at, 10 * at + 5) for at in range(8)]
    phases, _ = found([], [mark("0F0", 0, 90), mark("wait all", 0, 90, lane), *moves, *waits])
    assert [run.layer for run in phases.runs] == [None] * 8
    assert phases.missing == ()


@pytest.mark.parametrize(
    ("name", "phase"),
    [
        ("dispatch(F)", "dispatch(F)"),
        ("shared(B) layer 12", "shared(B)"),
        ("my_phase(I)", "my_phase(I)"),
        ("two-hop.send(W) layer 0", "two-hop.send(W)"),
        ("wait dispatch(F) layer 3", None),
        ("(0F7;7B3)", None),
        ("0F3", None),
        ("ProfilerStep#3", None),
        ("dispatch(F) layer x", None),
        ("attn(X)", None),
    ],
)
def test_marks_are_phases_by_their_form(name: str, phase: str | None) -> None:
    phases, _ = found([], [mark(name, 0, 10)])
    assert [run.name for run in phases.runs] == ([phase] if phase else [])


def test_users_can_say_what_their_phases_are_called() -> None:
    marks = [mark("moe_dispatch", 0, 10), mark("expert layer 2", 10, 20), mark("attn(F)", 20, 30)]
    pattern = "moe_dispatch|expert"
    phases, names = found([kernel(5), kernel(15), kernel(25)], marks, pattern=pattern)
    assert names == ["moe_dispatch", "expert", ""]
    assert [run.layer for run in phases.runs] == [None, 2]
    with pytest.raises(ValueError, match="phase pattern 'a\\(' is no regular expression"):
        found([], marks, pattern="a(")


def test_moves_are_told_from_computation_by_their_phases_name() -> None:
    moves = ["dispatch(F)", "combine(B)", "all_to_all(F)", "send(F)", "recv(B)"]
    assert all(map(is_exchange, moves))
    assert not any(map(is_exchange, ["mlp(F)", "attn(W)", "sender_side(F)", "undispatch(F)"]))


@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.integers(1, 15)).map(lambda one: (one[0], sum(one))),
        max_size=12,
    )
)
def test_innermost_is_the_open_range_that_began_last(ranges: list[tuple[int, int]]) -> None:
    ordered = sorted(set(ranges), key=lambda one: (one[0], -one[1]))
    innermost = innermost_by((MAIN, one, index) for index, one in enumerate(ordered)).get(MAIN)
    crossing = any(a[0] < b[0] < a[1] < b[1] for a in ordered for b in ordered)
    for time in range(60):
        around = [index for index, (start, end) in enumerate(ordered) if start <= time < end]
        if not crossing:  # ranges of one thread nest; those that do not have no one answer
            assert (innermost.at(time) if innermost else -1) == max(around, default=-1)
        elif innermost:
            assert innermost.at(time) in (*around, -1)
