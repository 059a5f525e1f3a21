"""What each rank holds over time, below the steps of `plot`. Importing this needs matplotlib."""

# matplotlib leaves its keyword arguments without types.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false
# pyright: reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ..events import Result
from ..memory import RankMemory
from .figures import style_axes
from .look import LIGHT as INK
from .look import ON_BAR, paler

_MOST_STRIPS = 8  # ranks whose memory is shown one by one
_STATIC = ("weights", "gradients", "optimizer")
_NAMES = {"optimizer": "optimizer state"}
_BAND = paler(INK["activations"], 0.5)


def memory_height_in(memories: Sequence[RankMemory]) -> float:
    """How high the panel should be."""
    return 0.3 * len(memories) if len(memories) <= _MOST_STRIPS else 1.5


def draw_memory(
    axes: Axes, result: Result, memories: Sequence[RankMemory], memory_unit: str
) -> None:
    """A strip a rank, or of many ranks the two extremes and a band between them."""
    draw = _draw_strips if len(memories) <= _MOST_STRIPS else _draw_band
    draw(axes, memories, result.makespan)
    _style(axes, result, memory_unit)


def memory_keys(memories: Sequence[RankMemory]) -> list[Patch | Line2D]:
    """The legend of the panel."""
    held = [part for part in _STATIC if any(getattr(memory, part) for memory in memories)]
    keys: list[Patch | Line2D] = [
        Patch(facecolor=INK[part], lw=0, label=_NAMES.get(part, part)) for part in held
    ]
    if len(memories) <= _MOST_STRIPS:
        return [*keys, Patch(facecolor=INK["activations"], lw=0, label="activations")]
    keys.append(Patch(facecolor=_BAND, lw=0, label="memory of all ranks"))
    for _, dashes, text in _marked(memories):
        keys.append(Line2D([], [], color=INK["ink"], lw=0.8, ls=dashes, label=text))
    return keys


def _style(axes: Axes, result: Result, memory_unit: str) -> None:
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
