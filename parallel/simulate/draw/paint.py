"""The steps of every rank as one bitmap, for pictures with more steps than can be drawn.

A column stacks the shares that the kinds of steps have of its time. A mix of their colours would
be the colour of none of them, and one colour a column shows the beat of columns against steps.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...schedule import Pair
from ..events import Result
from .look import LIGHT, STACK

ROWS_A_RANK = 24  # of pixels
GAP = 2  # above and below a rank's column
LEVELS = ROWS_A_RANK - 2 * GAP


def shares(result: Result, rank: int, columns: int) -> dict[str, list[float]]:
    """Per kind that occurs on a rank, its share of the time of each column, from 0 to 1.

    The time of a pair is half its forward's and half its backward's.

    Args:
        result: the simulated step.
        rank: of the pipeline.
        columns: equal parts of the time from 0 to the makespan.
    """
    found: dict[str, list[float]] = {}
    scale = columns / result.makespan

    def add(kind: str, start: float, end: float, weight: float) -> None:
        into = found.setdefault(kind, [0.0] * columns)
        start, end = start * scale, min(end * scale, columns)
        first, last = int(start), int(end)
        if first == last:
            if first < columns:
                into[first] += weight * (end - start)
            return
        into[first] += weight * (first + 1 - start)
        for column in range(first + 1, last):
            into[column] += weight
        if last < columns:
            into[last] += weight * (end - last)

    for step, start, end in result.spans[rank]:
        if isinstance(step, Pair):
            add(step.forward.op.value, start, end, 0.5)
            add(step.backward.op.value, start, end, 0.5)
        else:
            add(step.op.value, start, end, 1.0)
    for part in result.finish[rank]:
        add(part.kind, part.start, part.end, 1.0)
    return found


def paint(result: Result, columns: int) -> memoryview:
    """The bitmap: ROWS_A_RANK rows of pixels a rank, `columns` of them from 0 to the makespan.

    In LEVELS of the rows a column has F hanging from above and the kinds of STACK standing below,
    and between them as much is left empty as the rank is idle.

    Returns:
        Bytes of shape (rows, columns, 4): red, green, blue and opacity.
    """
    pixels = bytearray(4 * columns * ROWS_A_RANK * result.ranks)
    colours = {kind: bytes.fromhex(LIGHT[kind][1:]) + b"\xff" for kind in ("F", *STACK)}
    for rank in range(result.ranks):
        found = shares(result, rank, columns)
        for column in range(columns):
            row = ROWS_A_RANK * rank + GAP
            for kind, top, bottom in stacked({kind: of[column] for kind, of in found.items()}):
                for level in range(top, bottom):
                    at = 4 * ((row + level) * columns + column)
                    pixels[at : at + 4] = colours[kind]
    return memoryview(bytes(pixels)).cast("B", (ROWS_A_RANK * result.ranks, columns, 4))


def stacked(of: Mapping[str, float]) -> list[tuple[str, int, int]]:
    """Kinds with the first level from above that they have in a column, and the first after.

    Args:
        of: share of each kind in the column's time, together 1 at most.
    """
    found: list[tuple[str, int, int]] = []
    sum_of, below = 0.0, 0
    for kind in STACK:
        sum_of += of.get(kind, 0.0)
        upto = round(LEVELS * sum_of)
        if upto > below:
            found.append((kind, LEVELS - upto, LEVELS - below))
        below = upto
    forward = round(LEVELS * (sum_of + of.get("F", 0.0))) - below
    return [*found, ("F", 0, forward)] if forward else found
