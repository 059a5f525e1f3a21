"""Many sets of times, run at once, end their rows when each does by itself."""

from __future__ import annotations

import random

import numpy as np
import pytest

from counterflow.parallel.schedule import Schedule, Times, build, forward_only
from counterflow.parallel.schedule.clock import row_ends, run
from counterflow.predict import clock_batch
from counterflow.predict.clock_batch import BatchClock


def some_times(rng: random.Random, stages: int) -> Times:
    def each() -> tuple[float, ...]:
        return tuple(rng.choice((0.0, rng.uniform(0.1, 3))) for _ in range(stages))

    pair = tuple(each() for _ in range(stages))
    return Times(each(), each(), each(), each(), pair, send=rng.choice((0.0, rng.random())))


def alone(schedule: Schedule, times: Times) -> list[float]:
    _, ends = run(schedule, times)
    return row_ends(schedule, ends)


def together(schedule: Schedule, sets: list[Times]) -> list[list[float]]:
    clock = BatchClock(schedule)
    durations = [
        [
            times.pair[kind.stage][kind.backward]
            if kind.op is None
            else getattr(times, kind.op.value)[kind.stage]
            for times in sets
        ]
        for kind in clock.kinds
    ]
    send = np.array([times.send for times in sets])
    return clock.row_ends(np.array(durations), send).T.tolist()


@pytest.mark.parametrize(
    "name", ["1f1b", "gpipe", "interleaved", "zb-h2", "zb-1p", "zbv", "dualpipe", "dualpipev"]
)
@pytest.mark.parametrize("ranks", [2, 4])
def test_rows_end_to_the_bit_as_the_clock_says(name: str, ranks: int) -> None:
    schedule = build(name, ranks=ranks, microbatches=12)
    rng = random.Random(ranks)
    sets = [some_times(rng, schedule.num_stages) for _ in range(7)]
    assert together(schedule, sets) == [alone(schedule, times) for times in sets]


def test_more_sets_than_fit_in_memory_are_run_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = forward_only(build("dualpipe", ranks=4, microbatches=8))
    rng = random.Random(0)
    sets = [some_times(rng, schedule.num_stages) for _ in range(7)]
    monkeypatch.setattr(clock_batch, "_MOST_BYTES", 3 * 8 * schedule.graph.num_steps)
    assert BatchClock(schedule).most == 3
    assert together(schedule, sets) == [alone(schedule, times) for times in sets]


def test_one_rank_waits_for_nobody() -> None:
    schedule = build("1f1b", ranks=1, microbatches=3)
    assert together(schedule, [Times.uniform(1), Times.uniform(1, F=2.0)]) == [[9.0], [12.0]]
