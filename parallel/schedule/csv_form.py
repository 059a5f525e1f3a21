"""A schedule as CSV: one line a rank, one cell a step, no header.

The plain form that torch.distributed.pipelining writes and reads, so a schedule can go to and from
torch wherever torch can express it (each stage on one rank). The file holds neither name nor
placement: the name is given, and the placement follows from where the forwards stand.
"""

from __future__ import annotations

import csv
import io

from .actions import Action, Op, Pair, Step, actions
from .placement import Placement
from .schedule import Schedule
from .text_form import parse_row


def to_csv(schedule: Schedule) -> str:
    """The schedule's CSV form; pairs are written as torch does, "(0F7;7B3)OVERLAP_F_B"."""
    return "".join(",".join(map(_cell, row)) + "\n" for row in schedule.rows)


def from_csv(text: str, name: str, source: str = "text") -> Schedule:
    """The schedule that a CSV form describes; it is not verified.

    Micro-batches whose forwards visit the same ranks share a route, numbered by first use. Blank
    cells, with which torch draws idle time, are left out.

    Args:
        text: lines of cells.
        name: name of the schedule.
        source: what to call the text in errors, such as its path.

    Raises:
        ValueError: names source, line and column (counted in cells, from 1), and what was expected.
    """
    rows: list[tuple[Step, ...]] = []
    reader = csv.reader(io.StringIO(text.rstrip()))
    try:
        for row in reader:
            rows.append(parse_row(row, f"{source}, line {reader.line_num}"))
    except csv.Error as error:
        raise ValueError(f"{source}, line {reader.line_num}: not CSV: {error}") from error
    try:
        return Schedule(name, _placement(rows), tuple(rows))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _cell(step: Step) -> str:
    return f"{step}OVERLAP_F_B" if isinstance(step, Pair) else str(step)


def _placement(rows: list[tuple[Step, ...]]) -> Placement:
    """Where the forwards stand; of a forward that is missing, where the rest of its chunk does.

    So `verify` can say what is missing, and in which row.
    """
    everything = [action for row in rows for step in row for action in actions(step)]
    if not everything:
        raise ValueError("there is no step in it")
    rank_of: dict[tuple[int, int], int] = {}
    for backwards in (False, True):
        for rank, row in enumerate(rows):
            for step in row:
                for stage, op, microbatch in actions(step):
                    if backwards == (op != Op.F):
                        rank_of.setdefault((stage, microbatch), rank)
    num_stages = 1 + max(action.stage for action in everything)
    paths: list[tuple[int, ...]] = []
    for microbatch in range(1 + max(action.microbatch for action in everything)):
        path: list[int] = []
        for stage in range(num_stages):
            if (stage, microbatch) not in rank_of:
                raise ValueError(
                    f"{Action(stage, Op.F, microbatch)} is on no rank, nor anything else of stage "
                    f"{stage} on micro-batch {microbatch}; every stage (0 to {num_stages - 1}) "
                    "needs a forward of every micro-batch"
                )
            path.append(rank_of[stage, microbatch])
        paths.append(tuple(path))
    return Placement.of(paths)
