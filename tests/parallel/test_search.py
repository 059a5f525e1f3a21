"""The list scheduler, ZB-1p and ZB-2p, the searcher and its bound."""

import math
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.parallel.schedule import Op, Pair, Placement, Schedule, Times, build, verify
from counterflow.parallel.schedule.greedy import (
    EARLIER_STAGE,
    LATER_STAGE,
    OLDEST,
    Priorities,
    construct,
)
from counterflow.parallel.schedule.lanes import lay_out
from counterflow.parallel.schedule.tuning import shared
from counterflow.parallel.simulate import Costs, simulate
from counterflow.parallel.simulate.bounds import lower_bound
from counterflow.parallel.simulate.compare import compare
from counterflow.parallel.simulate.phases import NAMES, Phases
from counterflow.parallel.simulate.search import search
from tests.cases_schedules import random_schedules

# Sums of the same times in another order differ in their last digits.
ROUNDING = 1e-9

# The zero-bubble paper's table 9 (times) and table 5 (bubble rates of ZB-H1 and ZB-2p).
TABLE = [
    (24, 18.522, 18.086, 9.337, 0.601, 0.1585, 0.0433),
    (32, 18.513, 18.086, 9.331, 0.626, 0.1242, 0.0039),
    (64, 18.546, 18.097, 9.321, 0.762, 0.0674, 0.0026),
    (24, 29.718, 29.444, 19.927, 0.527, 0.1323, 0.0029),
    (32, 29.802, 29.428, 19.53, 0.577, 0.1045, 0.0022),
    (64, 29.935, 29.621, 19.388, 0.535, 0.0554, 0.0010),
]

eighths = st.integers(0, 24).map(lambda n: n / 8)  # binary fractions: sums are exact


def path(ranks: int, shape: str) -> tuple[tuple[int, ...], ...]:
    ahead = tuple(range(ranks))
    if shape == "interleaved":
        return (ahead * 2,)
    if shape == "V":
        return (ahead + ahead[::-1],)
    return (ahead, ahead[::-1]) if shape == "bidirectional" and ranks > 1 else (ahead,)


@st.composite
def uneven_times(draw: st.DrawFn, stages: int) -> Times:
    def some(low: float = 0) -> tuple[float, ...]:
        return tuple(max(low, draw(eighths)) for _ in range(stages))

    forward, inputs, weights, whole = some(0.125), some(), some(), some()
    backward = tuple(min(b, i + w) for b, i, w in zip(whole, inputs, weights, strict=True))
    saving = draw(st.sampled_from([0, 0.25]))
    pair = tuple(tuple(max(f, f + b - saving) for b in backward) for f in forward)
    return Times(forward, inputs, weights, backward, pair, draw(eighths), (0.0,) * (stages - 1))


@st.composite
def priorities(draw: st.DrawFn, ranks: int) -> Priorities:
    def shares() -> tuple[float, ...]:
        return tuple(draw(st.sampled_from([0.0, 0.5, 1.0])) for _ in range(ranks))

    order = st.sampled_from([OLDEST, EARLIER_STAGE, LATER_STAGE])
    caps = tuple(draw(st.sampled_from([1.0, 2.5, math.inf])) for _ in range(ranks))
    return Priorities(
        warmup=shares(),
        delay=shares(),
        w_delays_f=shares(),
        w_delays_i=shares(),
        w_delays_last=shares(),
        in_flight=caps,
        forward=draw(order),
        backward=draw(order),
        forward_first=draw(st.booleans()),
        whole=draw(st.booleans()),
        pair_wait=draw(st.sampled_from([0.0, 1.0])),
    )


def peak_memory(schedule: Schedule, rank: int, chunk: list[float], pending: float) -> float:
    """Most memory of a rank, in chunks that weigh `chunk` by stage; after I only `pending`."""
    alive = peak = 0.0
    for step in schedule.rows[rank]:
        for action in (step.forward, step.backward) if isinstance(step, Pair) else (step,):
            size = chunk[action.stage]
            alive += size if action.op is Op.F else 0
            peak = max(peak, alive)
            released = {Op.F: 0.0, Op.I: 1 - pending, Op.W: pending, Op.B: 1.0}
            alive -= size * released[action.op]
    return peak


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_a_list_schedule_always_runs_within_its_memory_and_its_times(data: st.DataObject) -> None:
    ranks, microbatches = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 6))
    routes = path(
        ranks, data.draw(st.sampled_from(["straight", "V", "interleaved", "bidirectional"]))
    )
    placement = Placement(routes, tuple(m % len(routes) for m in range(microbatches)))
    stages = placement.num_stages
    times = data.draw(uneven_times(stages))
    chunk = [data.draw(st.sampled_from([0.5, 1.0, 1.5])) for _ in range(stages)]
    smallest = [sum(chunk[s] for s in placement.stages(rank)) for rank in range(ranks)]
    limit = [least + data.draw(st.sampled_from([0.0, 1.0, 9.0])) for least in smallest]
    pending = data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    lanes = lay_out(placement, times, limit=limit, chunk=chunk, pending=pending)
    built = construct(lanes, data.draw(priorities(ranks)))
    schedule = built.schedule("list")
    verify(schedule)
    result = simulate(schedule, times)
    assert result.makespan <= built.makespan  # exact: a merged B ends no later than its W did
    for rank in range(ranks):
        assert peak_memory(schedule, rank, chunk, pending) <= limit[rank]
    assert lower_bound(placement, times) <= result.makespan


