"""Messages, what follows the rows, idle time by its cause, the critical path and memory."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.parallel.schedule import (
    Action,
    Op,
    Pair,
    Placement,
    Schedule,
    Step,
    Times,
    actions,
    build,
    forward_only,
)
from counterflow.parallel.simulate import (
    Costs,
    Memory,
    Result,
    critical_path,
    idle_by_cause,
    memory_of,
    simulate,
    waits,
)
from counterflow.parallel.simulate.analysis import FinishLink, StepLink, TransferLink
from counterflow.parallel.simulate.draw.bars import FINISH, SENDING, STEPS, bars
from tests.cases_schedules import needed, random_schedules

UNIT = Costs(F=1, I=1, W=1, pair=3)
eighths = st.integers(0, 24).map(lambda n: n / 8)  # binary fractions: sums are exact
any_costs = st.builds(
    Costs,
    F=eighths.filter(bool),
    I=eighths,
    W=eighths,
    pair=st.none() | eighths,
    send=eighths,
    message=eighths.filter(bool),
    bandwidth=st.sampled_from([0.5, 1.0, 4.0]),
    reduce=eighths,
    mirror=eighths,
    optimizer=eighths,
)


@given(random_schedules(), any_costs)
@settings(deadline=None, max_examples=100)
def test_messages_take_turns_and_steps_wait_for_them(schedule: Schedule, costs: Costs) -> None:
    result = simulate(schedule, costs)
    spans = {a: s for row in result.spans for s in row for a in actions(s.step)}
    rank_of = {a: r for r, row in enumerate(schedule.rows) for step in row for a in actions(step)}
    crossing = {
        need: action
        for action, wanted in needed(set(spans)).items()
        for need in wanted
        if rank_of[need] != rank_of[action]
    }
    assert {t.action for t in result.transfers} == set(crossing)
    arrived: dict[Action, float] = {}
    sizes = (costs.message,) * schedule.num_stages
    for rank in range(schedule.num_ranks):
        sent = [t for t in result.transfers if t.source == rank]
        order = [a for step in schedule.rows[rank] for a in actions(step) if a in crossing]
        assert [t.action for t in sent] == order
        free = 0.0
        for transfer in sent:
            assert transfer.start == max(free, spans[transfer.action].end)
            size = sizes[transfer.action.stage]
            assert isinstance(size, int | float)
            free = transfer.start + size / costs.bandwidth
            assert transfer.end == free + costs.send
            assert transfer.destination == rank_of[crossing[transfer.action]]
            arrived[crossing[transfer.action]] = transfer.end
    for row in result.spans:
        free = 0.0
        for span in row:
            assert span.start == max([free, *(arrived.get(a, 0.0) for a in actions(span.step))])
            free = span.end


@given(random_schedules(), any_costs)
@settings(deadline=None, max_examples=100)
def test_every_moment_of_idleness_has_a_cause(schedule: Schedule, costs: Costs) -> None:
    result = simulate(schedule, costs)
    for rank, idle in enumerate(idle_by_cause(result)):
        parts = sum(idle.on_rank.values()) + idle.travelling + idle.finish + idle.end
        assert parts == result.idle[rank]
        assert min([*idle.on_rank.values(), idle.travelling, idle.finish, idle.end]) >= 0
    starts = {span.step: span.start for row in result.spans for span in row}
    ends = {a: s.end for row in result.spans for s in row for a in actions(s.step)}
    for rank, mine in enumerate(waits(result)):
        assert sum(w.end - w.start for w in mine) == sum(
            after.start - before
            for before, after in zip(
                [0.0, *(s.end for s in result.spans[rank])], result.spans[rank], strict=False
            )
        )
        for wait in mine:
            assert wait.rank == rank
            assert wait.end == starts[wait.step] > wait.start
            assert wait.source != rank
            assert wait.travelling == wait.end - max(wait.start, ends[wait.action])


@given(random_schedules(), any_costs)
@settings(deadline=None, max_examples=100)
def test_the_critical_path_reaches_from_the_start_to_the_end_without_a_gap(
    schedule: Schedule, costs: Costs
) -> None:
    result = simulate(schedule, costs)
    path = critical_path(result)
    assert (path[0].start, path[-1].end) == (0, result.makespan)
    assert all(one.end == other.start for one, other in pairwise(path))
    spans = {s.step: (s.start, s.end) for row in result.spans for s in row}
    for one, other in pairwise(path):
        if isinstance(one, StepLink) and isinstance(other, StepLink):
            assert one.rank == other.rank
        if isinstance(one, StepLink) and isinstance(other, TransferLink):
            assert other.transfer.action in actions(one.step)
            assert other.transfer.source == one.rank
        if isinstance(one, TransferLink) and isinstance(other, TransferLink):
            assert one.transfer.source == other.transfer.source  # which had to wait for its lane
        elif isinstance(one, TransferLink):
            assert isinstance(other, StepLink)
            assert one.transfer.destination == other.rank
        if isinstance(one, FinishLink):
            assert isinstance(other, FinishLink)
    for link in path:
        if isinstance(link, StepLink):
            assert spans[link.step] == (link.start, link.end)


@dataclass(frozen=True)
class LongerStep(Times):
    """Times of which one step's is longer."""

    longer: Step | None = None

    def of(self, step: Step) -> float:
        return super().of(step) + (0.125 if step == self.longer else 0)


