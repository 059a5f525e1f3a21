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
from ..parallel.simulate.draw.text import MIXED, Timeline, timeline
from .outputs import Output
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
    MIXED: "bold",
}
_TO_W = "to W"
# Columns of a comparison that go, one after the other, where there is too little room.
_FIRST_TO_GO = ("rolling", "stages", "idle", "copies", f"vs {REFERENCE}", _TO_W, "bubble", "peak")
# Bubble rates nearer than this print the same.
_SAME_RATE = 5e-5


def print_answer(answer: Answer) -> None:
    """Print all of it, the comparison last, where a terminal leaves the reader."""
    result = answer.result
    columns = shutil.get_terminal_size().columns
    _print_timeline(timeline(result, columns), columns)
    _print_ranks(answer)
    unit = f" {result.costs.unit}".rstrip()
    parts = [
        f"makespan {result.makespan:g}{unit}",
        f"bubble rate {result.bubble_rate:.4f}",
        f"stages {result.stages}",
        f"copies of a stage's parameters {result.parameter_copies}",
    ]
    print(_in_lines(parts, columns))
    if abs(result.rolling_bubble_rate - result.bubble_rate) > _SAME_RATE:
        rolling = (
            f"steps that follow without a barrier: {result.rolling_makespan:g}{unit} each, bubble "
            f"rate {result.rolling_bubble_rate:.4f}"
        )
        print(textwrap.fill(rolling, columns))
    if answer.found is not None:
        print(textwrap.fill(_about_search(answer.found), columns))
        if answer.comparison is None:
            print(textwrap.fill(_about_model(answer), columns))
    if answer.comparison is not None:
        print()
        _print_comparison(answer, answer.comparison, columns)


def print_written(answer: Answer, outputs: Sequence[Output]) -> None:
    """Say what was written, and how to simulate a written schedule with the same model."""
    result = answer.result
    columns = shutil.get_terminal_size().columns
    for output in outputs:
        print(f"wrote {output.path}")
    schedules = [output.path for output in outputs if output.flag in ("--csv", "--text")]
    if schedules and answer.of_model and result.stages != result.ranks:
        hint = (
            f"alone, its costs are of one of its {result.stages} stages; --schedule "
            f"{schedules[0]} --compare takes them, as here, of the model cut in {result.ranks}"
        )
        # A path stays whole, to be copied.
        print(textwrap.fill(hint, columns, break_long_words=False, break_on_hyphens=False))


def _in_lines(parts: Sequence[str], columns: int) -> str:
    """The parts side by side, in as few lines as there is room for."""
    lines = [parts[0]]
    for part in parts[1:]:
        longer = f"{lines[-1]}   {part}"
        if len(longer) <= columns:
            lines[-1] = longer
        else:
            lines.append(part)
    return "\n".join(lines)


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
        "peak activations": lambda rank: f"{result.peak_activations[rank] * answer.chunk:g}",
        _TO_W: lambda rank: f"{result.peak_chunks[rank] * answer.chunk:g}",
        **{kind: lambda rank, k=kind: str(result.op_counts[rank][k]) for kind in kinds},
    }
    if not answer.limited and max(result.peak_chunks) <= max(result.peak_activations):
        del cells[_TO_W]
    if answer.memory is not None:
        cells["peak memory"] = lambda rank: f"{answer.memories[rank].peak:g}"

    def table(*left_out: str) -> Table:
        shown = {name: cell for name, cell in cells.items() if name not in left_out}
        body = [[cell(rank) for cell in shown.values()] for rank in range(result.ranks)]
        return list(shown), body

    waits = "waits most for"
    tables = [table(), table(waits), table(waits, *kinds), table(waits, *kinds, _TO_W)]
    head, body = widest_that_fits(tables)
    print_table(f"{answer.name}: {_about(answer)}", head, body)


def _about_search(found: SearchResult) -> str:
    named = (
        f"the best named schedule, {found.best_named}, takes {found.named_makespan:g}"
        if found.best_named is not None
        else "no named schedule keeps the limit"
    )
    bound = f"the lower bound on the placements tried, {found.bound:g}"
    above = f"{found.above_bound:.2%} above {bound}"
    if found.above_bound < _SAME_RATE:
        above = "which is the lower bound"
    return (
        f"search: {found.makespan:g}, the best of {found.tried} schedules ({found.found}), "
        f"{above}; {named}"
    )


def _about_model(answer: Answer) -> str:
    """What costs, activations and the limit of a search are of."""
    ranks, stages = answer.result.ranks, answer.result.stages
    what = "costs, activations and the limit" if answer.limited else "costs and activations"
    note = f"{what} are of the model cut in {ranks} stages"
    if stages != ranks:
        note += f", each of which this schedule cuts in {stages // ranks}"
    return note + (f"; the limit is that of activations {_TO_W}" if answer.limited else "")


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
    head, body = widest_that_fits(
        [
            _comparison_table(answer, comparison, *_FIRST_TO_GO[:count])
            for count in range(len(_FIRST_TO_GO) + 1)
        ]
    )
    print_table(_about(answer), head, body, names=1)
    ranks = answer.result.ranks
    notes = f"* shortest, > drawn above; activations in chunks of one of {ranks} stages"
    if _weights_hold(comparison):
        notes += f", peak until I, {_TO_W} until W"
    if any(entry.stages != ranks for entry in entries):
        notes += f"; costs are of the model cut in {ranks} stages, which others cut further"
    lines = [notes]
    for name, reason in comparison.missing:
        lines.append(f"no {name}: {reason}")
    for line in lines:
        print(textwrap.fill(line, columns, subsequent_indent="  "))


def _weights_hold(comparison: Comparison) -> bool:
    """Whether what W still needs makes a difference to how much is held at most."""
    return any(max(entry.held) > max(entry.chunks) for entry in comparison.entries)


def _comparison_table(answer: Answer, comparison: Comparison, *left_out: str) -> Table:
    reference = comparison.reference
    shortest = comparison.entries[0].makespan

    def marked(entry: Entry) -> str:
        chosen = ">" if entry.name == answer.name else " "
        best = "*" if math.isclose(entry.makespan, shortest) else " "
        return f"{chosen}{best}{entry.name}"

    def spread(numbers: Sequence[float]) -> str:
        low, high = f"{min(numbers):.4g}", f"{max(numbers):.4g}"
        return low if low == high else f"{low}..{high}"

    cells: dict[str, Callable[[Entry], str]] = {
        "schedule": marked,
        "stages": lambda e: str(e.stages),
        "makespan": lambda e: f"{e.makespan:g}",
    }
    if reference is not None:
        cells[f"vs {REFERENCE}"] = lambda e: f"{e.makespan / reference:.3f}"
    cells["bubble"] = lambda e: f"{e.bubble_rate:.4f}"
    if any(abs(e.rolling_bubble_rate - e.bubble_rate) > _SAME_RATE for e in comparison.entries):
        cells["rolling"] = lambda e: f"{e.rolling_bubble_rate:.4f}"
    cells["idle"] = lambda e: spread(e.idle)
    cells["peak"] = lambda e: f"{max(e.chunks):g}"
    if _weights_hold(comparison):
        cells[_TO_W] = lambda e: f"{max(e.held):g}"
    cells["copies"] = lambda e: str(e.parameter_copies)
    if answer.memory is not None:
        cells["peak memory"] = lambda e: f"{max(e.peak_memory):.4g}"
    shown = {name: cell for name, cell in cells.items() if name not in left_out}
    body = [[cell(entry) for cell in shown.values()] for entry in comparison.entries]
    return list(shown), body
