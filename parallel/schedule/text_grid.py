"""Schedules as text for terminals: steps go down the page, ranks across."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import chain

from .schedule import Schedule


def grid(schedule: Schedule) -> str:
    """The whole schedule as a table: one line a step of the rows, one column a rank.

    A line is a place in the rows, not a time: `simulate` tells when steps run.
    """
    rows = cells(schedule)
    return draw(rows, range(schedule.num_ranks), range(max(map(len, rows))))


def cells(schedule: Schedule) -> list[list[str]]:
    """The text of every step, row by row."""
    return [[str(step) for step in row] for row in schedule.rows]


def draw(
    rows: Sequence[Sequence[str]],
    ranks: Sequence[int],
    steps: Sequence[int],
    marks: Collection[tuple[int, int]] = (),
) -> str:
    """A window of the table, with an arrow at each marked cell.

    Args:
        rows: text of every step, one row a rank.
        ranks: columns to show.
        steps: lines to show; blank where a row is shorter.
        marks: (rank, step) of the cells that the arrows point at.
    """

    def cell(rank: int, step: int) -> str:
        text = rows[rank][step] if step < len(rows[rank]) else ""
        return f"-> {text}" if (rank, step) in marks else f"   {text}" if marks else text

    indent = "   " if marks else ""
    columns = [
        ["step", *(str(step) for step in steps)],
        *([f"{indent}rank {r}", *(cell(r, step) for step in steps)] for r in ranks),
    ]
    widths = [max(map(len, column)) for column in columns]
    lines: list[str] = []
    for step, *line in zip(*columns, strict=True):
        padded = (text.ljust(width) for text, width in zip(line, widths[1:], strict=True))
        lines.append("  ".join(chain([step.rjust(widths[0])], padded)).rstrip())
    return "\n".join(lines)
