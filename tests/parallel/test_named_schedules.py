"""The closed forms of the named schedules, and the published numbers that they reproduce."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.parallel.schedule import Op, actions, build, verify
from counterflow.parallel.simulate import Costs, Result, simulate

# F = I = W = 1, so B = 2 and F&B = 3: all times are whole numbers and all sums exact.
UNIT = Costs(F=1, I=1, W=1, pair=3)


def run(name: str, ranks: int, microbatches: int, costs: Costs = UNIT, **options: int) -> Result:
    schedule = build(name, ranks=ranks, microbatches=microbatches, **options)
    return simulate(schedule, costs)


def own_times(result: Result) -> list[float]:
    """Per rank, the time from its first start to its last end."""
    return [row[-1].end - row[0].start for row in result.spans]


def sizes() -> Iterator[tuple[int, int]]:
    """(ranks, micro-batches): all ranks from 2 to 64, of many ranks a few micro-batch counts."""
    for ranks in range(2, 65):
        if ranks <= 6:
            counts = set(range(1, 3 * ranks + 2))
        elif ranks <= 12:
            counts = {1, ranks // 2, ranks - 1, ranks, ranks + 3, 2 * ranks - 1, 2 * ranks + 1}
        elif ranks in (16, 25, 38):
            counts = {2, ranks, 2 * ranks}
        else:
            counts = {(1, ranks // 3, 8, ranks - 1, ranks + ranks // 8)[ranks % 5]}
        yield from ((ranks, count) for count in sorted(counts))


def require(result: Result, makespan: int, peak: list[int], peak_chunks: list[int]) -> None:
    size = result.schedule, result.ranks, result.microbatches
    assert (result.makespan, *size) == (makespan, *size)
    assert (result.peak_activations, *size) == (tuple(peak), *size)
    assert (result.peak_chunks, *size) == (tuple(peak_chunks), *size)


def test_gpipe_has_its_closed_forms_at_every_size() -> None:
    for p, m in sizes():
        require(run("gpipe", p, m), 3 * (m + p - 1), [m] * p, [m] * p)


def test_1f1b_has_its_closed_forms_at_every_size() -> None:
    for p, m in sizes():
        peak = [min(p - r, m) for r in range(p)]
        require(run("1f1b", p, m), 3 * (m + p - 1), peak, peak)


@pytest.mark.parametrize("v", [2, 3])
def test_interleaved_has_its_closed_forms_at_every_size(v: int) -> None:
    for p, m in sizes():
        if v == 3 and p > 16:
            break
        largest = -(-m // max(1, m // p))
        peak = [min(2 * (p - 1 - r) + (v - 1) * largest + 1, v * m) for r in range(p)]
        makespan = 3 * (v * m + p - 1) if m >= p else 3 * (v * p + m - 1)
        require(run("interleaved", p, m, stages_per_rank=v), makespan, peak, peak)


def test_interleaved_goes_as_megatron_does_where_it_can() -> None:
    """Groups of as many micro-batches as ranks, and Megatron-LM's number of warm-up forwards."""
    schedule = build("interleaved", ranks=2, microbatches=4)
    assert [" ".join(map(str, row)) for row in schedule.rows] == [
        "0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 2B2 2B3 0B2 0B3",
        "1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3",
    ]
    for p, v, groups in product((2, 4, 8), (2, 4), (1, 2, 3)):
        row = build("interleaved", ranks=p, microbatches=groups * p, stages_per_rank=v).rows[0]
        ops = [a.op for step in row for a in actions(step)]
        assert ops.index(Op.B) == min(2 * (p - 1) + (v - 1) * p + 1, v * groups * p)


def test_zb_h1_has_its_closed_forms_at_every_size() -> None:
    for p, m in sizes():
        makespan = 3 * m + p - 1 if m >= p else 2 * m + 2 * p - 1
        peak = [min(p - r, m) for r in range(p)]
        require(run("zb-h1", p, m), makespan, peak, [min(p, m)] * p)


