"""A simulated step drawn with letters: time from left to right, for terminals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple, TypeAlias

from ...schedule import Action, Pair, Placement
from ..events import Result

IDLE = "idle"
MIXED = "mixed"
PLAIN = "plain"

# Letters of what follows the rows.
_FINISH = {"reduce": "R", "mirror": "M", "optimizer": "O"}
# Letters of columns that hold many steps, where they are not those of the kind itself.
_SKETCHED = {"pair": "P", **_FINISH, IDLE: ".", MIXED: "*"}
# More ranks than that are drawn from both ends, with the middle left out.
_MOST_RANKS = 64
_ENDS = 16
# How far from a whole number of columns a time may be and count as one: rounding errors only.
_ROUNDING = 1e-6


class Piece(NamedTuple):
    """Letters that belong to one kind of thing.

    Attributes:
        text: one letter a column.
        kind: "F", "B", "I", "W" and what follows the rows ("reduce", "mirror", "optimizer"),
            IDLE, MIXED, or PLAIN for what is written around them. Lower case where the letters are.
    """

    text: str
    kind: str


Line: TypeAlias = tuple[Piece, ...]


@dataclass(frozen=True)
class Timeline:
    """A drawn step.

    Attributes:
        lines: from top to bottom, the axis of time last.
        legend: what the letters mean, one line of text.
    """

    lines: tuple[Line, ...]
    legend: str

    def plain(self) -> str:
        """The lines without colours."""
        texts = ("".join(piece.text for piece in line).rstrip() for line in self.lines)
        return "\n".join(texts)


def timeline(result: Result, width: int) -> Timeline:
    """Draw a result, a line a rank, or two where it has pairs: the backward under the forward.

    A step is its letter, its micro-batch where there is room, and dashes up to its end. Small
    letters are the other stages of a rank or, in bidirectional schedules, micro-batches from the
    other end. Where most steps are shorter than a column, a column shows what took more than half
    of its time, or "*" where nothing did, and pairs are "P".

    Args:
        result: of a simulation.
        width: columns that a line may take; less than 20 counts as 20.
    """
    ranks = _shown(result.ranks)
    head = len(f"rank {result.ranks - 1} ")
    canvas = _Canvas(result, max(20, width) - head)
    draw = canvas.sketch if canvas.dense else canvas.draw
    lines: list[Line] = []
    for rank, after in zip(ranks, (*ranks[1:], result.ranks), strict=True):
        for index, row in enumerate(draw(rank)):
            label = f"rank {rank}" if index == 0 else ""
            lines.append((Piece(label.ljust(head), PLAIN), *row))
        if after > rank + 1:
            lines.append((Piece(f"... {after - rank - 1} more ranks", PLAIN),))
    lines.append((Piece(canvas.axis(head), PLAIN),))
    return Timeline(tuple(lines), canvas.legend())


def _shown(ranks: int) -> tuple[int, ...]:
    if ranks <= _MOST_RANKS:
        return tuple(range(ranks))
    return (*range(_ENDS), *range(ranks - _ENDS, ranks))


class _Canvas:
    """Times as columns."""

    def __init__(self, result: Result, columns: int) -> None:
        self.result = result
        self.scale = _scale(result, columns)
        self.columns = max(1, round(result.makespan * self.scale))
        self.pairs = any(counts["pair"] for counts in result.op_counts)
        steps = sorted(result.times.of(step) for row in result.plan.rows for step in row)
        self.dense = steps[len(steps) // 2] * self.scale < 1

    def draw(self, rank: int) -> list[Line]:
        """Every step of a rank with its letter."""
        upper = [("." if t < self.columns else " ", IDLE) for t in range(self.columns)]
        lower = [(" ", PLAIN)] * self.columns
        for step, start, end in self.result.spans[rank]:
            if isinstance(step, Pair):
                self._paint(upper, self._letters(step.forward, rank), start, end)
                self._paint(lower, self._letters(step.backward, rank), start, end)
            else:
                self._paint(upper, self._letters(step, rank), start, end)
        for kind, stage, start, end in self.result.finish[rank]:
            self._paint(upper, (_FINISH[kind], str(stage), kind), start, end)
        return [_line(upper), _line(lower)] if self.pairs else [_line(upper)]

    def sketch(self, rank: int) -> list[Line]:
        """Per column, the letter of what takes more than half of its time."""
        shares: list[dict[str, float]] = [{} for _ in range(self.columns)]
        for step, start, end in self._everything(rank):
            column = min(int(start * self.scale), self.columns - 1)
            while start < end:
                last = column == self.columns - 1
                until = end if last else min(end, (column + 1) / self.scale)
                share = shares[column]
                share[step] = share.get(step, 0.0) + max(0.0, until - start)
                start = until
                column = min(column + 1, self.columns - 1)
        cells: list[tuple[str, str]] = []
        for share in shares:
            share[IDLE] = 1 / self.scale - sum(share.values())
            most = max(share, key=lambda kind: share[kind])
            if share[most] * self.scale <= 0.5 + _ROUNDING:
                most = MIXED
            cells.append((_SKETCHED.get(most, most), most))
        return [_line(cells)]

    def _everything(self, rank: int) -> Iterable[tuple[str, float, float]]:
        for step, start, end in self.result.spans[rank]:
            yield "pair" if isinstance(step, Pair) else step.op.value, start, end
        for kind, _, start, end in self.result.finish[rank]:
            yield kind, start, end

    def _letters(self, action: Action, rank: int) -> tuple[str, str, str]:
        small = _is_second(self.result.plan.placement, action, rank)
        letter = action.op.value.lower() if small else action.op.value
        return letter, str(action.microbatch), letter

    def _paint(
        self,
        cells: list[tuple[str, str]],
        letters: tuple[str, str, str],
        start: float,
        end: float,
    ) -> None:
        letter, number, kind = letters
        begin, after = self._column(start), self._column(end)
        width = after - begin
        # By the time and not the columns, so that equal steps look the same.
        room = math.floor((end - start) * self.scale + _ROUNDING)
        text = letter + number if len(number) < room else letter
        cells[begin:after] = [(char, kind) for char in text.ljust(width, "-")[:width]]

    def _column(self, time: float) -> int:
        """Not by `round`, which takes 0.5 and 1.5 apart by two: equal steps are equally wide."""
        return math.floor(time * self.scale + 0.5 + _ROUNDING)

    def axis(self, head: int) -> str:
        """Round times under the columns where they are."""
        every = _round_up(12 / self.scale)
        line = "time".ljust(head)
        for count in range(int(self.columns / (every * self.scale)) + 1):
            mark = f"{count * every:g}" if count else f"0 {self.result.costs.unit}".rstrip()
            column = head + round(count * every * self.scale)
            if len(line) <= column <= head + self.columns - len(mark):
                line = line.ljust(column) + mark
        return line

    def legend(self) -> str:
        kinds = {op for counts in self.result.op_counts for op, number in counts.items() if number}
        meaning = {
            "F": "F forward",
            "B": "B full backward",
            "I": "I its input half",
            "W": "W its weight half",
            "pair": "P pair" if self.dense else "F over B pair",
        }
        parts = [text for kind, text in meaning.items() if kind in kinds]
        after = {part.kind for row in self.result.finish for part in row}
        parts += [f"{letter} {kind}" for kind, letter in _FINISH.items() if kind in after]
        parts.append(". idle")
        if self.dense:
            per = 1 / self.scale
            parts.append(f"a column is {per:.3g} {self.result.costs.unit}".rstrip())
            return ", ".join(parts) + ": what takes more than half of it, * where nothing does"
        placement = self.result.plan.placement
        if len(placement.routes) > 1:
            parts.append("small letters: entered at the other end")
        elif any(len(placement.stages(rank)) > 1 for rank in range(self.result.ranks)):
            parts.append("small letters: a later stage of the rank")
        return ", ".join(parts)


def _is_second(placement: Placement, action: Action, rank: int) -> bool:
    if len(placement.routes) > 1:
        return placement.route_of[action.microbatch] > 0
    return action.stage != placement.stages(rank)[0]


def _scale(result: Result, columns: int) -> float:
    """Columns in a unit of time.

    As many as there is room for; where all times are multiples of the shortest, a whole number of
    columns for that one, so that equal steps are equally wide.
    """
    makespan = result.makespan
    widest = columns / makespan
    times = {result.times.of(step) for row in result.plan.rows for step in row}
    shortest = min((time for time in times if time > 0), default=makespan)
    whole = math.floor(widest * shortest * (1 + _ROUNDING))
    if not whole:  # and then some times may be more multiples of it than a number can hold
        return widest
    even = all(abs(time / shortest - round(time / shortest)) < _ROUNDING for time in times)
    return whole / shortest if even else widest


def _round_up(time: float) -> float:
    """The next of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(time))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= time * (1 - _ROUNDING))


def _line(cells: Sequence[tuple[str, str]]) -> Line:
    """Cells of one kind next to each other as one piece."""
    groups = groupby(cells, key=lambda cell: cell[1])
    return tuple(Piece("".join(text for text, _ in group), kind) for kind, group in groups)