@dataclass(frozen=True)
class LongerStepCosts(Costs):
    """Costs of which one step's is longer."""

    longer: Step | None = None

    def times(self, stages: int) -> Times:
        return LongerStep(**vars(super().times(stages)), longer=self.longer)


@given(random_schedules(), any_costs)
@settings(deadline=None, max_examples=60)
def test_whatever_on_the_critical_path_takes_longer_the_makespan_does(
    schedule: Schedule, costs: Costs
) -> None:
    result = simulate(schedule, costs)
    stages = range(schedule.num_stages)
    plain = vars(costs)
    for link in critical_path(result):
        if isinstance(link, StepLink):
            longer = simulate(schedule, LongerStepCosts(**plain, longer=link.step)).makespan
            assert longer == result.makespan + 0.125
        elif isinstance(link, FinishLink):
            kind, stage = link.finish.kind, link.finish.stage
            times = [plain[kind] + (0.125 if s == stage else 0) for s in stages]
            longer = simulate(schedule, Costs(**{**plain, kind: times})).makespan
            assert longer >= result.makespan + 0.125  # several ranks may hold the stage
        elif link.end == link.transfer.end:  # else it is only the lane that is waited for
            longer = simulate(schedule, replace(costs, send=costs.send + 0.125)).makespan
            assert longer >= result.makespan + 0.125


@given(random_schedules(), any_costs)
@settings(deadline=None, max_examples=60)
def test_a_wait_is_for_the_last_message_to_arrive(schedule: Schedule, costs: Costs) -> None:
    result = simulate(schedule, costs)
    arrived = {(t.action, t.destination): t.end for t in result.transfers}
    needs = needed({a for row in schedule.rows for step in row for a in actions(step)})
    for mine in waits(result):
        for wait in mine:
            coming = {
                arrived[need, wait.rank]: need
                for action in actions(wait.step)
                for need in needs[action]
                if (need, wait.rank) in arrived
            }
            assert arrived[wait.action, wait.rank] == max(coming) == wait.end


def test_making_a_step_off_the_critical_path_cheaper_gains_nothing() -> None:
    """And on it: the makespan follows. 1F1B's path at equal times goes by the last stage."""
    schedule = build("1f1b", ranks=4, microbatches=6)
    result = simulate(schedule, UNIT)
    on_path = {
        (link.step.stage, link.step.op)
        for link in critical_path(result)
        if isinstance(link, StepLink) and not isinstance(link.step, Pair)
    }
    assert (3, Op.B) in on_path
    faster_last = simulate(schedule, Costs(F=1, I=1, W=1, B=[2, 2, 2, 1.5]))
    assert faster_last.makespan < result.makespan
    slower_last = simulate(schedule, Costs(F=[1, 1, 1, 2], I=1, W=1))
    faster_first = simulate(schedule, Costs(F=[0.5, 1, 1, 2], I=1, W=1))
    first_on_path = any(
        isinstance(link, StepLink) and link.step == Action(0, Op.F, 5)
        for link in critical_path(slower_last)
    )
    assert not first_on_path
    assert slower_last.makespan - faster_first.makespan == 0.5  # the first F alone is on it


def test_what_follows_the_rows_is_reduced_mirrored_and_updated_in_turn() -> None:
    """Two ranks, both of which hold both stages: DualPipe's smallest case."""
    costs = Costs(pair=3, reduce=[1, 2], mirror=[10, 20], optimizer=[100, 200])
    result = simulate(build("dualpipe", ranks=2, microbatches=4), costs)
    row_end = result.spans[0][-1].end
    assert result.spans[1][-1].end == row_end
    for rank in range(2):
        assert [
            (f.kind, f.stage, f.start - row_end, f.end - row_end) for f in result.finish[rank]
        ] == [
            ("reduce", 0, 0, 1),
            ("reduce", 1, 1, 3),
            ("mirror", 0, 3, 13),
            ("mirror", 1, 13, 33),
            ("optimizer", 0, 33, 133),
            ("optimizer", 1, 133, 333),
        ]
    assert result.makespan == row_end + 333
    assert result.idle[0] == result.makespan - result.busy[0]


def test_only_copies_are_mirrored_and_the_optimizer_waits_for_every_rank() -> None:
    costs = Costs(mirror=5, optimizer=[1, 2, 3])
    result = simulate(build("1f1b", ranks=3, microbatches=4), costs)
    last_row = max(row[-1].end for row in result.spans)
    assert [[(f.kind, f.start, f.end) for f in row] for row in result.finish] == [
        [("optimizer", last_row, last_row + time)] for time in (1, 2, 3)
    ]
    assert result.makespan == last_row + 3
    idle = idle_by_cause(result)
    assert [i.end for i in idle] == [2, 1, 0]
    assert [i.finish for i in idle] == [last_row - row[-1].end for row in result.spans]


