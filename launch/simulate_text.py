"""What `counterflow simulate` prints for people: the step drawn, and tables."""

from __future__ import annotations

import math
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..parallel.simulate import Idle, Result, idle_by_cause
from ..parallel.simulate.compare import REFERENCE, Comparison, Entry
from ..parallel.simulate.draw.text import Timeline, timeline
from .tables import Table, print_table, widest_that_fits

if TYPE_CHECKING:
    from ..parallel.simulate.search import SearchResult
    from .simulate_command import Answer

# By the letters of `timeline`; small ones are the other direction or stage of a rank.
_STYLES = {
    "F": "black on yellow",
    "f": "black on bright_yellow",
    "B": "white on blue",
    "b": "black on bright_blue",
    "I": "black on cyan",
    "i": "black on bright_cyan",
    "W": "white on magenta",
    "w": "black on bright_magenta",
    "pair": "black on green",
    "reduce": "reverse",
    "mirror": "reverse",
    "optimizer": "reverse",
    "idle": "dim",
}
_PEAK = "peak activations"
_HELD = "held to W"
# Heads of columns where there is little room, and which ones go first where there is less.
_SHORT = {
    _PEAK: "peak",
    _HELD: "to W",
    "rolling bubble": "rolling",
    "idle per rank": "idle",
    "parameter copies": "copies",
}
_FIRST_TO_GO = (
    "rolling bubble",
    "stages",
    "idle per rank",
    "parameter copies",
    f"vs {REFERENCE}",
)
# Bubble rates nearer than this print the same.
_SAME_RATE = 5e-5


def print_answer(answer: Answer) -> None:
    """Print all of it, the comparison last, where a terminal leaves the reader."""
    result = answer.result
    columns = shutil.get_terminal_size().columns
    _print_timeline(timeline(result, columns), columns)
    _print_ranks(answer)
    unit = f" {result.costs.unit}".rstrip()
    print(
        f"makespan {result.makespan:g}{unit}   bubble rate {result.bubble_rate:.4f}   stages "
        f"{result.stages}   copies of a stage's parameters {result.parameter_copies}"
    )
    if abs(result.rolling_bubble_rate - result.bubble_rate) > _SAME_RATE:
        print(
            f"steps that follow without a barrier: {result.rolling_makespan:g}{unit} each, bubble "
            f"rate {result.rolling_bubble_rate:.4f}"
        )
    if answer.found is not None:
        print(textwrap.fill(_about_search(answer.found), columns))
    if answer.comparison is not None:
        print()
        _print_comparison(answer, answer.comparison, columns)


def _print_timeline(drawn: Timeline, columns: int) -> None:
    legend = textwrap.fill(drawn.legend, columns)
    if not sys.stdout.isatty():
        print(f"{drawn.plain()}\n{legend}\n")
        return
    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError:
        print(f"{drawn.plain()}\n{legend}\n")
        return
    console = Console()
    for line in drawn.lines:
        text = Text.assemble(*((piece.text, _STYLES.get(piece.kind, "")) for piece in line))
        console.print(text, no_wrap=True, overflow="ignore", crop=False)
    print(f"{legend}\n")


def _print_ranks(answer: Answer) -> None:
    result = answer.result
    kinds = [kind for kind in result.op_counts[0] if any(c[kind] for c in result.op_counts)]
    idle = result.idle
    cells: dict[str, Callable[[int], str]] = {
        "rank": str,
        "busy": lambda rank: f"{result.busy[rank]:g}",
        "idle": lambda rank: f"{idle[rank]:g}",
        "waits most for": _waits(result),
        _PEAK: lambda rank: str(result.peak_activations[rank]),
        **{kind: lambda rank, k=kind: str(result.op_counts[rank][k]) for kind in kinds},
    }
    if answer.memory is not None:
        cells["peak memory"] = lambda rank: f"{answer.memories[rank].peak:g}"

    def table(short: bool, *left_out: str) -> Table:
        shown = {name: cell for name, cell in cells.items() if name not in left_out}
        body = [[cell(rank) for cell in shown.values()] for rank in range(result.ranks)]
        head = ["peak act." if short and name == _PEAK else name for name in shown]
        return head, body

    waits = "waits most for"
    head, body = widest_that_fits(
        [table(False), table(True), table(True, waits), table(True, waits, *kinds)]
    )
    print_table(f"{result.schedule}: {_about(answer)}", head, body)


