"""What `counterflow plan` prints for people."""

from __future__ import annotations

import shutil
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Sequence

from ..predict.prediction import Prediction, RankTime
from .outputs import Output
from .plan_answer import Answer, Candidate, Searched
from .plan_words import (
    Cells,
    does_not_fit,
    fits,
    gib,
    headline,
    layout_words,
    ms,
    on_host,
    percent,
    search_cells,
)
from .tables import Table, print_table, widest_that_fits

_KINDS = {"source": "from", "assumed": "assumed", "extrapolated": "extrapolated"}
_BETWEEN = 2  # spaces between columns
# Columns of the search's table that follow from others, in the order in which they make room.
_FIRST_TO_GO = ("GPU hours", "MFU", "dp")


def print_answer(answer: Answer) -> None:
    """Print all of it; what is asked for first comes last, where a terminal leaves the reader."""
    found = answer.prediction
    _print_notes(found)
    if answer.searched is not None:
        _print_search(answer.searched)
    _print_memory(answer)
    _print_ranks(found)
    _print_waterfall(found)
    _print_layout(answer)
    print()
    for name, value in headline(found):
        _fill(f"{name}: {value}")
    _fill(fits(answer))
    _fill(f"What limits it: {found.limit}")


def print_written(answer: Answer, outputs: Iterable[Output]) -> None:
    """Say what was written, and of a run's file whether that run lacks memory."""
    for output in outputs:
        lacks = answer.over_bytes if output.flag == "--toml" else 0
        _fill(f"wrote {output.path}" + (f"; {does_not_fit(answer)}" if lacks else ""))


def _fill(text: str, indent: str = "  ") -> None:
    columns = shutil.get_terminal_size().columns
    print(
        textwrap.fill(
            text,
            columns,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
    )


def _print_notes(found: Prediction) -> None:
    for note in found.notes:
        _fill(f"{_KINDS[note.kind]}: {note.text}")
    if found.notes:
        print()


def _print_layout(answer: Answer) -> None:
    found = answer.prediction
    cluster, layout = found.cluster, found.layout
    print()
    _fill(
        f"{answer.model} on {layout.world_size:,} x {cluster.gpu.name} ({cluster.name}), speeds "
        f"from {answer.calibration}; layout from {answer.given}"
    )
    parts = [f"{name} {value}" for name, value in layout_words(answer.layout)]
    _fill(f"layout: {'; '.join(parts)}")


def _print_waterfall(found: Prediction) -> None:
    head = ["", "ms", "of the step", "so far"]
    body: list[list[str]] = []
    so_far = 0.0
    for share in found.waterfall:
        so_far += share.ms
        body.append([share.name, ms(share.ms), percent(share.ms, found.step_ms), ms(so_far)])
    print()
    print_table("from the ideal step to the predicted one", head, body, names=1)
    for share in found.waterfall:
        _fill(f"  {share.name}: {share.why}", "    ")


def _print_ranks(found: Prediction) -> None:
    body = [[str(rank), *map(ms, time), ms(time.total)] for rank, time in enumerate(found.ranks)]
    print()
    print_table("each pipeline rank's step, ms", ["rank", *RankTime._fields, "step"], body)


def _print_memory(answer: Answer) -> None:
    """Categories by rows; ranks that hold the same share a column."""
    found = answer.prediction
    names = [name for name in found.memory[0].parts if any(m.parts[name] for m in found.memory)]
    alike: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    for rank, memory in enumerate(found.memory):
        over = found.memory_bytes and memory.total > found.memory_bytes
        column = [*(gib(memory.parts[name]) for name in names), gib(memory.total)]
        column[-1] += "!" if over else ""
        alike[*column, *map(gib, on_host(memory).values())].append(rank)
    host = list(on_host(found.memory[0]))
    head = ["rank", *map(_ranks, alike.values())]
    rows = [
        [name, *cells]
        for name, *cells in zip([*names, "total", *host], *alike, strict=True)
        if name not in host or set(cells) != {"0"}
    ]
    most = f"; a GPU has {gib(found.memory_bytes)}" if found.memory_bytes else ""
    _print_blocks(f"memory of each pipeline rank, GiB{most}", head, rows)
    if answer.saved:
        saved = ", ".join(f"{name} {gib(of)}" for name, of in answer.saved.items())
        _fill(f"saved on rank {answer.fullest}, GiB: {saved}")


def _ranks(ranks: Sequence[int]) -> str:
    """Such as 0,2-5."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _print_search(searched: Searched) -> None:
    cells, alike = search_cells(searched.best)
    tables = [
        _search_table(searched.best, cells, _FIRST_TO_GO[:n]) for n in range(len(_FIRST_TO_GO) + 1)
    ]
    _print_blocks(searched.words, *widest_that_fits(tables))
    if alike:
        _fill(f"in all of them: {alike}")
    for of in searched.refused:
        _fill(f"  {of.count:,} cannot run: {of.constraint}, such as {of.example}", "    ")
    print()


def _search_table(best: Sequence[Candidate], cells: Cells, left_out: Sequence[str]) -> Table:
    shown = {name: cell for name, cell in cells.items() if name not in left_out}
    body = [
        [f"{place}.", *(cell(of) for cell in shown.values())] for place, of in enumerate(best, 1)
    ]
    return ["", *shown], body


def _print_blocks(title: str, head: Sequence[str], body: Sequence[Sequence[str]]) -> None:
    """A table whose first column has names, in as many as the terminal's width makes of it."""
    for place, (names, rows) in enumerate(blocks(head, body, shutil.get_terminal_size().columns)):
        print_table(title if not place else "and", names, rows, names=1)


def blocks(head: Sequence[str], body: Sequence[Sequence[str]], columns: int) -> list[Table]:
    """A table's columns in tables that are no wider than `columns`, the first column in each.

    One column beside the first is in each of them, however wide it is.
    """
    widths = [max(map(len, cells)) + _BETWEEN for cells in zip(head, *body, strict=True)]
    groups: list[list[int]] = [[]]
    for place, width in enumerate(widths[1:], 1):
        taken = widths[0] + sum(widths[other] for other in groups[-1])
        # No spaces are needed after the last column.
        if groups[-1] and taken + width - _BETWEEN > columns:
            groups.append([])
        groups[-1].append(place)
    return [
        (
            [head[0], *(head[place] for place in group)],
            [[row[0], *(row[place] for place in group)] for row in body],
        )
        for group in groups
    ]
