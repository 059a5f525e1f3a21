"""The bytes of an exchange as heat maps. Importing this needs matplotlib (extra "plots")."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from ..comm.traffic import Matrix, across_nodes, node_matrix
from ..parallel.simulate.draw.figures import on_white, save_png, style_axes, to_svg
from .palette import LIGHT as INK
from .traffic_text import describe, size

if TYPE_CHECKING:
    from ..comm.dispatch.grid import NodeGrid
    from .traffic_command import Answer

_PANEL_IN = 3.9
_DPI = 150  # of bitmaps; a cell of 64 ranks then has 7 dots
_COLOURS = "YlGnBu"
_MOST_NUMBERS = 8  # nodes, up to which their cells have numbers in them
_MOST_BORDERS = 32  # nodes, up to which lines between them leave room for cells
_DARK = 0.6  # place on the scale of colours above which a cell needs pale text


def save_picture(answer: Answer, path: Path) -> None:
    """Write the picture in the form that the suffix names, .svg or .png."""
    figure = draw(answer)
    if path.suffix.lower() == ".svg":
        path.write_text(on_white(to_svg(figure)), encoding="utf-8")
    else:
        save_png(figure, path)


def draw(answer: Answer) -> Figure:
    """A column a backend: the bytes sent rank by rank above, node by node below.

    A row of panels has one logarithmic scale of colours, since much more passes inside nodes than
    across; cells without bytes are empty.
    """
    grid = answer.routes.grid
    ranks = {backend: answer.bytes_of(backend) for backend in answer.traffics}
    nodes = {backend: node_matrix(matrix, grid) for backend, matrix in ranks.items()}
    figure = Figure(
        figsize=(_PANEL_IN * len(ranks) + 1.0, 2 * _PANEL_IN + 0.9),
        dpi=_DPI,
        layout="constrained",
    )
    panels = figure.subplots(2, len(ranks), squeeze=False)
    for row, matrices in zip(panels, (ranks, nodes), strict=True):
        norm = _scale(list(matrices.values()))
        for axes, (backend, matrix) in zip(row, matrices.items(), strict=True):
            if matrices is ranks:
                _draw_ranks(axes, matrix, grid, norm)
                away = across_nodes(grid)
                across, inside = size(int(matrix[away].sum())), size(int(matrix[~away].sum()))
                title = f"{backend}: {across} across, {inside} inside nodes"
                axes.set_title(title, loc="left", fontsize=9, color=INK["ink"])
            else:
                _draw_nodes(axes, matrix, norm)
        ticks = LogLocator(subs=(1.0, 2.0, 5.0)) if isinstance(norm, LogNorm) else None
        bar = figure.colorbar(
            ScalarMappable(norm, _COLOURS), ax=list(row), aspect=30, pad=0.01, ticks=ticks
        )
        bar.ax.yaxis.set_major_formatter(lambda value, _: size(value))
        bar.ax.yaxis.set_minor_formatter(NullFormatter())
        bar.ax.tick_params(colors=INK["ink"], labelsize=8)
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    options = answer.options
    figure.suptitle(
        f"{options.phase}, {options.sizes.payload.name}: {describe(answer)}",
        fontsize=10,
        color=INK["ink"],
        parse_math=False,
    )
    return figure


def _scale(matrices: list[Matrix]) -> Normalize:
    """From the fewest bytes in a cell of any of them to the most, with some room below."""
    sent = np.concatenate([matrix[matrix > 0] for matrix in matrices])
    return LogNorm(sent.min() / 2, sent.max()) if sent.size else Normalize(0, 1)


def _draw_ranks(axes: Axes, matrix_RR: Matrix, grid: NodeGrid, norm: Normalize) -> None:
    """Ranks stand node by node, with a line between nodes."""
    order, step = list(grid.order), grid.ranks_per_node
    _cells(axes, matrix_RR[np.ix_(order, order)], norm)
    if 1 < grid.num_nodes <= _MOST_BORDERS:
        for edge in range(step, grid.num_ranks, step):
            axes.axhline(edge - 0.5, color=INK["faint"], linewidth=0.5)
            axes.axvline(edge - 0.5, color=INK["faint"], linewidth=0.5)
    # A label for each node's first rank, of at most about 16.
    places = range(0, grid.num_ranks, step * -(-grid.num_nodes // 16))
    labels = [str(order[place]) for place in places]
    axes.set_xticks(places, labels)
    axes.set_yticks(places, labels)
    axes.set_xlabel("to rank")
    axes.set_ylabel("from rank")


def _draw_nodes(axes: Axes, matrix_nn: Matrix, norm: Normalize) -> None:
    """On the diagonal stands what the ranks of a node send each other."""
    _cells(axes, matrix_nn, norm)
    nodes = len(matrix_nn)
    if nodes <= _MOST_NUMBERS:
        for y, x in np.argwhere(matrix_nn):
            value = matrix_nn[y, x].item()
            pale = norm(value) > _DARK
            number, unit = size(value).split()
            axes.text(
                x,
                y,
                f"{float(number):.3g}\n{unit}",
                ha="center",
                va="center",
                fontsize=6.5,
                color="#fdfdfd" if pale else "#15171a",
            )
    axes.set_xticks(range(0, nodes, -(-nodes // 16)))
    axes.set_yticks(range(0, nodes, -(-nodes // 16)))
    axes.set_xlabel("to node")
    axes.set_ylabel("from node")


def _cells(axes: Axes, matrix: Matrix, norm: Normalize) -> None:
    shown = np.where(matrix > 0, matrix.astype(np.float64), np.nan)
    axes.imshow(shown, cmap=_COLOURS, norm=norm, interpolation="none")
    style_axes(axes, grid="")
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_linewidth(0.6)
    axes.tick_params(labelsize=8)
