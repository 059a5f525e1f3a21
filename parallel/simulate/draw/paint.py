"""The steps of every rank as one bitmap, for pictures with more bars than can be drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ...schedule import Pair
from ..events import Result
from .look import LIGHT, ON_BAR, Shades, paler

LANES_A_RANK = 10  # of pixels: a gap, the upper and the lower half of the bars, a gap
_GAP = 1
_HALF = (LANES_A_RANK - 2 * _GAP) // 2
_EDGE_FROM = 12.0  # columns that a bar must have for a line at its start


class _Paint(NamedTuple):
    """A stretch of one colour, in columns."""

    start: float
    end: float
    colour: bytes


def paint(result: Result, shades: Shades, columns: int) -> memoryview:
    """The bitmap: LANES_A_RANK rows of pixels a rank, `columns` of them from 0 to the makespan.

    A column has the colours of what runs in its time, each with its share of the time, and is as
    opaque as the rank is busy.

    Returns:
        Bytes of shape (rows, columns, 4): red, green, blue and opacity.
    """
    scale = columns / result.makespan
    rgb = {
        (kind, number): bytes.fromhex(paler(LIGHT[kind], shades.white(number))[1:])
        for kind in "FBIW"
        for number in range(len(shades))
    }
    rows: list[bytes] = []
    blank = bytes(4 * columns)
    for rank, row in enumerate(result.spans):
        upper: list[_Paint] = []
        lower: list[_Paint] = []
        for step, start, end in row:
            first, last = start * scale, end * scale
            members = (step.forward, step.backward) if isinstance(step, Pair) else (step, step)
            for lane, action in zip((upper, lower), members, strict=True):
                lane.append(_Paint(first, last, rgb[action.op.value, shades.of(action)]))
        for part in result.finish[rank]:
            stretch = _Paint(
                part.start * scale, part.end * scale, bytes.fromhex(LIGHT[part.kind][1:])
            )
            upper.append(stretch)
            lower.append(stretch)
        above = _line(upper, columns)
        below = above if upper == lower else _line(lower, columns)
        rows += [blank] * _GAP + [above] * _HALF + [below] * _HALF + [blank] * _GAP
    return memoryview(b"".join(rows)).cast("B", (len(rows), columns, 4))


def _line(stretches: Sequence[_Paint], columns: int) -> bytes:
    """One row of pixels."""
    line = bytearray(4 * columns)
    # Columns that a bar covers in part: red, green, blue and opacity, weighted by its share.
    mixed: dict[int, list[float]] = {}
    edge = bytes.fromhex(ON_BAR[1:]) + b"\xff"
    for start, end, colour in stretches:
        first, last = int(start), int(end)
        if first == last:
            _mix(mixed, first, end - start, colour)
            continue
        _mix(mixed, first, first + 1 - start, colour)
        _mix(mixed, last, end - last, colour)
        line[4 * (first + 1) : 4 * last] = (colour + b"\xff") * (last - first - 1)
        if end - start >= _EDGE_FROM:
            line[4 * (first + 1) : 4 * (first + 2)] = edge
    for column, (*channels, share) in mixed.items():
        if column < columns and share > 0:
            opaque = min(255, round(255 * share))
            line[4 * column : 4 * column + 4] = bytes(
                [*(min(255, round(channel / share)) for channel in channels), opaque]
            )
    return bytes(line)


def _mix(mixed: dict[int, list[float]], column: int, share: float, colour: bytes) -> None:
    if share <= 0:
        return
    at = mixed.setdefault(column, [0.0, 0.0, 0.0, 0.0])
    at[0] += share * colour[0]
    at[1] += share * colour[1]
    at[2] += share * colour[2]
    at[3] += share