def test_a_limit_without_room_for_the_stages_names_the_smallest_possible() -> None:
    times = Times.uniform(4)
    placement = Placement(path(2, "V"), (0,) * 3)
    with pytest.raises(ValueError, match=r"limit 1\.5 of rank 0 .* smallest possible is 2 chunks"):
        lay_out(placement, times, limit=1.5)
    lay_out(placement, times, limit=2)


def test_pairs_are_formed_where_they_save_time() -> None:
    placement = Placement((tuple(range(4)),), (0,) * 12)
    for pair, some in ((2.5, True), (3.0, False)):
        lanes = lay_out(placement, Times.uniform(4, pair=pair))
        built = construct(lanes, shared(4))
        result = simulate(built.schedule("list"), lanes.times)
        assert any(counts["pair"] for counts in result.op_counts) is some


@pytest.mark.parametrize(("m", "F", "I", "W", "send", "zb_h1", "zb_2p"), TABLE)
def test_zb_1p_and_zb_2p_are_no_worse_than_the_paper_prints(
    m: int,
    F: float,
    I: float,  # noqa: E741
    W: float,
    send: float,
    zb_h1: float,
    zb_2p: float,
) -> None:
    times = Times.uniform(8, F=F, I=I, W=W, send=send)

    def rate(schedule: Schedule) -> float:
        cost = simulate(schedule, times).rolling_makespan
        return round((cost - m * (F + I + W)) / cost, 4)  # printed with four decimals

    one = build("zb-1p", ranks=8, microbatches=m, times=times)
    two = build("zb-2p", ranks=8, microbatches=m, times=times)
    assert rate(one) <= zb_h1
    assert rate(two) <= zb_2p
    assert max(simulate(one, times).peak_chunks) <= 8
    # With whole chunks the bound of zb_2p's docstring is above the printed rate in every row.
    for rank in range(8):
        assert peak_memory(two, rank, [1.0] * 8, 16 / 37) <= 16 + ROUNDING


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8, 13])
def test_zb_1p_and_zb_2p_have_their_bubbles_with_even_times(ranks: int) -> None:
    for microbatches in (2 * ranks, 2 * ranks + 3):
        for name, bubble, limit in (("zb-1p", ranks - 1, ranks), ("zb-2p", 0, 2 * ranks)):
            result = simulate(build(name, ranks=ranks, microbatches=microbatches), Costs())
            assert result.rolling_makespan == 3 * microbatches + bubble
            assert max(result.peak_chunks) <= limit


@given(st.integers(1, 6), st.integers(1, 14), st.data())
@settings(deadline=None, max_examples=40)
def test_zb_1p_never_loses_to_zb_h1(ranks: int, microbatches: int, data: st.DataObject) -> None:
    times = data.draw(uneven_times(ranks))
    if data.draw(st.booleans()):  # messages that queue
        times = replace(times, occupy=tuple(data.draw(eighths) for _ in range(ranks - 1)))
    one = simulate(build("zb-1p", ranks=ranks, microbatches=microbatches, times=times), times)
    h1 = simulate(build("zb-h1", ranks=ranks, microbatches=microbatches), times)
    assert max(one.peak_chunks) <= ranks
    assert one.rolling_makespan <= h1.rolling_makespan


@pytest.mark.parametrize(
    ("microbatches", "times"),
    [
        (21, Times.uniform(7, F=1.3199559201794184, I=1.0783931880911173, W=1.8439624821173468)),
        # Messages queue, of which the list scheduler knows nothing.
        (10, replace(Times.uniform(7, F=1, I=1.5, W=0.5), occupy=(2.0,) * 6)),
    ],
)
def test_zb_1p_is_zb_h1_where_the_search_finds_nothing_as_good(
    microbatches: int, times: Times
) -> None:
    one = build("zb-1p", ranks=7, microbatches=microbatches, times=times)
    h1 = build("zb-h1", ranks=7, microbatches=microbatches)
    assert one.rows == h1.rows


