"""The report's pictures, as matplotlib figures. Importing this needs matplotlib (extra "plots").

Figures are made through matplotlib's objects, not pyplot, so nothing global is touched. They are
drawn in the colours of the light page, which `inline` replaces by CSS variables, so that the
page can be dark; what must not change with it (cells of a heat map) uses other colours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from ..parallel.schedule import Action, Op, actions
from ..parallel.simulate.draw import figures
from ..parallel.simulate.draw.figures import on_white, save_png, style_axes, to_svg
from ..parallel.simulate.draw.look import HATCHES, MEANINGS, ON_BAR, bar_style, boxes
from .palette import LIGHT as INK
from .run_data import Bar, Bars, Load, RunData, Timeline, makespan_ms, series

__all__ = [
    "HATCHES",
    "inline",
    "load_figure",
    "loss_figure",
    "on_white",
    "save_png",
    "timeline_figure",
    "to_svg",
]

WIDTH_IN = 10.0
_DPI = 120  # of bitmaps
_LABEL_POINTS = 6.5
# Under the losses, each where the run has it, with its unit.
_BELOW = (
    ("tokens_per_second", "tokens / s"),
    ("mfu", "MFU"),
    ("exposed_comm_percent", "exposed\nwaits, %"),
    ("max_vio", "MaxVio"),
)


def loss_figure(run: RunData) -> Figure:
    """Losses over the steps with the unigram entropy; speed, exposed waits and balance below."""
    below = [(key, label) for key, label in _BELOW if series(run.train, key)[0]]
    height = 4.2 + 1.5 * len(below)
    figure = Figure(figsize=(WIDTH_IN, height), dpi=_DPI, layout="constrained")
    panels = figure.subplots(
        1 + len(below), 1, sharex=True, squeeze=False, height_ratios=[4.2] + [1.3] * len(below)
    )[:, 0]
    _draw_loss(panels[0], run)
    for axes, (key, label) in zip(panels[1:], below, strict=True):
        steps, values = series(run.train, key)
        axes.plot(steps, values, color=INK["first"], linewidth=1.2)
        axes.set_ylabel(label)
        finite = [value for value in values if math.isfinite(value)]
        axes.set_ylim(0, 1.1 * max(finite, default=0) or 1)
        style_axes(axes)
    figure.align_ylabels()
    panels[-1].set_xlabel("step")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _draw_loss(axes: Axes, run: RunData) -> None:
    steps, losses = series(run.train, "main_loss")
    if not steps:
        steps, losses = series(run.train, "loss")
    window = max(1, len(losses) // 50)
    if window > 1:
        axes.plot(steps, losses, color=INK["first"], linewidth=0.8, alpha=0.35)
    if steps:
        axes.plot(
            steps,
            _running_mean(losses, window),
            color=INK["first"],
            linewidth=1.8,
            label="training" if window == 1 else f"training, mean of {window} steps",
        )
    steps, losses = series(run.validation, "loss")
    if steps:
        axes.plot(
            steps,
            losses,
            color=INK["second"],
            linewidth=1.2,
            linestyle=":",
            marker="o",
            markersize=5,
            label="validation",
        )
    if run.unigram_entropy is not None:
        axes.axhline(run.unigram_entropy, color=INK["ink"], linewidth=1, linestyle="--")
        axes.annotate(
            f"unigram entropy {run.unigram_entropy:.3f}",
            (1, run.unigram_entropy),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 4),
            textcoords="offset points",
            ha="right",
            va="bottom",
            color=INK["ink"],
        )
    axes.set_ylabel("loss (nats per token)")
    axes.legend(frameon=False, labelcolor=INK["ink"], loc="upper right")
    style_axes(axes)


def timeline_figure(timeline: Timeline) -> Figure:
    """The measured step above the planned one, on one time axis, a row a rank."""
    panels: list[tuple[str, Bars]] = [("measured", timeline.measured)]
    if timeline.planned is not None:
        panels.append(("planned", timeline.planned))
    num_ranks = len(timeline.measured)
    # Wide enough for labels; the page scrolls it.
    width = min(40.0, max(WIDTH_IN, 0.3 * max(len(row) for row in timeline.measured)))
    figure = Figure(
        figsize=(width, 1.3 + len(panels) * (0.45 + 0.42 * num_ranks)),
        dpi=_DPI,
        layout="constrained",
    )
    column = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    limit = max(makespan_ms(bars) for _, bars in panels)
    for axes, (title, bars) in zip(column, panels, strict=True):
        origin = min(bar.start_ms for row in bars for bar in row)
        for rank, row in enumerate(bars):
            for bar in row:
                _draw_bar(axes, bar, rank, origin, points_per_ms=(width * 72 - 60) / limit)
        end = makespan_ms(bars)
        axes.axvline(end, color=INK["ink"], linewidth=1, linestyle="--")
        axes.set_title(f"{title}: {end:.4g} ms", loc="left", fontsize=10, color=INK["ink"])
        axes.set_xlim(0, limit * 1.005)
        axes.set_ylim(num_ranks - 0.5, -0.5)
        axes.set_yticks(range(num_ranks), [f"rank {r}" for r in range(num_ranks)])
        style_axes(axes, grid="x")
    column[-1].set_xlabel("ms")
    figure.legend(
        handles=_timeline_keys([bar for _, bars in panels for row in bars for bar in row]),
        loc="outside lower center",
        ncols=6,
        frameon=False,
        labelcolor=INK["ink"],
    )
    return figure


def _draw_bar(axes: Axes, bar: Bar, rank: int, origin: float, points_per_ms: float) -> None:
    """A pair is two lanes, its forward above its backward. Waits are drawn first, as an outline."""
    start = bar.start_ms - origin
    if bar.waited_ms > 0:
        axes.add_patch(
            Rectangle(
                (start, rank - 0.1), bar.waited_ms, 0.2, fill=False, edgecolor=INK["faint"], lw=0.6
            )
        )
        start += bar.waited_ms
    for action, top, height in boxes(bar.step):
        corner = (start, rank + top)
        axes.add_patch(Rectangle(corner, bar.busy_ms, height, **bar_style(action.op)))
        text = _label(action, bar.busy_ms * points_per_ms)
        if text:
            axes.text(
                start + bar.busy_ms / 2,
                rank + top + height / 2,
                text,
                ha="center",
                va="center",
                fontsize=_LABEL_POINTS,
                color=ON_BAR,
            )


def _label(action: Action, width_points: float) -> str:
    return figures.label(action, width_points, _LABEL_POINTS)


def _timeline_keys(bars: Sequence[Bar]) -> list[Patch]:
    ops = {action.op for bar in bars for action in actions(bar.step)}
    keys = [Patch(**bar_style(op), label=MEANINGS[op]) for op in Op if op in ops]
    if any(bar.waited_ms > 0 for bar in bars):
        keys.append(Patch(fill=False, edgecolor=INK["faint"], label="waiting for a message"))
    return keys


def load_figure(loads: Sequence[Load]) -> Figure:
    """Load of each expert over the mean of its layer, a row a layer, with its MaxVio."""
    columns = max(len(load.tokens) for load in loads)
    cells = [[*load.relative, *[math.nan] * (columns - len(load.tokens))] for load in loads]
    highest = max((c for row in cells for c in row if not math.isnan(c)), default=1.0)
    figure = Figure(figsize=(WIDTH_IN, 1.4 + 0.42 * len(loads)), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(
        cells, aspect="auto", cmap="PuOr_r", norm=TwoSlopeNorm(1.0, 0.0, max(2.0, highest))
    )
    if columns <= 24:
        for y, row in enumerate(cells):
            for x, cell in enumerate(row):
                if not math.isnan(cell):
                    pale = 0.4 < cell < 1 + 0.7 * (max(2.0, highest) - 1)
                    colour = "#15171a" if pale else "#fdfdfd"
                    axes.text(
                        x, y, f"{cell:.2f}", ha="center", va="center", fontsize=7, color=colour
                    )
    for y, load in enumerate(loads):
        axes.text(
            1.01,
            y,
            f"{load.max_vio:.2f}",
            transform=axes.get_yaxis_transform(),
            va="center",
            color=INK["ink"],
        )
    axes.text(1.01, 1.02, "MaxVio", transform=axes.transAxes, va="bottom", color=INK["ink"])
    axes.set_yticks(range(len(loads)), [f"layer {load.layer}" for load in loads], parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=min(columns, 16)))
    axes.set_xlabel("expert")
    style_axes(axes, grid="")
    bar = figure.colorbar(image, ax=axes, pad=0.09, fraction=0.04, aspect=12)
    bar.set_label("load / mean", color=INK["ink"])
    bar.ax.tick_params(colors=INK["ink"])
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    return figure


def inline(svg: str, name: str) -> str:
    """A document of `to_svg` as an <svg> element for an HTML page, which gives it its colours.

    As wide as its place, but not so narrow that it cannot be read: then it scrolls.

    Args:
        svg: the document.
        name: goes before every id, so that several pictures fit on one page.
    """
    opening, body = svg[svg.index("<svg") :].split(">", 1)
    width = re.search(r' width="([0-9.]+)pt"', opening)
    assert width is not None  # matplotlib gives every figure its width
    opening = re.sub(r' (?:width|height)="[^"]*"', "", opening)
    opening += f' style="min-width: {0.93 * float(width[1]):.0f}px"'
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'(href="|url\()#', rf"\1#{name}-", body)
    for variable, colour in INK.items():
        body = body.replace(colour, f"var(--{variable})")
    return f"{opening}>{body}"


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of up to `window` values around each; near the ends of fewer."""
    around = [values[max(0, i - window // 2) : i + (window + 1) // 2] for i in range(len(values))]
    return [sum(part) / len(part) for part in around]