def _about_search(found: SearchResult) -> str:
    named = (
        f"the best named schedule, {found.best_named}, takes {found.named_makespan:g}"
        if found.best_named is not None
        else "no named schedule keeps the limit"
    )
    above = f"{found.above_bound:.2%} above the lower bound, {found.bound:g}"
    if found.above_bound < _SAME_RATE:
        above = "which is the lower bound"
    return (
        f"search: {found.makespan:g}, the best of {found.tried} schedules ({found.found}), "
        f"{above}; {named}"
    )


def _about(answer: Answer) -> str:
    """The sizes and units of a table."""
    result = answer.result
    parts = [f"{result.ranks} ranks, {result.microbatches} micro-batches"]
    if result.costs.unit:
        parts.append(f"times in {result.costs.unit}")
    if answer.memory is not None and answer.memory.unit:
        parts.append(f"memory in {answer.memory.unit}")
    return ", ".join(parts)


def _waits(result: Result) -> Callable[[int], str]:
    """Per rank, the cause of most of its waiting, and how much that is."""
    idle = idle_by_cause(result)

    def most(rank: int) -> str:
        causes = _causes(idle[rank])
        cause = max(causes, key=lambda name: causes[name], default="")
        return f"{cause}: {causes[cause]:g}" if cause and causes[cause] > 0 else "-"

    return most


def _causes(idle: Idle) -> dict[str, float]:
    causes = {f"rank {rank}": time for rank, time in idle.on_rank.items()}
    return {**causes, "messages": idle.travelling, "gradients": idle.finish, "the end": idle.end}


def _print_comparison(answer: Answer, comparison: Comparison, columns: int) -> None:
    entries = comparison.entries
    tables = [_comparison_table(answer, comparison, False)]
    for count in range(len(_FIRST_TO_GO) + 1):
        without = _FIRST_TO_GO[:count]
        tables.append(_comparison_table(answer, comparison, True, *without))
    head, body = widest_that_fits(tables)
    print_table(_about(answer), head, body, names=1)
    ranks = answer.result.ranks
    notes = f"* shortest, > drawn above; activations in chunks of one of {ranks} stages"
    if _weights_hold(comparison):
        notes += ", until I or, to W, until W"
    if any(entry.result.stages != ranks for entry in entries):
        notes += f"; costs are of the model cut in {ranks} stages, which others cut further"
    lines = [notes]
    for name, reason in comparison.missing:
        lines.append(f"no {name}: {reason}")
    for line in lines:
        print(textwrap.fill(line, columns, subsequent_indent="  "))


def _weights_hold(comparison: Comparison) -> bool:
    """Whether what W still needs makes a difference to how much is held at most."""
    return any(max(entry.held) > max(entry.chunks) for entry in comparison.entries)


def _comparison_table(answer: Answer, comparison: Comparison, short: bool, *left_out: str) -> Table:
    reference = comparison.reference
    shortest = comparison.entries[0].result.makespan

    def marked(entry: Entry) -> str:
        chosen = ">" if entry.name == answer.name else " "
        best = "*" if math.isclose(entry.result.makespan, shortest) else " "
        return f"{chosen}{best}{entry.name}"

    def spread(numbers: Sequence[float]) -> str:
        low, high = f"{min(numbers):.4g}", f"{max(numbers):.4g}"
        return low if low == high else f"{low}..{high}"

    cells: dict[str, Callable[[Entry], str]] = {
        "schedule": marked,
        "stages": lambda e: str(e.result.stages),
        "makespan": lambda e: f"{e.result.makespan:g}",
    }
    if reference is not None:
        cells[f"vs {REFERENCE}"] = lambda e: f"{e.result.makespan / reference:.3f}"
    cells["bubble"] = lambda e: f"{e.result.bubble_rate:.4f}"
    results = [entry.result for entry in comparison.entries]
    if any(abs(r.rolling_bubble_rate - r.bubble_rate) > _SAME_RATE for r in results):
        cells["rolling bubble"] = lambda e: f"{e.result.rolling_bubble_rate:.4f}"
    cells["idle per rank"] = lambda e: spread(e.result.idle)
    cells[_PEAK] = lambda e: f"{max(e.chunks):g}"
    if _weights_hold(comparison):
        cells[_HELD] = lambda e: f"{max(e.held):g}"
    cells["parameter copies"] = lambda e: str(e.result.parameter_copies)
    if answer.memory is not None:
        cells["peak memory"] = lambda e: f"{max(m.peak for m in e.memories):.4g}"
    shown = {name: cell for name, cell in cells.items() if name not in left_out}
    body = [[cell(entry) for cell in shown.values()] for entry in comparison.entries]
    return [_SHORT.get(name, name) if short else name for name in shown], body
