"""Costs become the times of a pipeline's stages; wrong ones are refused with the entry."""

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow.parallel.schedule import Action, Op, Pair
from counterflow.parallel.simulate import Costs, Phases
from counterflow.parallel.simulate.phases import (
    BACKWARD,
    COMMUNICATION,
    COMPUTE,
    FORWARD,
    NAMES,
    PUBLISHED_ORDER,
    WEIGHTS,
    PhaseSpan,
    duration,
)

UNIT = Costs(F=1, I=1, W=1, pair=3)
numbers = st.integers(0, 8).map(lambda n: n / 4)  # binary fractions: sums are exact


def test_costs_default_to_a_backward_of_its_halves_and_a_pair_that_gains_nothing() -> None:
    step = Action(0, Op.B, 0)
    pair = Pair(Action(0, Op.F, 1), step)
    halves = Costs(F=2, I=3, W=5).times(1)
    assert (halves.of(step), halves.of(pair)) == (8, 10)
    assert Costs(F=2, I=3, W=5, B=7).times(1).of(pair) == 9
    assert Costs(F=2, I=3, W=5, B=7, pair=8).times(1).of(pair) == 8


def test_costs_are_read_from_text() -> None:
    assert Costs.parse("F=1,I=1,W=1,pair=3,send=0") == UNIT
    assert Costs.parse(" F = 1.5 , I=1,W = 1,send=2e-1") == Costs(F=1.5, send=0.2)
    assert Costs.parse("pair=2.5,send=1") == Costs(pair=2.5, send=1)
    assert Costs.parse("F=1,I=2,W=3,B=4") == Costs(F=1, I=2, W=3, B=4)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "'' is not NAME=NUMBER"),
        ("F=1,", "'' is not NAME=NUMBER"),
        ("F:1", "'F:1' is not NAME=NUMBER"),
        ("f=1", "unknown 'f'; did you mean F"),
        ("pairs=1", "unknown 'pairs'; did you mean pair"),
        ("xyz=1", "unknown 'xyz'; known: F, I, W, B, pair, send, message"),
        ("F=1,F=2", "F is there twice"),
        ("F=one", "F='one' is not a number"),
        ("F=", "F='' is not a number"),
        ("F=nan,I=1,W=1", "cost F=nan must be finite"),
        ("send=inf", "cost send=inf must be finite"),
        ("F=1,I=1,W=-1", r"cost W=-1\.0 must be finite and from 0 up"),
        ("F=0,I=1,W=1", "cost F=0"),
        ("F=1", "I and W missing; F, I and W go together"),
        ("B=2", "F and I and W missing"),
        ("F=1,I=1,pair=3", "'F=1,I=1,pair=3': W missing"),
    ],
)
def test_bad_costs_are_refused_with_the_entry(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Costs.parse(text)


@pytest.mark.parametrize("value", ["1", True, None, [1]])
def test_costs_are_numbers(value: object) -> None:
    with pytest.raises(ValueError, match=r"cost send=.* is not a number"):
        Costs(send=value)  # pyright: ignore[reportArgumentType]


def test_a_list_has_an_entry_a_stage_and_a_function_is_asked_for_each() -> None:
    listed = Costs(F=[1, 2, 3, 4], I=1, W=[0, 1, 0, 1]).times(4)
    assert (listed.F, listed.I, listed.W) == ((1, 2, 3, 4), (1,) * 4, (0, 1, 0, 1))
    assert listed.B == (1, 2, 1, 2)
    assert listed.pair[2][1] == 3 + 2
    asked = Costs(F=lambda s: s + 1, I=1, W=lambda s: s % 2, pair=lambda f, b: 10 * f + b).times(4)
    assert (asked.F, asked.W) == (listed.F, listed.W)
    assert asked.pair[3][2] == 32
    assert asked.of(Pair(Action(3, Op.F, 7), Action(2, Op.B, 5))) == 32


def test_a_list_by_layer_is_summed() -> None:
    assert Costs(F=[1, 2, 3, 4, 5, 6]).times(3).F == (3, 7, 11)
    for entries in ([1, 2, 3, 4, 5, 6], [2, 4]):
        says = f"cost F is a list of {len(entries)}, but there are 4 stages; give 4"
        with pytest.raises(ValueError, match=says):
            Costs(F=entries).times(4)


def test_a_model_cut_finer_costs_the_same_in_all() -> None:
    costs = Costs(F=[1, 2], I=1, W=[0.5, 1], pair=2.5, mirror=4, reduce=[1, 3], optimizer=1)
    halves = costs.for_ranks(2, 4)
    fine = halves.times(4)
    assert (fine.F, fine.I, fine.W) == ((0.5, 0.5, 1, 1), (0.5,) * 4, (0.25, 0.25, 0.5, 0.5))
    assert fine.B == (0.75, 0.75, 1, 1)
    assert fine.pair == ((1.25,) * 4,) * 4
    assert (halves.mirror, halves.reduce) == ((2,) * 4, (0.5, 0.5, 1.5, 1.5))
    assert costs.for_ranks(2, 2) is costs
    alone = Costs(F=[1, 2], B=4).for_ranks(2, 4).times(4)
    assert alone.pair[2][0] == 1 + 2
    asked = Costs(F=lambda s: s + 1, pair=lambda f, b: 10 * f + b + 1).for_ranks(2, 4).times(4)
    assert (asked.F, asked.pair[3][2]) == ((0.5, 0.5, 1, 1), (10 + 1 + 1) / 2)
    for stages in (3, 1):
        with pytest.raises(ValueError, match=f"2 stages cannot be cut into {stages} stages"):
            costs.for_ranks(2, stages)


def test_a_list_by_layer_says_what_each_finer_stage_costs() -> None:
    """The embedding's layer stays in the first stage, and is not spread over the first two."""
    costs = Costs(F=[3, 1, 1, 1, 1, 1, 1, 1])
    assert costs.times(4).F == (4, 2, 2, 2)
    assert costs.for_ranks(4, 8).times(8).F == (3, 1, 1, 1, 1, 1, 1, 1)
    assert costs.for_ranks(2, 4).times(4).F == (4, 2, 2, 2)


def test_a_message_keeps_its_size_where_a_model_is_cut_finer() -> None:
    costs = Costs(message=[8, 6], bandwidth=2, send=0.5)
    assert costs.times(2).occupy == (4,)
    assert costs.for_ranks(2, 4).times(4).occupy == (4, 4, 3)
    assert costs.for_ranks(2, 4).times(4).send == 0.5
    nothing = Costs(message=[0, 0], bandwidth=2)
    assert nothing.for_ranks(2, 4).times(4).occupy == (0, 0, 0)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Costs(F=[]), "cost F is an empty list"),
        (lambda: Costs(F=[1, -1]), r"cost F\[1\]=-1 must be finite and from 0 up"),
        (lambda: Costs(F=[1, 0]), "cost F=0"),
        (lambda: Costs(F=lambda s: -1).times(2), r"cost F\(0\)=-1 must be finite"),
        (lambda: Costs(pair=lambda f, b: float("nan")).times(1), r"cost pair\(0, 0\)=nan"),
        (lambda: Costs(message=1), "cost bandwidth, in bytes a unit, is missing"),
        (lambda: Costs(bandwidth=1), "cost message, in bytes, is missing"),
        (lambda: Costs(message=1, bandwidth=0), "cost bandwidth=0: nothing would arrive"),
        (lambda: Costs(F=2, phases=Phases(ONES)), "cost F is given beside phases"),
    ],
)
def test_costs_that_make_no_sense_are_refused(make: Callable[[], object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_lists_are_read_from_text() -> None:
    assert Costs.parse("F=1/1/1.5,I=1,W=1,pair=3") == Costs(F=(1, 1, 1.5), pair=3)
    for name in ("send", "pair", "bandwidth"):
        with pytest.raises(ValueError, match=f"{name} is one number"):
            Costs.parse(f"{name}=1/2")


ONES = dict.fromkeys(NAMES, 1.0)
phase_times = st.fixed_dictionaries(dict.fromkeys(NAMES, numbers))


def test_phases_alone_overlap_nothing_but_weight_gradients() -> None:
    """A full backward runs W behind its communication; the rest is a chain."""
    phases = Phases(ONES, layers=3)
    assert duration(phases.forward(3)) == 3 * len(FORWARD)
    assert duration(phases.input_half(3)) == 3 * len(BACKWARD)
    assert duration(phases.weight_half(3)) == 3 * len(WEIGHTS)
    # Of each layer's two weight gradients one hides behind dispatch(B), which frees the chain; the
    # other behind the next layer's combine(B); the last layer's has nothing to hide behind.
    assert duration(phases.backward(3)) == 3 * len(BACKWARD) + 1


def test_a_balanced_pair_hides_all_communication() -> None:
    """Of one layer's ten phases, six compute: with equal times the compute lane never waits."""
    spans = Phases(ONES, layers=4).pair(4, 4)
    assert duration(spans) == 4 * 6
    assert sum(s.lane == COMMUNICATION for s in spans) == 4 * 4


@given(phase_times, st.integers(0, 3), st.integers(0, 3), st.sampled_from([0.0, 0.5]))
def test_phases_keep_their_lanes_their_order_and_what_they_need(
    times: dict[str, float], forward: int, backward: int, share: float
) -> None:
    spans = Phases(times, comm_share=share).pair(forward, backward)
    by_key = {(s.name, s.layer): s for s in spans}
    assert len(by_key) == 4 * forward + 6 * backward
    for lane in (COMPUTE, COMMUNICATION):
        mine = [s for s in spans if s.lane == lane]
        assert all(a.end <= b.start for a, b in pairwise(mine))
    for (name, layer), span in by_key.items():
        stretch = 1 / (1 - share) if span.lane == COMPUTE else 1
        assert span.end - span.start == times[name] * stretch
        for need in needed_phases(name, layer):
            assert by_key[need].end <= span.start
        # No later than it must: at 0, or when its lane or a need ended.
        others = [s.end for s in spans if s.lane == span.lane and s.end <= span.start]
        ends = [by_key[need].end for need in needed_phases(name, layer)]
        assert span.start in [0.0, *others, *ends]


def needed_phases(name: str, layer: int) -> list[tuple[str, int]]:
    """What a phase of a layer needs, written down apart from the library's own rule."""
    return {
        "attn(F)": [("combine(F)", layer - 1)] if layer else [],
        "dispatch(F)": [("attn(F)", layer)],
        "mlp(F)": [("dispatch(F)", layer)],
        "combine(F)": [("mlp(F)", layer)],
        "combine(B)": [("attn(B)", layer - 1)] if layer else [],
        "mlp(B)": [("combine(B)", layer)],
        "mlp(W)": [("mlp(B)", layer)],
        "dispatch(B)": [("mlp(B)", layer)],
        "attn(B)": [("dispatch(B)", layer)],
        "attn(W)": [("attn(B)", layer)],
    }[name]


def test_costs_follow_from_phases_and_layers() -> None:
    phases = Phases(ONES, layers=[1, 3])
    times = Costs(phases=phases).times(2)
    assert times.F == (4, 12)
    assert times.I == (4, 12)
    assert times.W == (2, 6)
    assert (duration(phases.backward(1)), duration(phases.backward(3))) == times.B
    assert times.pair[1][0] == duration(phases.pair(3, 1))
    with pytest.raises(ValueError, match="layers has 2 entries, but there are 3 stages"):
        Costs(phases=phases).times(3)


def test_layers_are_summed_or_cut_like_other_lists() -> None:
    assert Phases(ONES, layers=4).for_ranks(2, 4).layers == (2, 2, 2, 2)
    uneven = Phases(ONES, layers=[1, 2, 3, 4])
    assert uneven.layers_of(2) == (3, 7)
    assert uneven.for_ranks(2, 4).layers == (1, 2, 3, 4)
    with pytest.raises(ValueError, match="the 3 layers of stage 1 cannot be cut in 2 parts"):
        Phases(ONES, layers=[2, 3]).for_ranks(2, 4)
    halves = Costs(phases=Phases(ONES, layers=4), mirror=2).for_ranks(2, 4)
    assert (halves.times(4).F, halves.mirror) == ((8,) * 4, (1,) * 4)


def test_a_share_of_the_multiprocessors_slows_computation_where_lanes_overlap() -> None:
    plain, shared = Phases(ONES), Phases(ONES, comm_share=0.5)
    assert duration(plain.forward(1)) == duration(shared.forward(1))
    compute = [s for s in shared.pair(1, 1) if s.lane == COMPUTE]
    assert [s.end - s.start for s in compute] == [2.0] * 6
    compute = [s for s in shared.backward(1) if s.lane == COMPUTE]
    assert [s.end - s.start for s in compute] == [2.0] * 4


def test_the_order_of_a_pair_can_be_chosen() -> None:
    other = tuple(reversed(PUBLISHED_ORDER))
    with pytest.raises(ValueError, match="before"):
        Phases(ONES, order=other)
    serial = (*FORWARD, "combine(B)", "mlp(B)", "mlp(W)", "dispatch(B)", "attn(B)", "attn(W)")
    assert duration(Phases(ONES, order=serial).pair(1, 1)) > duration(Phases(ONES).pair(1, 1))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Phases({}), r"no time for 'attn\(F\)'"),
        (lambda: Phases({**ONES, "mlp(G)": 1}), r"unknown 'mlp\(G\)'; did you mean mlp"),
        (lambda: Phases({**ONES, "mlp(F)": -1}), r"phases: mlp\(F\)=-1 must be finite and from 0"),
        (lambda: Phases({**ONES, "mlp(F)": True}), r"phases: mlp\(F\)=True is not a number"),
        (lambda: Phases(ONES, layers=[1, True]), r"layers=\[1, True\] must be"),
        (lambda: Costs(phases=Phases(dict.fromkeys(NAMES, 0.0))).times(1), "cost F=0"),
        (lambda: Costs(F=10**400), "cost F is too large a number"),
        (lambda: Phases(ONES, layers=0), "layers=0 must be whole numbers from 1 up"),
        (lambda: Phases(ONES, layers=[]), r"layers=\[\] must be"),
        (lambda: Phases(ONES, comm_share=1), "comm_share=1 must be from 0 to below 1"),
        (lambda: Phases(ONES, order=FORWARD), "order must have each of"),
    ],
)
def test_phases_that_make_no_sense_are_refused(make: Callable[[], object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_spans_name_their_layer_and_lane() -> None:
    spans = Phases(ONES, layers=1).forward(1)
    assert spans[1] == PhaseSpan("dispatch(F)", 0, COMMUNICATION, 1.0, 2.0)
