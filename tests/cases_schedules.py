"""Schedules to test with: every built one of small sizes, and random ones that can be executed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from hypothesis import strategies as st

from counterflow.parallel.schedule import (
    Action,
    Op,
    Pair,
    Placement,
    Schedule,
    Step,
    actions,
    build,
    names,
)


def built_schedules(max_ranks: int) -> Iterator[Schedule]:
    """Every named schedule of up to `max_ranks` ranks: one micro-batch (or two), few and many."""
    for ranks in range(1, max_ranks + 1):
        for name in names():
            bidirectional = name == "dualpipe"
            if bidirectional and ranks % 2:
                continue
            for microbatches in sorted({1, ranks, ranks + 1, 2 * ranks + 1}):
                even = microbatches + microbatches % 2
                size = {"ranks": ranks, "microbatches": even if bidirectional else microbatches}
                yield build(name, **size)
        yield build("interleaved", ranks=ranks, microbatches=2 * ranks, stages_per_rank=3)


def needed(held: set[Action]) -> dict[Action, set[Action]]:
    """What each action needs of the rest, written down apart from the library's own rule."""
    needs: dict[Action, set[Action]] = {}
    for s, op, m in held:
        wanted = {
            Op.F: [(s - 1, Op.F)],
            Op.B: [(s, Op.F), (s + 1, Op.B), (s + 1, Op.I)],
            Op.I: [(s, Op.F), (s + 1, Op.B), (s + 1, Op.I)],
            Op.W: [(s, Op.I)],
        }[op]
        needs[Action(s, op, m)] = {Action(*w, m) for w in wanted} & held
    return needs


def all_actions(schedule: Schedule) -> list[Action]:
    return [action for row in schedule.rows for step in row for action in actions(step)]


def with_rows(schedule: Schedule, rows: list[list[Step]]) -> Schedule:
    return replace(schedule, rows=tuple(map(tuple, rows)))


@st.composite
def random_schedules(draw: st.DrawFn) -> Schedule:
    """A schedule with arbitrary routes that can be executed: one order of all actions, dealt out.

    Backwards are whole or split at random; neighbours in the common order become pairs at random.
    """
    random = draw(st.randoms(use_true_random=False))
    ranks = range(draw(st.integers(1, 4)))
    laps = draw(st.integers(1, 2))
    routes = [
        tuple(rank for _ in range(laps) for rank in random.sample(ranks, len(ranks)))
        for _ in range(draw(st.integers(1, 3)))
    ]
    placement = Placement.of([random.choice(routes) for _ in range(draw(st.integers(1, 5)))])
    held: set[Action] = set()
    for m in range(placement.num_microbatches):
        for s in range(placement.num_stages):
            backward = random.choice([(Op.B,), (Op.I, Op.W)])
            held |= {Action(s, op, m) for op in (Op.F, *backward)}
    needs = needed(held)
    rows: list[list[Step]] = [[] for _ in ranks]
    last = -1
    while needs:
        action = random.choice(
            sorted(a for a, wanted in needs.items() if not wanted & needs.keys())
        )
        del needs[action]
        rank = placement.rank(action.stage, action.microbatch)
        previous = rows[rank][-1] if rank == last else None
        last = rank
        if isinstance(previous, Action) and previous.microbatch != action.microbatch:
            both = {previous.op: previous, action.op: action}
            if both.keys() == {Op.F, Op.B} and random.random() < 0.5:
                rows[rank][-1] = Pair(both[Op.F], both[Op.B])
                continue
        rows[rank].append(action)
    return Schedule("random", placement, tuple(map(tuple, rows)))