def test_without_a_barrier_a_step_costs_the_longest_that_any_rank_takes() -> None:
    result = simulate(build("1f1b", ranks=4, microbatches=8), UNIT)
    assert [row[0].start for row in result.spans] == [0, 1, 2, 3]
    assert result.rolling_makespan == result.makespan == 8 * 3 + 3 * 3
    staggered = Schedule(
        "staggered",
        Placement(((0, 1),), (0,)),
        ((Action(0, Op.F, 0),), (Action(1, Op.F, 0),)),
    )
    result = simulate(staggered, UNIT)
    assert (result.makespan, result.rolling_makespan) == (2, 1)
    assert (result.bubble_rate, result.rolling_bubble_rate) == (0.5, 0)


@given(random_schedules(), any_costs)
@settings(deadline=None, max_examples=60)
def test_memory_in_chunks_peaks_where_the_count_of_chunks_does(
    schedule: Schedule, costs: Costs
) -> None:
    result = simulate(schedule, costs)
    for rank, held in enumerate(memory_of(result, Memory())):
        assert held.peak == result.peak_chunks[rank]
    for rank, held in enumerate(memory_of(result, Memory(kept=0))):
        assert held.peak == result.peak_activations[rank]


@given(random_schedules(), any_costs, st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_memory_is_the_sum_of_what_lives(schedule: Schedule, costs: Costs, moment: float) -> None:
    """At any moment between changes, by the steps' own times."""
    result = simulate(schedule, costs)
    memory = Memory(weights=8, gradients=4, optimizer=2, activations=1, kept=0.25)
    time = moment * result.makespan
    for rank, held in enumerate(memory_of(result, memory)):
        stages = schedule.placement.stages(rank)
        assert held.static == 14 * len(stages)
        if any(abs(time - point) < 1e-9 for point, _ in held.curve):
            continue
        expected = 0.0
        spans = {a: (s.start, s.end) for s in result.spans[rank] for a in actions(s.step)}
        for (stage, op, m), (start, _) in spans.items():
            if op is Op.F and start < time:
                whole = ends(spans, stage, m, Op.B, Op.I)
                kept = ends(spans, stage, m, Op.B, Op.W)
                expected += 1 if time < whole else 0.25 if time < kept else 0
        assert [level for at, level in held.curve if at <= time][-1] == expected
        assert held.curve[-1][1] == 0


def ends(
    spans: Mapping[Action, tuple[float, float]], stage: int, microbatch: int, *ops: Op
) -> float:
    return next(
        end for (s, op, m), (_, end) in spans.items() if (s, m) == (stage, microbatch) and op in ops
    )


def test_memory_weighs_every_stage_by_its_own_size() -> None:
    result = simulate(build("dualpipe", ranks=2, microbatches=4), UNIT)
    held = memory_of(result, Memory(weights=[1, 10], activations=[100, 1000]))
    assert [rank.weights for rank in held] == [11, 11]
    assert {h.size for h in held[0].holdings} == {100, 1000}
    fine = Memory(weights=[2, 4], activations=8, kept=6).for_ranks(2, 4)
    assert (fine.weights, fine.activations, fine.kept) == ((1, 1, 2, 2), (4,) * 4, (3,) * 4)


def test_evaluation_frees_a_chunk_with_its_forward() -> None:
    result = simulate(forward_only(build("1f1b", ranks=2, microbatches=3)), UNIT)
    assert [held.peak for held in memory_of(result, Memory())] == [1, 1]


def test_sizes_of_memory_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="memory weights=-1 must be finite"):
        Memory(weights=-1)
    result = simulate(build("1f1b", ranks=2, microbatches=2), UNIT)
    with pytest.raises(ValueError, match="memory kept=2 of stage 0 is more than its activations"):
        memory_of(result, Memory(kept=2))
    with pytest.raises(ValueError, match="memory weights of 2 stages cannot be cut into 3"):
        Memory().for_ranks(2, 3)


def total(result: Result, lane: str) -> float:
    return sum(bar.end - bar.start for bar in bars(result) if bar.lane == lane)


def test_bars_show_all_that_happens() -> None:
    costs = Costs(pair=3, send=0.5, message=1, bandwidth=4, reduce=1, optimizer=0.25)
    result = simulate(build("dualpipe", ranks=4, microbatches=8), costs)
    assert total(result, STEPS) + total(result, FINISH) == sum(result.busy)
    assert total(result, SENDING) == len(result.transfers) * (0.5 + 0.25)
    assert {bar.kind for bar in bars(result)} == {
        "F", "B", "I", "W", "pair", "send", "reduce", "optimizer",
    }  # fmt: skip
