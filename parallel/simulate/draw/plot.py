"""A simulated step as a matplotlib figure. Importing this needs matplotlib (extra "plots").

Ranks are rows and time runs to the right; below it the memory. Steps that are wide enough are drawn
as bars, with hatches, and with micro-batch numbers where these fit; others are painted as one
bitmap, in which every column stacks the shares of its time.
Figures are made through matplotlib's objects, not pyplot, so nothing global is touched.
"""

# matplotlib leaves its keyword arguments without types.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from ...schedule import Action, Pair
from ..events import Result
from ..memory import RankMemory
from .figures import style_axes, text_points
from .look import LIGHT as INK
from .look import ON_BAR, ROW, Shades, bar_style, boxes, count, sizes
from .paint import paint
from .plot_legend import draw_legend, legend_height_in, step_keys
from .plot_memory import draw_memory, memory_height_in, memory_keys

_WIDTHS_IN = (10.0, 16.0)  # wider than the first only for the sake of numbers in narrow bars
_LEFT_IN, _RIGHT_IN = 0.72, 0.68
_MOST_DRAWN = 12_000  # steps; more are painted
_NUMBERED_PT = 6.2  # what a bar should have for its number
_NARROWEST_PT = 2.2  # what half of the bars must have to be drawn: two lines of a hatch
_DPI, _PAINTED_DPI = 200, 240
_STEPS_A_COLUMN = 12.0  # narrow ones, painted; with fewer, shares jump from column to column
_COLUMNS = (128, 1024)  # at least and at most
_EDGE, _FINE_EDGE = 0.5, 0.25  # lines around bars, in points
_EDGED_PT = 4.0  # what half of the bars must have for the first
_SIZES_PT = (7.0, 4.2)  # of micro-batch numbers, largest and smallest


