"""Pictures of simulated steps as files: SVG and PNG for a page, HTML to look around in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..events import Result
from ..memory import RankMemory
from .page import page

SUFFIXES = (".svg", ".png", ".html")


def save_picture(
    result: Result, memories: Sequence[RankMemory], path: Path, *, memory_unit: str = "chunks"
) -> None:
    """Save a picture of a simulated step, in the form that the suffix of `path` names.

    Args:
        result: the simulated step.
        memories: what each rank holds, of the same result.
        path: ends in .svg, .png or .html; a file there is overwritten.
        memory_unit: `Memory.unit` of what the memories were made from.

    Raises:
        ValueError: the suffix is another one, or matplotlib, which SVG and PNG need, is missing.
        OSError: the file cannot be written.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(
            f"{path}: a picture is saved as {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, "
            f"not as {suffix or 'a file without a suffix'}"
        )
    if suffix == ".html":
        path.write_text(page(result, memories, memory_unit=memory_unit), encoding="utf-8")
        return
    try:
        from . import figures, plot
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "matplotlib":
            raise
        raise ValueError(
            f"{path}: pictures need matplotlib: pip install 'counterflow[plots]' "
            "(.html can be had without)"
        ) from None
    figure = plot.draw(result, memories, memory_unit=memory_unit)
    if suffix == ".svg":
        path.write_text(figures.on_white(figures.to_svg(figure)), encoding="utf-8")
    else:
        figures.save_png(figure, path)
