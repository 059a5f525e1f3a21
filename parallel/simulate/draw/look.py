"""How steps look in every picture: colours, hatches, lanes, shades and words. No drawing here.

What a step is can be told without colour: by hatch, by lightness, and a pair by its two lanes;
where there are too many steps for that, by its place in a stack.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from ...schedule import Action, Pair, Placement, Step
from ..events import Result

# Name -> colour, on light paper and on dark. F, I, W and B go from light to dark.
LIGHT = {
    "paper": "#fefffe",
    "ink": "#1d2129",
    "faint": "#6f7683",
    "grid": "#dfe2e8",
    "F": "#f6cf63",
    "B": "#5a94c8",
    "I": "#85cabb",
    "W": "#b899d9",
    "reduce": "#e39a86",
    "mirror": "#c8d08a",
    "optimizer": "#b9bec8",
    "weights": "#747d8d",
    "gradients": "#979eac",
    "activations": "#c39f85",
    "critical": "#c8102e",
}
DARK = {
    "paper": "#15181d",
    "ink": "#e4e7ec",
    "faint": "#969eac",
    "grid": "#2f353f",
    "F": "#ecc455",
    "B": "#5b98cc",
    "I": "#80c7b6",
    "W": "#b597d8",
    "reduce": "#d98d78",
    "mirror": "#b9c276",
    "optimizer": "#a4a9b4",
    "weights": "#5d6573",
    "gradients": "#7d8593",
    "activations": "#b3907a",
    "critical": "#ff6b7d",
}
# As matplotlib writes them.
HATCHES = {"F": "", "B": "///", "I": "\\\\\\", "W": "---"}
FINISH_HATCHES = {"reduce": "...", "mirror": "xxx", "optimizer": "+++"}
MEANINGS = {
    "F": "F  forward",
    "B": "B  full backward",
    "I": "I  input-gradient half",
    "W": "W  weight-gradient half",
}
FINISH_MEANINGS = {
    "reduce": "gradients over data-parallel ranks",
    "mirror": "gradients over copies of a stage",
    "optimizer": "optimizer step",
}
# From below upwards, in a stack of the shares of a time; F hangs from above.
STACK = ("W", "I", "B", "reduce", "mirror", "optimizer")
NEUTRAL = "#7f848e"  # shows a shade that every kind may have
ON_BAR = "#101216"  # edges of bars and text on them, on any paper
HATCHES_ON = {"dark": "#ffffff80", "pale": "#10121650"}  # colours of hatches
PALEST = 0.55  # share of white in the palest shade
ROW = 0.8  # height of a bar; rows are 1 apart


def count(number: int, one: str, several: str) -> str:
    """A number of things: "1 rank", "8 ranks"."""
    return f"{number} {one if number == 1 else several}"


def sizes(result: Result) -> str:
    """How large a simulated step is, in words."""
    batches = count(result.microbatches, "micro-batch", "micro-batches")
    return f"{count(result.ranks, 'rank', 'ranks')} × {batches}"


def stack_meaning(kinds: Collection[str]) -> str:
    """What a column of a stack says, of a picture in which these kinds occur."""
    below = [kind for kind in "WIB" if kind in kinds]
    stands = f", {' then '.join(below)} from below" if below else ""
    return f"a column: the shares of its time, F from above{stands}; empty: idle"


class Box(NamedTuple):
    """What one action of a step occupies in its row: from `top`, relative to the row's middle.

    Downwards is positive, as ranks are numbered.
    """

    action: Action
    top: float
    height: float


def boxes(step: Step) -> tuple[Box, ...]:
    """A pair has two lanes, its forward above its backward; any other step has the whole row."""
    if isinstance(step, Pair):
        half = ROW / 2
        return Box(step.forward, -half, half), Box(step.backward, 0.0, half)
    return (Box(step, -ROW / 2, ROW),)


def bar_style(kind: str, white: float = 0.0) -> dict[str, Any]:
    """Arguments of a matplotlib patch that shows an action or what follows a row.

    Args:
        kind: "F", "B", "I", "W", "reduce", "mirror" or "optimizer".
        white: share of white in its colour, from 0 to 1.
    """
    return {
        "facecolor": paler(LIGHT[kind], white),
        "hatch": HATCHES[kind] if kind in HATCHES else FINISH_HATCHES[kind],
        "hatchcolor": hatch_colour(white),
        "edgecolor": ON_BAR,
        "linewidth": 0.5,
    }


def hatch_colour(white: float) -> str:
    """Of a hatch on a colour with a share of white, that it can be seen there."""
    return HATCHES_ON["pale" if white > PALEST / 2 else "dark"]


def paler(colour: str, white: float) -> str:
    """A colour "#rrggbb" with a share of white in it."""
    if white == 0:
        return colour
    channels = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(c + (255 - c) * white):02x}" for c in channels)


class Shades:
    """Which of a rank's stages an action belongs to, as a shade; the first one is the darkest.

    A rank holds several stages in interleaved and V-shaped schedules, which a micro-batch visits
    one after the other; in a bidirectional one they belong to the two directions.
    """

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        keys = {
            (route, _visit(path, stage))
            for route, path in enumerate(placement.routes)
            for stage in range(len(path))
        }
        self._keys = sorted(keys)

    def __len__(self) -> int:
        return len(self._keys)

    def of(self, action: Action) -> int:
        """Number of the shade of an action, from 0."""
        return self.by_route[self._placement.route_of[action.microbatch]][action.stage]

    def white(self, number: int) -> float:
        """Share of white in a shade."""
        return PALEST * number / max(1, len(self) - 1)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """What each shade says; empty where there is but one."""
        if len(self) == 1:
            return ()
        routes = self._placement.routes
        visits = {visit for _, visit in self._keys}
        entries = [path[0] for path in routes]
        found: list[str] = []
        for route, visit in self._keys:
            distinct = entries.count(entries[route]) == 1
            way = f"enters at rank {entries[route]}" if distinct else f"route {route}"
            which = f"{_ordinal(visit + 1)} stage of its rank"
            parts = [way] if len(routes) > 1 else []
            found.append(", ".join([*parts, which] if len(visits) > 1 else parts))
        return tuple(found)

    @cached_property
    def by_route(self) -> tuple[tuple[int, ...], ...]:
        """Per route of the placement, the number of the shade of each stage."""
        number = {key: index for index, key in enumerate(self._keys)}
        return tuple(
            tuple(number[route, _visit(path, stage)] for stage in range(len(path)))
            for route, path in enumerate(self._placement.routes)
        )


def _visit(path: Sequence[int], stage: int) -> int:
    """How often a route has been on the rank of `stage` before."""
    return path[:stage].count(path[stage])


def _ordinal(number: int) -> str:
    ending = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10)
    return f"{number}{ending or 'th'}"
