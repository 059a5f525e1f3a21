"""The simulation against the papers' numbers and against a second, slower way to compute it."""

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.parallel.schedule import (
    Action,
    Pair,
    Schedule,
    ScheduleError,
    actions,
    build,
    forward_only,
)
from counterflow.parallel.simulate import Costs, Result, simulate
from tests.cases_schedules import all_actions, needed, random_schedules, with_rows

UNIT = Costs(F=1, I=1, W=1, pair=3)
numbers = st.integers(0, 8).map(lambda n: n / 4)  # binary fractions: sums are exact


def run(name: str, ranks: int, microbatches: int, costs: Costs = UNIT) -> Result:
    return simulate(build(name, ranks=ranks, microbatches=microbatches), costs)


@pytest.mark.parametrize(
    ("ranks", "microbatches", "makespan", "bubble"),
    [(4, 8, 26, 2), (8, 20, 66, 6), (8, 40, 126, 6), (16, 120, 374, 14)],
)
def test_dualpipe_takes_the_published_time_on_every_rank(
    ranks: int, microbatches: int, makespan: int, bubble: int
) -> None:
    result = run("dualpipe", ranks, microbatches)
    assert result.makespan == makespan
    assert result.idle == (bubble,) * ranks
    assert result.bubble_rate == pytest.approx(bubble / makespan, rel=1e-15)


def test_dualpipe_uses_the_published_numbers_of_steps() -> None:
    counts = run("dualpipe", 16, 120).op_counts
    assert counts[0] == {"F": 23, "B": 8, "I": 15, "W": 15, "pair": 97}
    assert counts[7] == {"F": 17, "B": 9, "I": 8, "W": 8, "pair": 103}
    assert counts[0] == counts[15]
    assert counts[7] == counts[8]


def test_unequal_times_give_the_bubbles_of_the_fact_sheet() -> None:
    unequal = run("dualpipe", 8, 20, Costs(F=1, I=1.2, W=0.8, pair=2.6))
    assert (round(min(unequal.idle), 9), round(max(unequal.idle), 9)) == (5.2, 6.0)
    overlapped = run("dualpipe", 8, 20, Costs(pair=2.5))
    assert (min(overlapped.idle), max(overlapped.idle)) == (3.5, 4.5)
    assert overlapped.idle[3] == overlapped.idle[4] == 4.5


@pytest.mark.parametrize(
    ("microbatches", "costs", "rate"),
    [
        (24, Costs(F=18.522, I=18.086, W=9.337, send=0.601), 0.2431),
        (32, Costs(F=18.513, I=18.086, W=9.331, send=0.626), 0.1985),
        (64, Costs(F=18.546, I=18.097, W=9.321, send=0.762), 0.1240),
        (24, Costs(F=29.718, I=29.444, W=19.927, send=0.527), 0.2347),
        (32, Costs(F=29.802, I=29.428, W=19.53, send=0.577), 0.1898),
        (64, Costs(F=29.935, I=29.621, W=19.388, send=0.535), 0.1091),
    ],
)
def test_1f1b_has_the_bubble_rates_of_the_zero_bubble_paper(
    microbatches: int, costs: Costs, rate: float
) -> None:
    """Tables 5 and 9 of arXiv 2401.10241, eight stages; rank 0's time is the makespan there."""
    result = run("1f1b", 8, microbatches, costs)
    assert round(result.bubble_rate, 4) == rate
    work = microbatches * sum(map(number, (costs.F, costs.I, costs.W)))
    assert round((result.makespan - work) / result.makespan, 4) == rate


def number(cost: object) -> float:
    assert isinstance(cost, int | float)
    return cost


def longest_path(schedule: Schedule, costs: Costs) -> dict[Action, tuple[float, float]]:
    """Start and end of every action, relaxed until nothing moves."""
    needs = needed(set(all_actions(schedule)))
    rank_of = {a: r for r, row in enumerate(schedule.rows) for step in row for a in actions(step)}
    times = dict.fromkeys(rank_of, (0.0, 0.0))
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(schedule.rows):
            free = 0.0
            for step in row:
                arrivals = [
                    times[n][1] + (costs.send if rank_of[n] != rank else 0.0)
                    for a in actions(step)
                    for n in needs[a]
                ]
                start = max([free, *arrivals])
                forward, inputs, weights = (number(c) for c in (costs.F, costs.I, costs.W))
                backward = inputs + weights if costs.B is None else number(costs.B)
                pair = forward + backward if costs.pair is None else number(costs.pair)
                by_op = {"F": forward, "B": backward, "I": inputs, "W": weights}
                free = start + (pair if isinstance(step, Pair) else by_op[step.op])
                for a in actions(step):
                    moved |= times[a] != (start, free)
                    times[a] = (start, free)
    return times


