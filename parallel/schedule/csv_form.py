"""A schedule as CSV: one line a rank, one cell a step, no header.

The plain form that torch.distributed.pipelining writes and reads, so a schedule can go to and from
torch wherever torch can express it (each stage on one rank). The file holds neither name nor
placement: the name is given, and the placement follows from where the forwards stand.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from typing import NamedTuple

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
    lines: list[int] = []
    cells: list[_Cell] = []
    reader = csv.reader(io.StringIO(text.rstrip()))
    try:
        for texts in reader:
            number = reader.line_num
            row = parse_row(texts, f"{source}, line {number}")
            columns = (column for column, text in enumerate(texts, start=1) if text.strip())
            cells += [
                _Cell(action, len(rows), number, column)
                for column, step in zip(columns, row, strict=True)
                for action in actions(step)
            ]
            rows.append(row)
            lines.append(number)
    except csv.Error as error:
        raise ValueError(f"{source}, line {reader.line_num}: not CSV: {error}") from error
    if not cells:
        raise ValueError(f"{source}: there is no step in it")
    for row, line in zip(rows, lines, strict=True):
        if not row:
            raise ValueError(
                f"{source}, line {line}: no step in it; a line is the row of a rank, and every "
                "rank has steps"
            )
    paths = _paths(cells, source)
    try:
        return Schedule(name, Placement.of(paths), tuple(rows))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


class _Cell(NamedTuple):
    """An action, the rank in whose row it stands, and where that is in the text, from 1."""

    action: Action
    rank: int
    line: int
    column: int


def _cell(step: Step) -> str:
    return f"{step}OVERLAP_F_B" if isinstance(step, Pair) else str(step)


def _paths(cells: list[_Cell], source: str) -> list[tuple[int, ...]]:
    """By micro-batch and stage, the rank on which the forward stands, or else the backward.

    So `verify` can say what is missing, and in which row.
    """
    rank_of: dict[tuple[int, int], int] = {}
    for backwards in (False, True):
        for (stage, op, microbatch), rank, _, _ in cells:
            if backwards == (op != Op.F):
                rank_of.setdefault((stage, microbatch), rank)
    num_stages = 1 + max(cell.action.stage for cell in cells)
    paths: list[tuple[int, ...]] = []
    for microbatch in range(1 + max(cell.action.microbatch for cell in cells)):
        path: list[int] = []
        for stage in range(num_stages):
            if (stage, microbatch) not in rank_of:
                raise ValueError(f"{source}{_gap(cells, stage, microbatch)}")
            path.append(rank_of[stage, microbatch])
        paths.append(tuple(path))
    return paths


def _gap(cells: list[_Cell], stage: int, microbatch: int) -> str:
    """What is wrong where nothing of a stage stands on a micro-batch, and where in the text."""
    stages = Counter(cell.action.stage for cell in cells)
    microbatches = Counter(cell.action.microbatch for cell in cells)
    # A slip such as 4F0 for 0F0 brings in a stage of which there is next to nothing else.
    for kind, counts in (("stage", stages), ("micro-batch", microbatches)):
        top, most = max(counts), max(counts.values())
        if counts[top] == 1 < most or 4 * counts[top] <= most:
            action, _, line, column = next(
                cell
                for cell in cells
                if top == (cell.action.stage if kind == "stage" else cell.action.microbatch)
            )
            return (
                f", line {line}, column {column}: {action} brings in {kind} {top} (actions of it: "
                f"{counts[top]}, of others up to {most}); every stage needs a forward of every "
                "micro-batch"
            )
    wanted = f"every stage (0 to {max(stages)}) needs a forward of every micro-batch"
    if stage not in stages:
        return (
            f": nothing of stage {stage} is on any rank; {wanted}. Is the row of a rank missing? "
            f"The last one is line {cells[-1].line}"
        )
    return (
        f": {Action(stage, Op.F, microbatch)} is on no rank, nor anything else of stage {stage} on "
        f"micro-batch {microbatch}; {wanted}"
    )
