"""A simulated step as a matplotlib figure. Importing this needs matplotlib (extra "plots").

Ranks are rows and time runs to the right; below it the memory. Bars that are wide enough are drawn,
with hatches and micro-batch numbers; where there are too many of them, they are painted as one
bitmap, in which every column has the colours of what runs then, in their shares.
Figures are made through matplotlib's objects, not pyplot, so nothing global is touched.
"""

# matplotlib leaves its keyword arguments without types.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.legend_handler import HandlerBase
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Transform

from ...schedule import Op, Pair, actions
from ..events import Result
from ..memory import RankMemory
from .figures import style_axes, text_points
from .look import (
    FINISH_MEANINGS,
    MEANINGS,
    ON_BAR,
    ROW,
    Shades,
    bar_style,
    boxes,
    paler,
)
from .look import LIGHT as INK
from .paint import paint

_WIDTHS_IN = (10.0, 16.0)  # wider than the first only for the sake of numbers in narrow bars
_LEFT_IN, _RIGHT_IN = 0.72, 0.68
_MOST_DRAWN = 1500  # steps; more are painted
_NUMBERED_PT = 6.2  # what a bar should have for its number
_NARROWEST_PT = 5.0  # what half of the bars must have to be drawn
_DPI, _PAINTED_DPI = 200, 240
_COLUMNS = 4096  # of what is painted
_MOST_STRIPS = 8  # ranks whose memory is shown one by one
_STATIC = ("weights", "gradients", "optimizer")
_BAND = paler(INK["activations"], 0.5)
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
    drawn = len(widths) <= _MOST_DRAWN and widths[len(widths) // 2] * scale >= _NARROWEST_PT
    width_in = width_in if drawn else _WIDTHS_IN[0]
    strips = len(memories) <= _MOST_STRIPS
    row_in = max(0.1, min(0.34, 7.0 / result.ranks))
    steps_in, held_in = row_in * result.ranks, 0.3 * len(memories) if strips else 1.5
    keys = _keys(result, memories)
    top_in, between_in = 0.36, 0.28
    below_in = 0.5 + 0.19 * -(-len(keys) // 4)  # the axis of time, and the legend in four columns
    height_in = top_in + steps_in + between_in + held_in + below_in
    figure = Figure(figsize=(width_in, height_in), dpi=_DPI if drawn else _PAINTED_DPI)

    def panel(from_top_in: float, tall_in: float) -> Axes:
        left, wide = _LEFT_IN / width_in, (width_in - _LEFT_IN - _RIGHT_IN) / width_in
        bottom = 1 - (from_top_in + tall_in) / height_in
        return figure.add_axes((left, bottom, wide, tall_in / height_in))

    steps = panel(top_in, steps_in)
    held = panel(top_in + steps_in + between_in, held_in)
    if drawn:
        _draw_bars(steps, result, scale, row_in * 72, _number_size(widths, scale, result))
    else:
        _draw_painted(steps, result)
    _style_steps(steps, result, row_in * 72)
    (_draw_strips if strips else _draw_band)(held, memories, result.makespan)
    _style_memory(held, result, memory_unit)
    figure.legend(
        handles=keys,
        loc="lower center",
        ncols=4,
        frameon=False,
        fontsize=8,
        labelcolor=INK["ink"],
        handlelength=2.2,
        handleheight=1.1,
        borderaxespad=0.2,
        handler_map={_PairKey: _PairHandler()},
    )
    return figure


def _width_in(widths: Sequence[float], makespan: float) -> float:
    """As wide as a page, or wider where that gives most of the bars room for their numbers."""
    least, most = _WIDTHS_IN
    wanted = _NUMBERED_PT / 72 * makespan / widths[len(widths) // 10]
    return max(least, min(most, wanted + _LEFT_IN + _RIGHT_IN))


def _number_size(widths: Sequence[float], scale: float, result: Result) -> float:
    """The font size at which the widest number fits into most of the bars, if one does."""
    largest, smallest = _SIZES_PT
    widest = text_points(str(result.microbatches - 1), 10, bold=True) / 10
    fits = (widths[len(widths) // 10] * scale - 0.6) / widest
    return max(smallest, min(largest, fits))


def _style_steps(axes: Axes, result: Result, row_pt: float) -> None:
    unit = f" {result.costs.unit}" if result.costs.unit else ""
    stages = f", {result.stages} stages" if result.stages != result.ranks else ""
    sizes = f"{result.ranks} ranks × {result.microbatches} micro-batches{stages}"
    found = f"makespan {result.makespan:.6g}{unit},  bubble {result.bubble_rate:.1%}"
    named = f"{result.schedule}   {sizes}"
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


def _style_memory(axes: Axes, result: Result, memory_unit: str) -> None:
    axes.set_title(
        f"memory ({memory_unit})" if memory_unit else "memory",
        loc="left",
        pad=3,
        fontsize=8,
        color=INK["ink"],
        parse_math=False,
    )
    unit = f" ({result.costs.unit})" if result.costs.unit else ""
    axes.set_xlabel(f"time{unit}", labelpad=2, parse_math=False, fontsize=8)
    axes.set_xlim(0, result.makespan)
    style_axes(axes, grid="x")
    axes.tick_params(labelsize=8)


def _draw_bars(axes: Axes, result: Result, scale: float, row_pt: float, size: float) -> None:
    shades = Shades(result.plan.placement)
    for rank, row in enumerate(result.spans):
        for step, start, end in row:
            for action, top, height in boxes(step):
                shade = shades.of(action)
                style = bar_style(action.op, shades.white(shade))
                axes.add_patch(Rectangle((start, rank + top), end - start, height, **style))
                text = str(action.microbatch)
                bold = shade == 0 and len(shades) > 1
                long, room = text_points(text, size, bold=bold), (end - start) * scale
                lies = long <= room
                if not lies and not (size <= room and long <= height * row_pt):
                    continue
                axes.text(
                    (start + end) / 2,
                    rank + top + height / 2,
                    text,
                    ha="center",
                    va="center_baseline" if lies else "center",
                    rotation=0 if lies else 90,
                    fontsize=size,
                    fontweight="bold" if bold else "normal",
                    color=ON_BAR,
                )
        for part in result.finish[rank]:
            corner = (part.start, rank - ROW / 2)
            axes.add_patch(Rectangle(corner, part.end - part.start, ROW, **bar_style(part.kind)))


def _draw_painted(axes: Axes, result: Result) -> None:
    axes.imshow(
        paint(result, Shades(result.plan.placement), _COLUMNS),
        extent=(0, result.makespan, result.ranks - 0.5, -0.5),
        aspect="auto",
        interpolation="hanning",  # averages neighbours, where others leave stripes
        zorder=2,
    )


def _draw_strips(axes: Axes, memories: Sequence[RankMemory], makespan: float) -> None:
    """One strip a rank, all of one scale: what is always there, and the activations on it."""
    highest = max(memory.peak for memory in memories) or 1.0
    scale = 0.86 / highest
    for rank, memory in enumerate(memories):
        floor = len(memories) - 1 - rank
        level = float(floor)
        for part in _STATIC:
            height = getattr(memory, part) * scale
            axes.fill_between((0, makespan), level, level + height, color=INK[part], lw=0)
            level += height
        times, levels = _steps_of(memory, makespan)
        axes.fill_between(
            times,
            level,
            [level + held * scale for held in levels],
            step="post",
            facecolor=INK["activations"],
            edgecolor=ON_BAR,
            linewidth=0.4,
        )
        axes.axhline(floor, color=INK["faint"], linewidth=0.5)
        axes.text(
            1.006,
            floor + 0.42,
            f"peak {memory.peak:.4g}",
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=8,
            color=INK["ink"],
        )
    axes.set_ylim(0, len(memories))
    ticks = [floor + 0.42 for floor in range(len(memories))]
    axes.set_yticks(ticks, [f"rank {r}" for r in reversed(range(len(memories)))], fontsize=8)


def _draw_band(axes: Axes, memories: Sequence[RankMemory], makespan: float) -> None:
    """The ranks with the highest and the lowest peak, and all others between the two extremes."""
    highest = _marked(memories)[0][0]
    columns = 1024
    most, least = _extremes(memories, makespan, columns)
    edges = [makespan * column / columns for column in range(columns + 1)]
    axes.fill_between(
        edges,
        [*least, least[-1]],
        [*most, most[-1]],
        step="post",
        color=_BAND,
        lw=0,
    )
    level = 0.0
    for part in _STATIC:
        height = getattr(memories[highest], part)
        if height:
            axes.axhspan(level, level + height, color=INK[part], lw=0)
        level += height
    for rank, dashes, _ in _marked(memories):
        times, levels = _steps_of(memories[rank], makespan)
        total = [memories[rank].static + held for held in levels]
        axes.step(times, total, where="post", color=INK["ink"], linewidth=0.8, linestyle=dashes)
    axes.set_ylim(0, (memories[highest].peak or 1.0) * 1.08)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(axis="y", labelsize=8)


def _marked(memories: Sequence[RankMemory]) -> list[tuple[int, str, str]]:
    """The first ranks with the highest and the lowest peak, their line and what it is called."""
    ranks = range(len(memories))
    high = max(ranks, key=lambda rank: memories[rank].peak)
    low = min(ranks, key=lambda rank: memories[rank].peak)
    peaks = [f"{memories[rank].peak:.4g}" for rank in (high, low)]
    if memories[high].peak == memories[low].peak:
        return [(high, "-", f"rank {high}; the peak of all is {peaks[0]}")]
    return [
        (high, "-", f"rank {high}, highest peak: {peaks[0]}"),
        (low, "--", f"rank {low}, lowest peak: {peaks[1]}"),
    ]


def _steps_of(memory: RankMemory, makespan: float) -> tuple[list[float], list[float]]:
    times, levels = zip(*memory.curve, strict=True)
    return [*times, makespan], [*levels, levels[-1]]


def _extremes(
    memories: Sequence[RankMemory], makespan: float, columns: int
) -> tuple[list[float], list[float]]:
    """The most and the least that any rank holds, in each of `columns` equal parts of the time."""
    most, least = [0.0] * columns, [float("inf")] * columns
    for memory in memories:
        times, levels = _steps_of(memory, makespan)
        for index, level in enumerate(levels[:-1]):
            first = min(columns - 1, int(times[index] / makespan * columns))
            last = min(columns - 1, int(times[index + 1] / makespan * columns))
            total = memory.static + level
            for column in range(first, last + 1):
                most[column] = max(most[column], total)
                least[column] = min(least[column], total)
    return most, least


def _keys(result: Result, memories: Sequence[RankMemory]) -> list[Patch | Line2D]:
    """The legend: what occurs, and nothing else."""
    steps = [step for row in result.plan.rows for step in row]
    ops = {step.op for step in steps if not isinstance(step, Pair)}
    pairs = {action.op for step in steps if isinstance(step, Pair) for action in actions(step)}
    kinds = {part.kind for row in result.finish for part in row}
    keys: list[Patch | Line2D] = [
        Patch(**bar_style(op), label=MEANINGS[op]) for op in Op if op in ops | pairs
    ]
    if pairs:
        keys.append(_PairKey(label="pair: F above, B below, at once"))
    shades = Shades(result.plan.placement)
    for number, name in enumerate(shades.names):
        if number < 3 or number == len(shades) - 1:
            colour = paler(INK["B" if Op.B in ops | pairs else "F"], shades.white(number))
            keys.append(Patch(facecolor=colour, edgecolor=ON_BAR, lw=0.5, label=name))
    keys += [
        Patch(**bar_style(kind), label=meaning)
        for kind, meaning in FINISH_MEANINGS.items()
        if kind in kinds
    ]
    held = [part for part in _STATIC if any(getattr(memory, part) for memory in memories)]
    names = {"optimizer": "optimizer state"}
    if held:
        keys += [Patch(facecolor=INK[p], lw=0, label=names.get(p, p)) for p in held]
    if len(memories) <= _MOST_STRIPS:
        keys.append(Patch(facecolor=INK["activations"], lw=0, label="activations"))
        return keys
    keys.append(Patch(facecolor=_BAND, lw=0, label="memory of all ranks"))
    keys += [
        Line2D([], [], color=INK["ink"], lw=0.8, ls=dashes, label=text)
        for _, dashes, text in _marked(memories)
    ]
    return keys


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