@given(
    random_schedules(),
    st.builds(
        Costs,
        F=numbers.filter(bool),
        I=numbers,
        W=numbers,
        B=st.none() | numbers,
        pair=st.none() | numbers,
        send=numbers,
    ),
)
@settings(deadline=None, max_examples=100)
def test_every_step_starts_as_soon_as_it_can(schedule: Schedule, costs: Costs) -> None:
    result = simulate(schedule, costs)
    expected = longest_path(schedule, costs)
    found = {
        action: (span.start, span.end)
        for row in result.spans
        for span in row
        for action in actions(span.step)
    }
    assert found == expected
    assert [[span.step for span in row] for row in result.spans] == list(map(list, schedule.rows))
    assert result.makespan == max(end for _, end in expected.values())
    for rank, row in enumerate(result.spans):
        assert all(one.end <= other.start for one, other in pairwise(row))
        assert result.busy[rank] == sum(span.end - span.start for span in row)
        assert result.idle[rank] == result.makespan - result.busy[rank]
        assert sum(result.op_counts[rank].values()) == len(row)
    assert 0 <= result.bubble_rate < 1
    # The most chunks alive at any moment a step starts, from the times instead of from the rows.
    for rank, row in enumerate(schedule.rows):
        mine = [a for step in row for a in actions(step)]
        order = {a: i for i, step in enumerate(row) for a in actions(step)}
        died = {(a.stage, a.microbatch): order[a] for a in mine if a.op in "BI"}
        born = {(a.stage, a.microbatch): order[a] for a in mine if a.op == "F"}
        assert result.peak_activations[rank] == max(
            sum(born[c] <= i <= died[c] for c in born) for i in range(len(row))
        )


def test_a_send_delays_the_other_rank_and_keeps_nobody_busy() -> None:
    result = run("1f1b", 2, 1, Costs(F=1, I=2, W=3, send=10))
    assert [[tuple(span)[1:] for span in row] for row in result.spans] == [
        [(0, 1), (27, 32)],
        [(11, 12), (12, 17)],
    ]
    assert (result.makespan, result.busy, result.idle) == (32, (6, 6), (26, 26))
    within = run("dualpipev", 1, 2, Costs(send=10))
    assert within.idle == (0,)


def test_copies_of_the_parameters_are_counted() -> None:
    assert run("1f1b", 4, 8).parameter_copies == 1
    assert run("dualpipe", 4, 8).parameter_copies == 2
    assert run("dualpipev", 4, 8).parameter_copies == 1


def test_evaluation_holds_one_chunk_at_a_time() -> None:
    result = simulate(forward_only(build("dualpipe", ranks=4, microbatches=8)), UNIT)
    assert result.peak_activations == (1, 1, 1, 1)
    assert result.busy == (8, 8, 8, 8)


def test_json_has_the_promised_names_and_survives_json() -> None:
    result = run("dualpipe", 4, 8)
    document = result.to_json()
    assert " ".join(document) == (
        "schedule ranks stages microbatches makespan busy idle bubble_rate peak_activations "
        "parameter_copies op_counts peak_chunks rolling_makespan rolling_bubble_rate"
    )
    assert json.loads(json.dumps(document)) == document
    assert (document["schedule"], document["ranks"], document["stages"]) == ("dualpipe", 4, 4)
    assert (document["microbatches"], document["makespan"]) == (8, 26)
    assert document["busy"] == [24, 24, 24, 24]
    assert document["peak_activations"] == [5, 5, 5, 5]


def test_a_schedule_that_cannot_run_is_refused() -> None:
    schedule = build("1f1b", ranks=2, microbatches=2)
    with pytest.raises(ScheduleError, match="1B1 is missing"):
        simulate(with_rows(schedule, [[*schedule.rows[0]], [*schedule.rows[1][:-1]]]), UNIT)
