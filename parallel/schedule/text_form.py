"""A schedule as a text that a person can read and edit, and that says all there is to say.

# comment
name: dualpipe
route: ranks 0 1, micro-batches 0-1
route: ranks 1 0, micro-batches 2-3
rank 0: 0F0  1F2  (0F1;1B2)  ...
rank 1: ...
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from itertools import pairwise

from .actions import Step, parse_step
from .placement import Placement
from .schedule import Schedule

_HEADER = """\
# A counterflow schedule: one row a rank, its steps in order.
# 2F0 is the forward of stage 2 on micro-batch 0, B its full backward, I and W the halves of one for
# input and weight gradients; (2F0;1B3) is a forward and a full backward that overlap.
# A route lists the ranks of stages 0, 1, ... and the micro-batches that take it.
"""
# Nine digits: no larger number is meant, and Python refuses to read one of thousands.
_ROUTE = re.compile(
    r"ranks((?: +[0-9]{1,9})+) *, *micro-batches((?: +[0-9]{1,9}(?:-[0-9]{1,9})?)+)"
)
_ROW = re.compile(r"rank +([0-9]{1,9})")


def to_text(schedule: Schedule) -> str:
    """The schedule's text form; `from_text` gives an equal schedule back."""
    placement = schedule.placement
    lines = [f"name: {schedule.name}"]
    for index, route in enumerate(placement.routes):
        takers = [m for m, taken in enumerate(placement.route_of) if taken == index]
        ranks = " ".join(map(str, route))
        lines.append(f"route: ranks {ranks}, micro-batches {_to_ranges(takers)}")
    for rank, row in enumerate(schedule.rows):
        lines.append(f"rank {rank}: {'  '.join(map(str, row))}".rstrip())
    return _HEADER + "\n".join(lines) + "\n"


def from_text(text: str, source: str = "text") -> Schedule:
    """The schedule that a text form describes; it is not verified.

    Args:
        text: what `to_text` gives, or a person wrote.
        source: what to call the text in errors, such as its path.

    Raises:
        ValueError: names source, line and, for a step, its column in the row (counted in steps,
            from 1), and what was expected.
    """
    name: str | None = None
    routes: list[tuple[int, ...]] = []
    route_of: dict[int, int] = {}
    rows: list[tuple[Step, ...]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        where = f"{source}, line {number}"
        key, colon, value = (part.strip() for part in line.partition(":"))
        row = _ROW.fullmatch(key)
        if not colon or not (row or key in ("name", "route")):
            raise ValueError(f"{where}: {_unknown_line(key)}")
        if row:
            if int(row[1]) != len(rows):
                raise ValueError(
                    f"{where}: the row of rank {row[1]} stands where that of rank {len(rows)} is "
                    "expected; rows go in the order of ranks, one each"
                )
            rows.append(parse_row(value.split(), where))
        elif key == "route":
            route, takers = _parse_route(value, where, len(text))
            for microbatch in takers:
                if route_of.setdefault(microbatch, len(routes)) != len(routes):
                    raise ValueError(f"{where}: micro-batch {microbatch} has a route already")
            routes.append(route)
        elif name is not None:
            raise ValueError(f"{where}: a second name; a schedule has one")
        else:
            name = value
    if name is None or not routes:
        raise ValueError(f"{source}: no '{'name' if name is None else 'route'}:' line")
    for microbatch in range(max(route_of) + 1):
        if microbatch not in route_of:
            raise ValueError(f"{source}: micro-batch {microbatch} is in no 'route:' line")
    try:
        placement = Placement(tuple(routes), tuple(route_of[m] for m in range(len(route_of))))
        return Schedule(name, placement, tuple(rows))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def parse_row(row: Iterable[str], where: str) -> tuple[Step, ...]:
    """The steps of a row's cells, blank ones left out; an error names the column, from 1."""
    steps: list[Step] = []
    for column, cell in enumerate(row, start=1):
        try:
            if cell.strip():
                steps.append(parse_step(cell))
        except ValueError as error:
            raise ValueError(f"{where}, column {column}: {error}") from error
    return tuple(steps)


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


def _unknown_line(key: str) -> str:
    near = get_close_matches(key, ("name", "route", "rank 0"), n=1)
    hint = f"did you mean '{near[0]}:'? " if near else ""
    return f"{_shown(key)} begins no line; {hint}expected 'name:', 'route:' or 'rank N:'"


def _parse_route(value: str, where: str, most: int) -> tuple[tuple[int, ...], list[int]]:
    match = _ROUTE.fullmatch(value)
    if match is None:
        raise ValueError(
            f"{where}: {_shown(value)} is not a route; expected one such as "
            "'ranks 0 1 2 3, micro-batches 0-7', of numbers of up to nine digits"
        )
    takers: list[int] = []
    for part in match[2].split():
        first, _, last = part.partition("-")
        if int(last or first) < int(first):
            raise ValueError(f"{where}: micro-batches {part} run backwards; write {last}-{first}")
        if int(last or first) >= most:  # each micro-batch has a step: a slip must not fill memory
            raise ValueError(f"{where}: micro-batches {part} are more than the text has steps")
        takers += range(int(first), int(last or first) + 1)
    return tuple(map(int, match[1].split())), takers


def _to_ranges(numbers: list[int]) -> str:
    """ "0-3 8" for 0, 1, 2, 3, 8 (ascending)."""
    starts = [numbers[0], *(b for a, b in pairwise(numbers) if b != a + 1)]
    ends = [*(a for a, b in pairwise(numbers) if b != a + 1), numbers[-1]]
    return " ".join(f"{a}-{b}" if a != b else str(a) for a, b in zip(starts, ends, strict=True))