def test_zb_h2_has_its_closed_forms_at_every_size() -> None:
    for p, m in sizes():
        result = run("zb-h2", p, m)
        makespan = max(3 * m + p - 1, 2 * m + 2 * p - 1)
        peak = [min(2 * (p - 1 - r) + 1, m) for r in range(p)]
        require(result, makespan, peak, [min(2 * p - 1, m)] * p)
        if m >= 2 * p - 1:
            assert own_times(result) == [3 * m] * p, "no rank waits once it has begun"


@pytest.mark.parametrize("times", [(4, 4, 3), (4, 4, 2), (1, 1, 0.5)])
def test_the_bubbles_of_zb_h1_and_zb_h2_are_as_published_for_shorter_weight_halves(
    times: tuple[float, float, float],
) -> None:
    """(P-1)(F+I-W) and (P-1)(F+I-2W), arXiv 2401.10241, section 2.3; halves are exact."""
    forward, inputs, weights = times
    costs = Costs(F=forward, I=inputs, W=weights)
    for p in range(2, 17):
        m = 2 * p + 3
        work = m * (forward + inputs + weights)
        bubble = (p - 1) * (forward + inputs - weights)
        assert max(own_times(run("zb-h1", p, m, costs))) == work + bubble
        bubble = (p - 1) * (forward + inputs - 2 * weights)
        assert max(own_times(run("zb-h2", p, m, costs))) == work + bubble


# Of arXiv 2401.10241: the times of table 9 (F, I, W and T_comm) and the bubble rates of table 5.
ZERO_BUBBLE_TABLE = [
    # m, times, stages a rank of 1F1B-I, 1F1B, 1F1B-I, ZB-H1, ZB-H2
    (24, (18.522, 18.086, 9.337, 0.601), 3, 0.2431, 0.1055, 0.1585, 0.1083),
    (32, (18.513, 18.086, 9.331, 0.626), 3, 0.1985, 0.0818, 0.1242, 0.0837),
    (64, (18.546, 18.097, 9.321, 0.762), 3, 0.1240, 0.0443, 0.0674, 0.0444),
    (24, (29.718, 29.444, 19.927, 0.527), 4, 0.2347, 0.0808, 0.1323, 0.0698),
    (32, (29.802, 29.428, 19.530, 0.577), 4, 0.1898, 0.0628, 0.1045, 0.0559),
    (64, (29.935, 29.621, 19.388, 0.535), 4, 0.1091, 0.0320, 0.0554, 0.0294),
]


@pytest.mark.parametrize("row", ZERO_BUBBLE_TABLE)
def test_the_zero_bubble_papers_table_comes_out_to_four_decimals(
    row: tuple[int, tuple[float, ...], int, float, float, float, float],
) -> None:
    """The rate is (cost - m(F+I+W)) / cost, and the cost that of the rank that takes longest.

    1F1B-I alone needs a word. Its stages are a transformer layer each where that is possible (24
    layers with embedding and head on 8 ranks: 3 a rank; 32: 4). Megatron-LM's order has then a
    bubble that is larger than the printed one by P * T_comm, the same in all six rows. It waits for
    P * T_comm where a group of micro-batches comes round from the last rank to the first, v-1 times
    while the pipeline fills and v-1 times while it drains; the printed numbers have one such wait
    less. The paper does not say which of them it does not count.
    """
    m, (forward, inputs, weights, send), v, one_f_one_b, one_f_one_b_i, h1, h2 = row
    work = m * (forward + inputs + weights)
    costs = Costs(F=forward, I=inputs, W=weights, send=send)

    def rate(cost: float) -> float:
        return round(1 - work / cost, 4)

    assert rate(max(own_times(run("1f1b", 8, m, costs)))) == one_f_one_b
    assert rate(max(own_times(run("zb-h1", 8, m, costs)))) == h1
    assert rate(max(own_times(run("zb-h2", 8, m, costs)))) == h2
    finer = Costs(F=forward / v, I=inputs / v, W=weights / v, send=send)
    cost = max(own_times(run("interleaved", 8, m, finer, stages_per_rank=v)))
    assert rate(cost) > one_f_one_b_i
    assert rate(cost - 8 * send) == one_f_one_b_i