def draw(result: Result, memories: Sequence[RankMemory], *, memory_unit: str = "chunks") -> Figure:
    """The steps of each rank over time, and what each rank holds below.

    Args:
        result: the simulated step.
        memories: what each rank holds, of the same result.
        memory_unit: `Memory.unit` of what the memories were made from.
    """
    times = (end - start for row in result.spans for _, start, end in row)
    widths = sorted(time for time in times if time > 0)
    width_in = _width_in(widths, result.makespan)
    scale = (width_in - _LEFT_IN - _RIGHT_IN) * 72 / result.makespan  # points a unit of time
    typical_pt = widths[len(widths) // 2] * scale
    drawn = len(widths) <= _MOST_DRAWN and typical_pt >= _NARROWEST_PT
    width_in = width_in if drawn else _WIDTHS_IN[0]
    row_in = max(0.1, min(0.34, 7.0 / result.ranks))
    steps_in, held_in = row_in * result.ranks, memory_height_in(memories)
    keys = [*step_keys(result, drawn=drawn), *memory_keys(memories)]
    top_in, between_in = 0.36, 0.28
    below_in = 0.5 + legend_height_in(keys, drawn=drawn)  # the axis of time, and the legend
    height_in = top_in + steps_in + between_in + held_in + below_in
    figure = Figure(figsize=(width_in, height_in), dpi=_DPI if drawn else _PAINTED_DPI)

    def panel(from_top_in: float, tall_in: float) -> Axes:
        left, wide = _LEFT_IN / width_in, (width_in - _LEFT_IN - _RIGHT_IN) / width_in
        bottom = 1 - (from_top_in + tall_in) / height_in
        return figure.add_axes((left, bottom, wide, tall_in / height_in))

    steps = panel(top_in, steps_in)
    held = panel(top_in + steps_in + between_in, held_in)
    if drawn:
        _draw_bars(steps, result, _EDGE if typical_pt >= _EDGED_PT else _FINE_EDGE)
        _draw_numbers(steps, result, scale, row_in * 72 * ROW)
    else:
        _draw_painted(steps, result, widths[len(widths) // 10])
    _style_steps(steps, result, row_in * 72)
    draw_memory(held, result, memories, memory_unit)
    draw_legend(figure, result, keys, drawn=drawn)
    return figure


def _width_in(widths: Sequence[float], makespan: float) -> float:
    """As wide as a page, or wider where that gives most of the bars room for their numbers."""
    least, most = _WIDTHS_IN
    wanted = _NUMBERED_PT / 72 * makespan / widths[len(widths) // 10]
    return max(least, min(most, wanted + _LEFT_IN + _RIGHT_IN))


def _style_steps(axes: Axes, result: Result, row_pt: float) -> None:
    unit = f" {result.costs.unit}" if result.costs.unit else ""
    stages = count(result.stages, "stage", "stages") if result.stages != result.ranks else ""
    named = f"{result.schedule}   {', '.join(filter(None, (sizes(result), stages)))}"
    found = f"makespan {result.makespan:.6g}{unit},  bubble {result.bubble_rate:.1%}"
    axes.set_title(named, loc="left", fontsize=10, color=INK["ink"], parse_math=False)
    axes.set_title(found, loc="right", fontsize=10, color=INK["ink"], parse_math=False)
    axes.axvline(result.makespan, color=INK["ink"], linewidth=0.8, clip_on=False)
    axes.set_xlim(0, result.makespan)
    axes.set_ylim(result.ranks - 0.5, -0.5)
    every = next(n for n in (1, 2, 4, 8, 16, 32, result.ranks) if n * row_pt >= 9)
    shown = range(0, result.ranks, every)
    axes.set_yticks(shown, [f"rank {rank}" for rank in shown], fontsize=8)
    style_axes(axes, grid="x")
    axes.tick_params(labelbottom=False, length=0)


def _draw_bars(axes: Axes, result: Result, edge: float) -> None:
    """Bars of one look are one path: a tenth of the file and of the time of a path each."""
    shades = Shades(result.plan.placement)
    looks: dict[tuple[str, float], list[tuple[float, float, float, float]]] = {}

    def add(kind: str, white: float, start: float, end: float, top: float, tall: float) -> None:
        looks.setdefault((kind, white), []).append((start, end, top, top + tall))

    for rank, row in enumerate(result.spans):
        for step, start, end in row:
            for action, top, height in boxes(step):
                white = shades.white(shades.of(action))
                add(action.op.value, white, start, end, rank + top, height)
        for part in result.finish[rank]:
            add(part.kind, 0.0, part.start, part.end, rank - ROW / 2, ROW)
    for (kind, white), bars in sorted(looks.items()):
        corners = [
            corner
            for left, right, top, bottom in bars
            for corner in ((left, top), (right, top), (right, bottom), (left, bottom), (left, top))
        ]
        codes = [Path.MOVETO, *[Path.LINETO] * 3, Path.CLOSEPOLY] * len(bars)
        style = bar_style(kind, white) | {"linewidth": edge}
        axes.add_patch(PathPatch(Path(corners, codes), snap=True, **style))


class _Numbers(NamedTuple):
    """How the bars of a class have their numbers: all alike, or none."""

    size: float  # of the font, in points
    upright: bool  # turned by 90 degrees
    least_pt: float  # how wide a bar must be


def _numbers(result: Result, scale: float, bar_pt: float) -> dict[str, _Numbers]:
    """By class (a pair, or an operation), from the widest number and a narrow bar of each."""
    classes: dict[str, list[float]] = {}
    for row in result.spans:
        for step, start, end in row:
            if end > start:
                classes.setdefault(_class(step), []).append(end - start)
    largest, smallest = _SIZES_PT
    widest = text_points(str(result.microbatches - 1), 10, bold=True) / 10
    found: dict[str, _Numbers] = {}
    for name, widths in classes.items():
        narrow = sorted(widths)[len(widths) // 10] * scale - 0.6
        tall = (bar_pt / 2 if name == "pair" else bar_pt) - 0.6
        lying, upright = min(narrow / widest, tall, largest), min(narrow, tall / widest, largest)
        if lying >= smallest:
            found[name] = _Numbers(lying, upright=False, least_pt=lying * widest)
        elif upright >= smallest:
            found[name] = _Numbers(upright, upright=True, least_pt=upright)
    return found


def _class(step: Action | Pair) -> str:
    return "pair" if isinstance(step, Pair) else step.op.value


def _draw_numbers(axes: Axes, result: Result, scale: float, bar_pt: float) -> None:
    shades = Shades(result.plan.placement)
    numbers = _numbers(result, scale, bar_pt)
    for rank, row in enumerate(result.spans):
        for step, start, end in row:
            how = numbers.get(_class(step))
            if how is None or (end - start) * scale < how.least_pt:
                continue
            for action, top, height in boxes(step):
                axes.text(
                    (start + end) / 2,
                    rank + top + height / 2,
                    str(action.microbatch),
                    ha="center",
                    va="center" if how.upright else "center_baseline",
                    rotation=90 if how.upright else 0,
                    fontsize=how.size,
                    fontweight="bold" if len(shades) > 1 and not shades.of(action) else "normal",
                    color=ON_BAR,
                )


def _draw_painted(axes: Axes, result: Result, narrow: float) -> None:
    wanted = round(result.makespan / (_STEPS_A_COLUMN * narrow))
    axes.imshow(
        paint(result, max(_COLUMNS[0], min(_COLUMNS[1], wanted))),
        extent=(0, result.makespan, result.ranks - 0.5, -0.5),
        aspect="auto",
        interpolation="nearest",  # others mix colours
        zorder=2,
    )
