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


def test_shared_experts_that_an_order_does_not_name_go_right_before_the_routed_ones() -> None:
    found = names(Interleaving().arrange([MOE], [MOE]), [MOE])
    for direction in "FBW":
        at = found.index(f"mlp({direction})0")
        assert found[at - 1] == f"shared({direction})0"


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