def test_zbv_has_its_closed_forms_at_every_size() -> None:
    for p, m in sizes():
        result = run("zbv", p, m)
        # What a rank has to do, and the time until the last one can begin.
        shortest = 6 * m + p - 1
        if m >= 2 * p - 1:
            require(result, shortest, [2 * p] * p, [2 * p] * p)
            assert own_times(result) == [6 * m] * p, "no rank waits once it has begun"
        else:
            most = shortest + p // 4 if m >= p else max(shortest, 4 * p + 3 * m - 1)
            assert shortest <= result.makespan <= most, (p, m)
            assert max(result.peak_chunks) <= 2 * p


def test_v_half_has_its_closed_forms_at_every_size() -> None:
    for p, m in sizes():
        result = run("v-half", p, m)
        idle = 3 * p - 4 if p % 2 else max(1, 3 * p - 7)
        check_block(result, idle, limit=2 * (p // 2 + 1))
        if m >= p:
            assert result.peak_chunks == (2 * (p // 2 + 1),) * p


def test_v_min_has_its_closed_forms_at_every_size() -> None:
    for p, m in sizes():
        idle = 4 * p - 5 if p % 3 == 1 else 4 * p - 7
        check_block(run("v-min", p, m), idle, limit=2 * ((p + 4) // 3))


def check_block(result: Result, idle: int, limit: int) -> None:
    """The idle time and the most chunks of a rank from m = P up; below, no more than 1F1B's."""
    p, m = result.ranks, result.microbatches
    assert max(result.peak_activations) <= max(result.peak_chunks) <= limit, (p, m)
    if m >= p:
        assert result.idle == (idle,) * p, (p, m)
        assert max(result.peak_activations) == limit, (p, m)
    else:
        assert result.makespan <= 6 * (m + p - 1), (p, m)


def dualpipe_forms(p: int, m: int) -> tuple[int, list[int]]:
    """Makespan and peak of the P/2 ranks from one end, of m micro-batches in both directions."""
    makespan = 3 * m + p - 2
    if m < 2 * p:
        makespan = 2 * m + (3 * p - 2 if m > p else 5 * p // 2 - 3)
    return makespan, [min(p + 1, m, m // 2 + 1 + h) for h in range(p // 2)]


def test_dualpipe_has_its_closed_forms_at_every_size() -> None:
    for p, m in ((p, m + m % 2) for p, m in sizes() if p % 2 == 0):
        makespan, peak = dualpipe_forms(p, m)
        require(run("dualpipe", p, m), makespan, peak + peak[::-1], peak + peak[::-1])


def test_dualpipev_has_its_closed_forms_at_every_size() -> None:
    for p, m in sizes():
        makespan, peak = dualpipe_forms(2 * p, 2 * m)
        require(run("dualpipev", p, m), makespan, peak, peak)


# F, I, W and a pair; where it is F + I + W, overlapping gains nothing.
TIMES = [(1, 1, 1, 3), (1, 1.2, 0.8, 2.6), (1, 2, 1, 4), (2, 1, 0.5, 3.5)]


@pytest.mark.parametrize("times", TIMES)
def test_dualpipe_takes_no_longer_than_1f1b(times: tuple[float, float, float, float]) -> None:
    """1F1B takes (m+P-1)(F+B), B being I + W."""
    forward, inputs, weights, pair = times
    costs = Costs(F=forward, I=inputs, W=weights, pair=pair)
    for p in range(2, 33, 2):
        few = range(2, 4 * p + 1, 2) if p <= 8 else {2, 4, p, p + 2, 2 * p - 2, 2 * p, 4 * p}
        for m in few:
            longest = (m + p - 1) * (forward + inputs + weights)
            # A sum of hundreds of tenths is off by less than 1e-9.
            assert run("dualpipe", p, m, costs).makespan <= longest + 1e-9, (p, m)


@pytest.mark.parametrize("times", TIMES)
def test_dualpipev_takes_no_longer_than_1f1b(times: tuple[float, float, float, float]) -> None:
    """As above; on P ranks each of 1F1B's stages is two of these."""
    forward, inputs, weights, pair = times
    costs = Costs(F=forward, I=inputs, W=weights, pair=pair)
    for p in range(2, 17):
        few = range(1, 4 * p + 1) if p <= 5 else {1, 3, p, 2 * p - 1, 2 * p, 3 * p + 1}
        for m in few:
            longest = 2 * (m + p - 1) * (forward + inputs + weights)
            assert run("dualpipev", p, m, costs).makespan <= longest + 1e-9, (p, m)


eighths = st.integers(0, 32).map(lambda n: n / 8)  # binary fractions: sums are exact


@given(st.integers(1, 4), st.integers(1, 10), st.data())
@settings(deadline=None, max_examples=150)
def test_dualpipe_takes_no_longer_than_1f1b_with_uneven_stages_and_messages_that_take_time(
    half: int, entering: int, data: st.DataObject
) -> None:
    """B is I + W, and no pair takes longer than its members one after the other."""
    ranks, microbatches = 2 * half, 2 * entering
    forward, inputs, weights = (
        tuple(max(least, data.draw(eighths)) for _ in range(ranks)) for least in (0.125, 0, 0)
    )
    share = data.draw(st.integers(0, 4)) / 4

    def pair(f: int, b: int) -> float:
        members = forward[f], inputs[b] + weights[b]
        return max(members) + share * min(members)

    costs = Costs(F=forward, I=inputs, W=weights, pair=pair, send=data.draw(eighths))
    one = run("1f1b", ranks, microbatches, costs)
    assert run("dualpipe", ranks, microbatches, costs).makespan <= one.makespan


def test_dearer_pairs_and_slow_messages_can_make_1f1b_the_shorter_one() -> None:
    """What the docstrings of DualPipe and DualPipeV say about where they lose, and by how much."""
    times = {"F": 0.11338379746826943, "I": 3, "W": 0.08606587601473104}
    dear = Costs(**times, pair=1.3 * sum(times.values()))
    ratio = run("dualpipe", 10, 36, dear).makespan / run("1f1b", 10, 36, dear).makespan
    assert round(ratio, 2) == 1.16
    slow = Costs(F=1, I=0.25, W=0, pair=1, send=1)
    folded = run("dualpipev", 4, 2, slow.for_ranks(4, 8)).makespan
    assert round(folded / run("1f1b", 4, 2, slow).makespan, 2) == 1.47


def test_fewer_micro_batches_leave_out_the_last_ones_of_dualpipe() -> None:
    full = build("dualpipe", ranks=4, microbatches=8)
    fewer = build("dualpipe", ranks=4, microbatches=4)
    verify(fewer)
    kept = {0: 0, 1: 1, 4: 2, 5: 3}  # two of each direction
    for row, longer in zip(fewer.rows, full.rows, strict=True):
        assert [a for step in row for a in actions(step)] == [
            a._replace(microbatch=kept[a.microbatch])
            for step in longer
            for a in actions(step)
            if a.microbatch in kept
        ]


@pytest.mark.parametrize("name", ["zb-h1", "zb-h2", "zbv", "v-half", "v-min"])
def test_these_have_no_full_backward_and_no_pairs(name: str) -> None:
    schedule = build(name, ranks=4, microbatches=9)
    assert {a.op for row in schedule.rows for step in row for a in actions(step)} == set("FIW")
    assert all(len(actions(step)) == 1 for row in schedule.rows for step in row)


@pytest.mark.parametrize("name", ["zbv", "v-half", "v-min", "dualpipev"])
def test_stages_folded_in_a_v_meet_on_the_last_rank(name: str) -> None:
    placement = build(name, ranks=3, microbatches=2).placement
    assert placement.routes == ((0, 1, 2, 2, 1, 0),)
