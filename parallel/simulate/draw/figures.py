"""What the matplotlib figures of the project share. Importing this needs matplotlib."""

# matplotlib leaves its keyword arguments without types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import io
from functools import cache
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextToPath

from ...schedule import Action
from .look import LIGHT as INK

_CLEAR_POINTS = 1.0  # between a label and each end of its bar


def label(action: Action, width_points: float, size: float) -> str:
    """The most telling text that fits in a bar: "0F3", or its micro-batch, or none.

    Args:
        action: what the bar shows.
        width_points: of the bar.
        size: of the font, in points.
    """
    for text in (str(action), str(action.microbatch)):
        if text_points(text, size) + 2 * _CLEAR_POINTS <= width_points:
            return text
    return ""


@cache
def text_points(text: str, size: float, *, bold: bool = False) -> float:
    """Width of a text as it is drawn: a W is nearly twice as wide as an F."""
    font = FontProperties(size=size, weight="bold" if bold else "normal")
    return TextToPath().get_text_width_height_descent(text, font, ismath=False)[0]


def style_axes(axes: Axes, grid: str = "y") -> None:
    """Thin axes in the colours of the page.

    Args:
        axes: what to change.
        grid: "x" or "y" for lines across that axis, anything else for none; "" hides the frame too.
    """
    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom") and bool(grid))
        spine.set_color(INK["faint"])
    axes.tick_params(colors=INK["ink"], length=3)
    axes.xaxis.label.set_color(INK["ink"])
    axes.yaxis.label.set_color(INK["ink"])
    if grid in ("x", "y"):
        axes.grid(axis=grid, color=INK["grid"], linewidth=0.7)
        axes.set_axisbelow(True)


def to_svg(figure: Figure) -> str:
    """The figure as an SVG document, transparent; the same figure gives the same bytes."""
    out = io.StringIO()
    # Text stays text: small, searchable, and readable to a screen reader. The salt fixes the ids.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "counterflow"}):
        figure.savefig(out, format="svg", facecolor="none", metadata={"Date": None}, dpi=figure.dpi)
    return out.getvalue()


def on_white(svg: str) -> str:
    """A document of `to_svg` that can be looked at alone: on white paper."""
    before, root = svg.split("<svg", 1)
    opening, body = root.split(">", 1)
    return f'{before}<svg{opening}><rect width="100%" height="100%" fill="#ffffff"/>{body}'


def save_png(figure: Figure, path: Path) -> None:
    """Write a bitmap, on white, of as many dots an inch as the figure has."""
    figure.savefig(path, facecolor="#ffffff", dpi=figure.dpi)