def test_searched_schedules_are_the_same_every_time() -> None:
    times = Times.uniform(4, F=1.3, I=1.1, W=0.7, send=0.05)
    made = [build("zb-2p", ranks=4, microbatches=10, times=times) for _ in range(2)]
    assert made[0] == made[1]
    costs = Costs(F=(1, 1, 1, 1.5), send=0.1)
    assert search(4, 6, costs, budget=20_000) == search(4, 6, costs, budget=20_000)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"times": Times.uniform(3)}, "zb-2p: times of 3 stages, but .* ranks=4"),
        ({"pending": 1.5}, "zb-2p: pending=1.5 must be a share"),
    ],
)
def test_impossible_options_of_zb_2p_are_refused(options: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        build("zb-2p", ranks=4, microbatches=8, **options)


@pytest.mark.parametrize(
    ("ranks", "microbatches", "limit", "copies"),
    [(4, 8, 4, None), (8, 20, 8, None), (4, 12, 4, 1), (6, 12, 12, 1)],
)
def test_an_uneven_model_gains_over_the_best_named_schedule(
    ranks: int, microbatches: int, limit: int, copies: int | None
) -> None:
    head = (1.0,) * (ranks - 1) + (1.5,)
    costs = Costs(F=head, I=head, W=head)
    found = search(
        ranks, microbatches, costs, memory_limit=limit, parameter_copies=copies, budget=300_000
    )
    assert found.makespan < found.named_makespan
    assert found.bound <= found.makespan


# Per placement, a model for which the search without it finds nothing as short.
ONLY_ON = [
    (
        "straight",
        (3, 3, Costs(F=(1, 2, 1), I=(2, 1, 2), W=(1, 1, 1.5), send=2)),
        {"memory_limit": 2, "parameter_copies": 1},
        36,
    ),
    (
        "V-shaped",
        (3, 8, Costs(F=(1, 1, 2), I=(1, 2, 1.5), W=(1, 2, 2), pair=1)),
        {"memory_limit": 2, "parameter_copies": 1},
        35,
    ),
    (
        r"looped \(2 stages a rank\)",
        (2, 8, Costs(F=(1, 1.5), I=(1, 2), W=(2, 2), pair=1)),
        {"parameter_copies": 1},
        18,
    ),
    (
        r"looped \(4 stages a rank\)",
        (4, 8, Costs(F=(1, 1, 2, 1), I=(1, 1.5, 2, 1), W=(2, 1.5, 2, 1), B=(2.25, 2.25, 3, 1.5))),
        {"memory_limit": 4, "parameter_copies": 1},
        36.0625,
    ),
    ("bidirectional", (2, 4, Costs(F=(1, 2), I=(1.5, 1), W=(2, 2), send=2, pair=1)), {}, 16),
]


@pytest.mark.parametrize(("placement", "model", "limits", "makespan"), ONLY_ON)
def test_each_placement_gives_schedules_that_no_other_gives(
    placement: str, model: tuple[int, int, Costs], limits: dict[str, int], makespan: float
) -> None:
    found = search(*model, **limits, budget=40_000)
    assert found.makespan <= makespan < found.named_makespan
    assert re.fullmatch(f"greedy on a {placement} pipeline", found.found)


def test_a_walk_from_the_best_priorities_shortens_what_they_give() -> None:
    costs = Costs(F=(2, 1, 1, 1.5), I=(1, 2, 2, 1.5), W=(1, 2, 1, 1.5))
    found = search(4, 6, costs, memory_limit=4, parameter_copies=1, budget=40_000)
    assert found.makespan <= 29.5  # without it 30.625


def test_the_walk_begins_where_the_end_of_the_step_counts_too() -> None:
    costs = Costs(F=(1, 2, 1, 1.5), I=(1, 1, 1.5, 2), W=(1.5, 1, 2, 1.5), pair=1, mirror=2)
    found = search(4, 2, costs, memory_limit=4, budget=40_000)
    assert found.makespan <= 13.625  # from the bidirectional rows, which end first, 13.875


def test_a_search_tries_named_schedules_with_more_stages_a_rank() -> None:
    uneven = (1.5, 1, 1, 2)
    costs = Costs(F=uneven, I=uneven, W=uneven)
    found = search(4, 12, costs, budget=1)
    for number in (2, 3, 4, 8):
        schedule = build("interleaved", ranks=4, microbatches=12, stages_per_rank=number)
        makespan = simulate(schedule, costs.for_ranks(4, 4 * number)).makespan
        assert found.bound <= found.named_makespan <= makespan
    assert found.best_named == "interleaved with 8 stages a rank"


def test_placements_for_which_a_model_cannot_be_cut_are_left_out() -> None:
    layers = Phases(dict.fromkeys(NAMES, 1.0), layers=(3, 1))
    found = search(2, 4, Costs(phases=layers), parameter_copies=1)
    assert found.schedule.placement.routes == ((0, 1),)


def test_of_equal_makespans_fewer_copies_and_then_less_memory_decide() -> None:
    one = search(2, 4, Costs(), parameter_copies=1, budget=20_000).makespan
    perfect = simulate(build("dualpipe", ranks=2, microbatches=4), Costs()).makespan
    tie = Costs(mirror=(one - perfect) / 2)  # of two stages a rank
    found = search(2, 4, tie, budget=20_000)
    assert found.makespan == one
    assert (
        simulate(found.schedule, Costs().for_ranks(2, found.schedule.num_stages)).parameter_copies
        == 1
    )
    alone = search(1, 4, Costs())
    assert simulate(alone.schedule, Costs()).peak_chunks == (1,)


@given(st.integers(1, 4), st.integers(1, 7), st.data())
@settings(deadline=None, max_examples=20)
def test_a_search_never_loses_and_keeps_its_limits(
    ranks: int, microbatches: int, data: st.DataObject
) -> None:
    times = data.draw(uneven_times(ranks))
    costs = Costs(
        F=times.F,
        I=times.I,
        W=times.W,
        B=times.B,
        pair=lambda f, b: times.pair[f][b],
        send=times.send,
    )
    limits = [data.draw(st.sampled_from([1, 1.5, 2, 3, 20])) for _ in range(ranks)]
    copies = data.draw(st.sampled_from([None, 1]))
    found = search(
        ranks,
        microbatches,
        costs,
        memory_limit=limits,
        parameter_copies=copies,
        budget=3_000,
    )
    verify(found.schedule)
    assert found.schedule.name == "search"
    result = simulate(found.schedule, costs.for_ranks(ranks, found.schedule.num_stages))
    assert result.makespan == found.makespan <= found.named_makespan * (1 + ROUNDING)
    fitting = [
        entry.makespan
        for entry in compare(ranks, microbatches, costs).entries
        if all(held <= limit for held, limit in zip(entry.held, limits, strict=True))
        and (copies is None or entry.parameter_copies <= copies)
    ]
    # Stages a rank are tried there only as many as the schedules have by default.
    assert found.named_makespan <= min(fitting, default=math.inf) * (1 + ROUNDING)
    # Search sums the same times in another order.
    assert found.bound <= found.makespan * (1 + ROUNDING)
    share = ranks / result.stages
    assert all(
        peak * share <= limit for peak, limit in zip(result.peak_chunks, limits, strict=True)
    )
    assert copies is None or result.parameter_copies == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"memory_limit": 0.5}, "memory_limit=0.5 of rank 0 is too small: .* possible limit is 1"),
        ({"memory_limit": [4, 4, math.nan, 4]}, "memory_limit=nan of rank 2"),
        ({"memory_limit": [4, 4]}, "memory_limit has 2 entries, but there are 4 ranks"),
        ({"parameter_copies": 0}, "search: parameter_copies must be a whole number from 1 up"),
        ({"costs": Costs(F=(1, 2, 3))}, "cost F is a list of 3, but there are 4 stages"),
    ],
)
def test_impossible_searches_are_refused(options: dict[str, object], says: str) -> None:
    given_costs = options.pop("costs", Costs())
    with pytest.raises(ValueError, match=says):
        search(4, 8, given_costs, **options)  # pyright: ignore[reportArgumentType]


@given(random_schedules(), st.data())
@settings(deadline=None, max_examples=100)
def test_no_schedule_is_below_the_bound(schedule: Schedule, data: st.DataObject) -> None:
    times = data.draw(uneven_times(schedule.num_stages))
    assert lower_bound(schedule.placement, times) <= simulate(schedule, times).makespan


def test_the_bound_is_met_where_a_schedule_is_perfect() -> None:
    schedule = build("zb-h2", ranks=4, microbatches=12)
    times = Times.uniform(4)
    assert lower_bound(schedule.placement, times) == simulate(schedule, times).makespan


@pytest.mark.parametrize(("name", "send", "makespan"), [("1f1b", 0, 10), ("gpipe", 1, 12)])
def test_the_bound_has_the_way_of_the_last_gradient(name: str, send: int, makespan: int) -> None:
    """The last rank begins after F and send, and works for 8; send and the last B follow."""
    schedule = build(name, ranks=2, microbatches=4)
    times = Times.uniform(2, W=0, send=send)
    assert lower_bound(schedule.placement, times) == simulate(schedule, times).makespan == makespan
