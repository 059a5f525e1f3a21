"""The interleaving of a pair as a value: where each phase stands, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from counterflow.parallel.schedule.interleaving import (
    PUBLISHED_ORDER,
    Interleaving,
    InterleavingError,
    Item,
    PhaseOutline,
    check_order,
)

MOE = tuple(
    PhaseOutline(name, name in ("dispatch", "combine"))
    for name in ("attn", "dispatch", "shared", "mlp", "combine")
)
DENSE = (PhaseOutline("attn", False), PhaseOutline("mlp", False))
EMBED = (PhaseOutline("embed", False),)
OUTPUT = (PhaseOutline("output", False),)


def names(items: Sequence[Item], layers: Sequence[Sequence[PhaseOutline]]) -> list[str]:
    return [f"{layers[i.layer][i.phase].name}({i.direction}){i.layer}" for i in items]


def test_a_pair_of_layers_is_issued_in_the_published_order() -> None:
    layers = [MOE[:2] + MOE[3:]]  # without shared experts
    items = Interleaving().arrange(layers, layers)
    assert names(items, layers) == [f"{name}0" for name in PUBLISHED_ORDER]


def test_unnamed_shared_experts_go_before_the_routed_ones_and_after_them_in_a_backward() -> None:
    found = names(Interleaving().arrange([MOE], [MOE]), [MOE])
    for direction, beside in (("F", -1), ("B", 1), ("W", 1)):
        at = found.index(f"mlp({direction})0")
        assert found[at + beside] == f"shared({direction})0"


chains = st.lists(
    st.builds(PhaseOutline, st.just("more"), st.booleans()), min_size=0, max_size=4
).map(
    # Phases of communication are named by the orders of these tests, computing ones are not.
    lambda more: [
        p._replace(name=f"{'send' if p.communicates else 'more'}{i}") for i, p in enumerate(more)
    ]
)


@given(chains, chains, st.booleans(), st.booleans())
def test_a_chain_runs_in_the_order_of_its_data_however_many_of_its_phases_are_unnamed(
    first: list[PhaseOutline], second: list[PhaseOutline], weights: bool, early: bool
) -> None:
    second = [p._replace(name=f"{p.name} too") for p in second]
    layer = [PhaseOutline("attn", False), *first, PhaseOutline("mid", False)]
    layer += [*second, PhaseOutline("mlp", False)]
    named = [p.name for p in layer if not p.name.startswith("more")]
    backward = [f"{name}(B)" for name in reversed(named)]
    # Weight gradients at once or at the end.
    for name in ("mlp", "mid", "attn"):
        place = backward.index(f"{name}(B)") + 1 if early else len(backward)
        backward.insert(place, f"{name}(W)")
    pair = (*backward, *(f"{name}(F)" for name in named))
    layers = [layer, layer]
    items = Interleaving(pair=pair).arrange(layers, layers, weights=weights)

    def needs(item: Item) -> list[Item]:
        if item.direction == "W":
            return [item._replace(direction="B")]
        other = item.phase + (-1 if item.direction == "F" else 1)
        return [item._replace(phase=other)] if 0 <= other < len(layer) else []

    check_order(items, needs, str)
    for direction in "FB":
        assert sum(item.direction == direction for item in items) == 2 * len(layer)


def test_several_unnamed_phases_stand_beside_the_next_named_one_in_the_order_of_data() -> None:
    layer = [PhaseOutline(name, False) for name in ("attn", "first", "second", "mlp")]
    pair = ("mlp(B)", "attn(F)", "attn(B)", "mlp(W)", "mlp(F)", "attn(W)")
    found = names(Interleaving(pair=pair).arrange([layer], [layer]), [layer])
    assert found == [
        *("mlp(B)0", "second(B)0", "first(B)0", "attn(F)0", "attn(B)0"),
        *("mlp(W)0", "second(W)0", "first(W)0", "first(F)0", "second(F)0", "mlp(F)0", "attn(W)0"),
    ]


def test_weights_of_what_communicates_are_refused() -> None:
    order = Interleaving(pair=(*PUBLISHED_ORDER, "combine(W)"))
    with pytest.raises(InterleavingError, match=r"there is no combine\(W\); leave it out"):
        order.arrange([MOE], [MOE])


def test_alone_each_direction_has_its_own_order_and_i_leaves_the_weights_out() -> None:
    order = Interleaving()
    assert names(order.arrange([MOE], []), [MOE]) == [f"{n}0" for n in order.forward]
    assert names(order.arrange([], [MOE]), [MOE]) == [f"{n}0" for n in order.backward]
    halves = names(order.arrange([], [MOE], weights=False), [MOE])
    assert halves == [f"{n}0" for n in order.backward if not n.endswith("(W)")]


def test_the_first_layer_forward_goes_with_the_last_one_and_the_rest_follows() -> None:
    forward, backward = [EMBED, DENSE, MOE], [MOE, MOE, MOE, OUTPUT]
    items = Interleaving().arrange(forward, backward)
    places = {item: place for place, item in enumerate(items)}
    assert items[:2] == (Item("B", 3, 0), Item("F", 0, 0))  # the output's gradient, the embedding
    # attn(F) of layer 1 goes with the backward of layer 2, that of layer 2 with layer 1.
    assert places[Item("F", 1, 0)] < places[Item("B", 2, 0)] < places[Item("F", 2, 0)]
    assert places[Item("F", 2, 4)] < places[Item("B", 0, 4)]  # combine(F), then what is left
    assert all(item.direction != "F" for item in items[places[Item("B", 0, 4)] :])


outlines = st.lists(st.sampled_from([MOE, DENSE, EMBED]), min_size=1, max_size=5)


@given(outlines, outlines, st.booleans())
def test_every_phase_of_both_chunks_has_one_place(
    forward: list[tuple[PhaseOutline, ...]],
    backward: list[tuple[PhaseOutline, ...]],
    weights: bool,
) -> None:
    items = Interleaving().arrange(forward, backward, weights=weights)
    assert len(set(items)) == len(items)
    for direction, layers in (("F", forward), ("B", backward)):
        expected = {Item(direction, i, p) for i, of in enumerate(layers) for p in range(len(of))}
        assert {item for item in items if item.direction == direction} == expected
        own = [item for item in items if item.direction == direction]
        assert [i.layer for i in own] == sorted((i.layer for i in own), reverse=direction == "B")
    computing = {
        Item("W", i, p)
        for i, layer in enumerate(backward)
        for p, phase in enumerate(layer)
        if not phase.communicates and layer != EMBED
    }
    assert {item for item in items if item.direction == "W"} == (computing if weights else set())


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"pair": ("attn",)}, "'attn'; a phase is written like mlp"),
        ({"pair": ("attn(F)", "attn(F)")}, r"attn\(F\) twice"),
        ({"forward": ("attn(B)",)}, r"attn\(B\) is no phase of forward"),
        ({"backward": ("attn(W)",)}, r"attn\(W\) without attn\(B\)"),
    ],
)
def test_what_no_layer_could_follow_is_refused_at_once(
    changed: dict[str, tuple[str, ...]], words: str
) -> None:
    with pytest.raises(InterleavingError, match=words):
        Interleaving(**changed)


@pytest.mark.parametrize(
    ("left_out", "words"),
    [
        ("combine(B)", r"no place for combine\(B\), which communicates"),
        ("mlp(F)", r"no place for mlp\(F\), the last phase of its layer"),
    ],
)
def test_an_order_without_a_phase_that_it_needs_is_refused(left_out: str, words: str) -> None:
    order = tuple(name for name in PUBLISHED_ORDER if name != left_out)
    with pytest.raises(InterleavingError, match=words):
        Interleaving(pair=order).arrange([MOE], [MOE])


def test_weights_without_a_place_of_their_own_are_computed_with_the_inputs_gradient() -> None:
    order = Interleaving(pair=tuple(n for n in PUBLISHED_ORDER if n != "mlp(W)"))
    found = names(order.arrange([MOE], [MOE]), [MOE])
    assert "mlp(W)0" not in found
    assert "attn(W)0" in found


def test_who_ends_first_follows_from_the_pairs_order() -> None:
    assert Interleaving().backward_first
    assert not Interleaving(pair=(*PUBLISHED_ORDER[:-3], "combine(F)", "attn(B)")).backward_first
