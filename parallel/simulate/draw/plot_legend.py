"""The legend of `plot`: what occurs, as it is drawn. Importing this needs matplotlib."""

# matplotlib leaves its keyword arguments without types.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.legend_handler import HandlerBase
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.transforms import Transform

from ...schedule import Op, Pair, actions
from ..events import Result
from .look import (
    FINISH_MEANINGS,
    MEANINGS,
    NEUTRAL,
    ON_BAR,
    Shades,
    bar_style,
    paler,
    stack_meaning,
)
from .look import LIGHT as INK

_COLUMNS = 4
_LINE_IN = 0.19


def legend_height_in(keys: Sequence[Patch | Line2D], *, drawn: bool) -> float:
    """How high the legend is."""
    return _LINE_IN * (-(-len(keys) // _COLUMNS) + (not drawn))


def draw_legend(
    figure: Figure, result: Result, keys: Sequence[Patch | Line2D], *, drawn: bool
) -> None:
    """Put the keys below the figure, and how to read a column where steps are painted."""
    legend = figure.legend(
        handles=keys,
        loc="lower center",
        ncols=_COLUMNS,
        frameon=False,
        fontsize=8,
        labelcolor=INK["ink"],
        handlelength=2.2,
        handleheight=1.1,
        borderaxespad=0.2,
        handler_map={_PairKey: _PairHandler()},
        title=None if drawn else stack_meaning({op.value for op in _ops(result)}),
        title_fontsize=8,
    )
    legend.get_title().set_color(INK["ink"])


def step_keys(result: Result, *, drawn: bool) -> list[Patch]:
    """Of steps and what follows them.

    Args:
        result: the simulated step.
        drawn: as bars, which have hatches and shades; else painted, in colours alone.
    """
    kinds = {part.kind for row in result.finish for part in row}
    meanings = {op.value: MEANINGS[op] for op in Op if op in _ops(result)}
    finish = {kind: text for kind, text in FINISH_MEANINGS.items() if kind in kinds}
    if not drawn:
        return [
            Patch(facecolor=INK[kind], lw=0, label=text)
            for kind, text in (meanings | finish).items()
        ]
    keys = [Patch(**bar_style(kind), label=text) for kind, text in meanings.items()]
    if any(isinstance(step, Pair) for row in result.plan.rows for step in row):
        keys.append(_PairKey(label="pair: F above, B below, at once"))
    shades = Shades(result.plan.placement)
    for number, name in enumerate(shades.names):
        if number < 3 or number == len(shades) - 1:
            colour = paler(NEUTRAL, shades.white(number))
            keys.append(Patch(facecolor=colour, edgecolor=ON_BAR, lw=0.5, label=name))
    return keys + [Patch(**bar_style(kind), label=text) for kind, text in finish.items()]


def _ops(result: Result) -> set[Op]:
    return {action.op for row in result.plan.rows for step in row for action in actions(step)}


class _PairKey(Patch):
    """Stands for a pair in the legend."""


class _PairHandler(HandlerBase):
    """Draws a pair in the legend as it is in a row: two lanes."""

    def create_artists(
        self,
        legend: Legend,  # noqa: ARG002
        orig_handle: Artist,  # noqa: ARG002
        xdescent: float,
        ydescent: float,
        width: float,
        height: float,
        fontsize: float,  # noqa: ARG002
        trans: Transform,
    ) -> Sequence[Artist]:
        half = height / 2
        return [
            Rectangle((-xdescent, y - ydescent), width, half, transform=trans, **bar_style(op))
            for op, y in ((Op.F, half), (Op.B, 0.0))
        ]
