"""What `counterflow plan` prints for people."""

from __future__ import annotations

import shutil
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Sequence

from ..predict.prediction import Prediction, RankTime
from .outputs import Output
from .plan_answer import Answer, Candidate, Searched
from .plan_words import SEARCH_CELLS, fits, gib, headline, layout_words, ms, percent
from .tables import Table, print_table, widest_that_fits

_KINDS = {"source": "from", "assumed": "assumed", "extrapolated": "extrapolated"}
# Columns of the search's table that go, one after the other, where there is too little room.
_FIRST_TO_GO = ("GPU hours", "MFU", "ZeRO", "fp8", "made again", "dispatch")


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


def print_written(outputs: Iterable[Output]) -> None:
    """Say what was written."""
    for output in outputs:
        print(f"wrote {output.path}")


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
    parts = [f"{name} {value}" for name, value in layout_words(layout)]
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
        alike[*column, gib(memory.host)].append(rank)
    head = ["rank", *map(_ranks, alike.values())]
    rows = zip([*names, "total", "in the host's memory"], *alike, strict=True)
    most = f"; a GPU has {gib(found.memory_bytes)}" if found.memory_bytes else ""
    print_table(f"memory of each pipeline rank, GiB{most}", head, list(rows), names=1)
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
    head, body = widest_that_fits(
        [_search_table(searched.best, _FIRST_TO_GO[:n]) for n in range(len(_FIRST_TO_GO) + 1)]
    )
    print_table(searched.words, head, body)
    for of in searched.refused:
        _fill(f"  {of.count:,} cannot run: {of.constraint}, such as {of.example}", "    ")
    print()


def _search_table(best: Sequence[Candidate], left_out: Sequence[str]) -> Table:
    shown = {name: cell for name, cell in SEARCH_CELLS.items() if name not in left_out}
    return list(shown), [[cell(candidate) for cell in shown.values()] for candidate in best]
