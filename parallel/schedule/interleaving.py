"""The interleaving of a pair of chunks, as a value: in which order their phases are issued.

A chunk is some layers, each cut where it communicates. A phase is called by its name and direction:

    attn(F)  shared(F)  dispatch(F)  mlp(F)  combine(F)             forward
    combine(B)  shared(B)  mlp(B)  dispatch(B)  attn(B)             backward for inputs
    shared(W)  mlp(W)  attn(W)                                      backward for weights

Phases that compute run one after another in the order given, and so do those that communicate, the
ones beside the others, each when what it needs is there. So the order says who goes first on either
lane; it never says that one lane waits for the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

# The order of the published trace (facts of github.com/deepseek-ai/profile-data, train.json).
PUBLISHED_ORDER = (
    "combine(B)",
    "attn(F)",
    "mlp(B)",
    "dispatch(F)",
    "dispatch(B)",
    "mlp(W)",
    "mlp(F)",
    "attn(B)",
    "attn(W)",
    "combine(F)",
)
# Alone, a direction has only itself to hide behind: shared experts behind dispatch(F) and
# combine(B), weight gradients behind dispatch(B) and behind combine(B) of the layer before. What
# communicates starts as soon as it can, but dispatch(F) on a GPU, where the host waits for sizes in
# dispatch(F)'s place: shared(F) comes ahead of it so that the device has that to do meanwhile.
FORWARD_ORDER = ("attn(F)", "shared(F)", "dispatch(F)", "mlp(F)", "combine(F)")
BACKWARD_ORDER = (
    "combine(B)",
    "shared(B)",
    "mlp(B)",
    "dispatch(B)",
    "shared(W)",
    "mlp(W)",
    "attn(B)",
    "attn(W)",
)
_NAME = re.compile(r"(.+)\(([FBW])\)")


class PhaseName(NamedTuple):
    """A phase and its direction: F, B (for inputs) or W (for weights); `str` gives "mlp(B)"."""

    phase: str
    direction: str

    def __str__(self) -> str:
        return f"{self.phase}({self.direction})"


class Item(NamedTuple):
    """A phase of one layer of the step's forward chunk (F) or backward chunk (B, W).

    `layer` and `phase` count in the forward's order, in both chunks.
    """

    direction: str
    layer: int
    phase: int


class PhaseOutline(NamedTuple):
    """What an interleaving needs to know of a phase of a layer."""

    name: str
    communicates: bool


LayerOutline = Sequence[PhaseOutline]


class InterleavingError(ValueError):
    """An interleaving that cannot be executed; the message names the phases."""


@dataclass(frozen=True)
class Interleaving:
    """In which order the phases of a step's layers are issued.

    In a pair, the first layer of the forward goes with the layer that the backward reaches first,
    and so on; what is left of the longer one follows, in its own direction's order. A layer without
    any named phase (an embedding, a head) runs before the next, its backward at once. A computing
    phase of a layer that an order does not name stands right before the next phase of its layer
    that it names in the forward, and right after that one's in a backward, several of them in the
    order of their data. So layers that are chains can be run whatever is left unnamed. Weight
    gradients of a phase whose gradient for inputs is named are computed with that if they are not.

    Attributes:
        pair: of a forward and a backward that overlap; empty, they run one after the other.
        forward: of a forward alone.
        backward: of a backward alone.

    Raises:
        InterleavingError: a name is not of the form "mlp(B)", is there twice, or a direction alone
            has a phase of another.
    """

    pair: tuple[str, ...] = PUBLISHED_ORDER
    forward: tuple[str, ...] = FORWARD_ORDER
    backward: tuple[str, ...] = BACKWARD_ORDER

    def __post_init__(self) -> None:
        for what, allowed in (("pair", "FBW"), ("forward", "F"), ("backward", "BW")):
            names = _parse(getattr(self, what), what)
            for name in names:
                if name.direction not in allowed:
                    raise InterleavingError(
                        f"interleaving: {name} is no phase of {what}; its directions are "
                        f"{', '.join(allowed)}"
                    )
            seen = set(names)
            for name in names:
                if name.direction == "W" and PhaseName(name.phase, "B") not in seen:
                    raise InterleavingError(
                        f"interleaving: {what} has {name} without {name.phase}(B), which it needs"
                    )

    @property
    def backward_first(self) -> bool:
        """Whether the backward of a pair gives its gradient before the forward its output."""
        last = {name.direction: number for number, name in enumerate(_parse(self.pair, "pair"))}
        return last.get("B", -1) < last.get("F", -1)

    def arrange(
        self,
        forward: Sequence[LayerOutline],
        backward: Sequence[LayerOutline],
        *,
        weights: bool = True,
    ) -> tuple[Item, ...]:
        """The items of a step, in the order in which they are issued.

        Args:
            forward: layers of the forward chunk, in its order; empty for a backward alone.
            backward: layers of the backward chunk, in the forward's order; empty for a forward
                alone.
            weights: False leaves the weight gradients out (I); they come in a step of their own.

        Raises:
            InterleavingError: an order lacks a phase that communicates, or has one direction of a
                phase and not the other.
        """
        pairs = min(_num_named(forward, self.pair, "F"), _num_named(backward, self.pair, "B"))
        rounds_f = _rounds(forward, self.pair if pairs else self.forward, "F")
        rounds_b = _rounds(backward, self.pair if pairs else self.backward, "B")
        items: list[Item] = []
        for number in range(max(len(rounds_f), len(rounds_b))):
            one = rounds_f[number] if number < len(rounds_f) else None
            other = rounds_b[number] if number < len(rounds_b) else None
            order = self.pair if number < pairs else (*self.backward, *self.forward)
            for found in (other, one):
                items += [] if found is None else found.before
            layers = {
                direction: found.layer
                for direction, found in (("F", one), ("B", other))
                if found is not None and found.layer is not None
            }
            outlines = {"F": forward, "B": backward}
            for direction, layer in layers.items():
                _check_named(outlines[direction][layer], order, direction)
            for name in _parse(order, "order"):
                chunk = "F" if name.direction == "F" else "B"
                if chunk in layers and (weights or name.direction != "W"):
                    layer = layers[chunk]
                    items += _phases(outlines[chunk][layer], layer, name, order)
            for found in (other, one):
                items += [] if found is None else found.after
        return tuple(items)


class _Round(NamedTuple):
    """A named layer of one direction, and the unnamed ones that run just before and after it."""

    before: list[Item]
    layer: int | None
    after: list[Item]


def _parse(order: Sequence[str], what: str) -> list[PhaseName]:
    names: list[PhaseName] = []
    for text in order:
        match = _NAME.fullmatch(text)
        if match is None:
            raise InterleavingError(
                f"interleaving: {what} has {text!r}; a phase is written like mlp(F), with one of "
                "F, B and W"
            )
        name = PhaseName(match[1], match[2])
        if name in names:
            raise InterleavingError(f"interleaving: {what} has {name} twice")
        names.append(name)
    return names


def _is_named(layer: LayerOutline, order: Sequence[str], direction: str) -> bool:
    return any(f"{phase.name}({direction})" in order for phase in layer)


def _num_named(layers: Sequence[LayerOutline], order: Sequence[str], direction: str) -> int:
    return sum(_is_named(layer, order, direction) for layer in layers)


def _rounds(layers: Sequence[LayerOutline], order: Sequence[str], direction: str) -> list[_Round]:
    """Named layers in the order in which the direction meets them, each with its unnamed ones."""
    rounds: list[_Round] = []
    waiting: list[Item] = []
    indices = range(len(layers))
    for index in indices if direction == "F" else reversed(indices):
        if _is_named(layers[index], order, direction):
            rounds.append(_Round(waiting, index, []))
            waiting = []
            continue
        phases = range(len(layers[index]))
        for phase in phases if direction == "F" else reversed(phases):
            waiting.append(Item(direction, index, phase))
    if waiting:
        if rounds:
            rounds[-1] = rounds[-1]._replace(after=waiting)
        else:
            rounds.append(_Round(waiting, None, []))
    return rounds


def _check_named(layer: LayerOutline, order: Sequence[str], direction: str) -> None:
    for phase in layer:
        name = f"{phase.name}({direction})"
        if phase.communicates and name not in order:
            raise InterleavingError(
                f"interleaving: no place for {name}, which communicates; name it in the order "
                f"{' '.join(order)}"
            )
        if phase.communicates and direction == "B" and f"{phase.name}(W)" in order:
            raise InterleavingError(
                f"interleaving: {phase.name} communicates, so there is no {phase.name}(W); leave "
                f"it out of the order {' '.join(order)}"
            )
    computing = [phase.name for phase in layer if not phase.communicates]
    if computing and f"{computing[-1]}({direction})" not in order:
        raise InterleavingError(
            f"interleaving: no place for {computing[-1]}({direction}), the last phase of its layer "
            f"that computes; name it in the order {' '.join(order)}"
        )


def _phases(layer: LayerOutline, index: int, name: PhaseName, order: Sequence[str]) -> list[Item]:
    """The items that stand at `name`: its phase and, in the order of their data, unnamed ones."""
    items = [
        Item(name.direction, index, number)
        for number in range(len(layer))
        if _stands_at(layer, number, name.direction, order) == name.phase
    ]
    return items if name.direction == "F" else items[::-1]


def _stands_at(
    layer: LayerOutline, number: int, direction: str, order: Sequence[str]
) -> str | None:
    """At whose place a phase is issued: its own if it is named, else that of a later one."""
    own, communicates = layer[number]
    named = [phase.name for phase in layer[number:] if f"{phase.name}({direction})" in order]
    if direction != "W" or own in named:
        return named[0] if named else None
    if communicates or f"{own}(B)" in order:
        return None  # weight gradients there are none, or they are computed with those for inputs
    # Not ahead of its own B, which may stand at what communicates between the two.
    before = order.index(f"{_stands_at(layer, number, 'B', order)}(B)")
    return next((name for name in named if order.index(f"{name}(W)") > before), None)


def check_order(
    items: Sequence[Item],
    needs: Callable[[Item], Sequence[Item]],
    name: Callable[[Item], str],
) -> None:
    """Raise InterleavingError unless each item comes after what it needs.

    Args:
        items: of one step, as `arrange` gives them.
        needs: items of the same step whose results an item takes.
        name: what to call an item in the error.
    """
    place = {item: number for number, item in enumerate(items)}
    for item, number in place.items():
        for needed in needs(item):
            if needed not in place:
                raise InterleavingError(
                    f"interleaving: {name(item)} needs {name(needed)}, which has no place in it"
                )
            if place[needed] > number:
                raise InterleavingError(
                    f"interleaving: {name(item)} comes before {name(needed)}, which it needs; move "
                    f"{name(needed)} ahead of it"
                )


DEFAULT_INTERLEAVING = Interleaving()
