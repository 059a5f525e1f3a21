"""`counterflow simulate`: what a pipeline schedule costs, and how it compares with the others."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from .outputs import Output, check_outputs, write_whole

if TYPE_CHECKING:
    from ..parallel.schedule import Schedule
    from ..parallel.simulate import Costs, Memory, RankMemory, Result
    from ..parallel.simulate.compare import Comparison
    from ..parallel.simulate.search import SearchResult

DEFAULT = "dualpipe"
SEARCH = "search"
# A schedule of so many actions and its simulation take about 4 GB; with --compare, all together.
MOST_ACTIONS = 5_000_000
# A pair's time is kept for every two stages.
MOST_STAGES = 2048

_COSTS_HELP = (
    "such as F=1,I=1,W=1,pair=3,send=0, times of one stage; B is I+W and pair is F+B if left out; "
    "F=1/1/1/2 gives one a stage. Or a .toml or .json file, which can say more (docs/simulate.md)"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add = parser.add_argument
    add("--schedule", metavar="NAME|FILE|search", help=f"a name, a file, or search ({DEFAULT})")
    add("--ranks", type=int, metavar="N", help="pipeline ranks; of a file, its own")
    add("--microbatches", type=int, metavar="M", help="micro-batches a step; of a file, its own")
    add("--costs", metavar="TEXT|FILE", help=_COSTS_HELP)
    add("--stages-per-rank", type=int, metavar="V", help="stages a rank, of interleaved")
    add(
        "--memory-limit",
        type=float,
        metavar="CHUNKS",
        help="for search: activations that a rank may hold, in micro-batches of one of N stages",
    )
    add(
        "--transfers",
        metavar="HOW",
        help="check that the order gets through where messages travel so: buffered (as the "
        "executor does it), batched, in-order or blocking",
    )
    add(
        "--compare",
        action="store_true",
        help="all named schedules side by side; costs are then those of the model cut in N stages",
    )
    add("--json", action="store_true", help="print one JSON object")
    add("--plot", metavar="FILE", help="draw the step: .svg, .png or .html")
    add("--trace", metavar="FILE", help="write a trace for ui.perfetto.dev: .json")
    add(
        "--csv",
        metavar="FILE",
        help="write the schedule, a row a rank; the name is not in it: read again, the schedule is "
        "called as the file",
    )
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Answer:
    """What the command prints.

    Attributes:
        result: of the chosen schedule.
        memories: per rank, what it holds.
        memory: sizes that the user gave; None: chunks are counted.
        comparison: with the other schedules, if asked for.
        name: of the chosen schedule's entry in it.
        found: what the search says of its schedule, if it was searched.
    """

    result: Result
    memories: tuple[RankMemory, ...]
    memory: Memory | None
    comparison: Comparison | None = None
    name: str = ""
    found: SearchResult | None = None

    @property
    def memory_unit(self) -> str:
        return "chunks" if self.memory is None else self.memory.unit


def run(parsed: argparse.Namespace) -> int:
    """Run the command; the exit status is returned.

    Raises:
        ValueError: one of the user's mistakes.
    """
    outputs = _outputs(parsed)
    check_outputs(outputs, _inputs(parsed))
    _check(parsed)
    costs, memory = _costs(parsed)
    answer = _compared(parsed, costs, memory) if parsed.compare else _single(parsed, costs, memory)
    if not math.isfinite(answer.result.makespan):
        raise ValueError("the costs are too large: the makespan is more than a number can hold")
    for output in outputs:
        write_whole(output.path, _writer(output, answer))
    if parsed.json:
        from .simulate_json import to_json

        print(json.dumps(to_json(answer), allow_nan=False))
    else:
        from .simulate_text import print_answer

        print_answer(answer)
        for output in outputs:
            print(f"wrote {output.path}")
    return 0


def _outputs(parsed: argparse.Namespace) -> list[Output]:
    kinds = {
        "--plot": (".svg", ".png", ".html"),
        "--trace": (".json",),
        "--csv": (),
    }
    given = {flag: getattr(parsed, flag[2:]) for flag in kinds}
    if (parsed.plot or "").lower().endswith((".svg", ".png")) and not find_spec("matplotlib"):
        raise ValueError(
            f"--plot {parsed.plot}: needs matplotlib: pip install 'counterflow[plots]'; an .html "
            "page can be had without"
        )
    return [Output(f, Path(p), kinds[f]) for f, p in given.items() if p is not None]


def _inputs(parsed: argparse.Namespace) -> dict[str, Path]:
    given = {"--schedule": parsed.schedule, "--costs": parsed.costs}
    return {flag: Path(text) for flag, text in given.items() if text and _is_file(text)}


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long for a name, or with a null character
        return False


def _writer(output: Output, answer: Answer) -> Callable[[Path], object]:
    unit = answer.memory_unit
    if output.flag == "--plot":
        from ..parallel.simulate.draw.pictures import save_picture

        return lambda path: save_picture(answer.result, answer.memories, path, memory_unit=unit)
    if output.flag == "--trace":
        from ..parallel.simulate.draw.trace import save_trace

        return lambda path: save_trace(answer.result, answer.memories, path, memory_unit=unit)
    from ..parallel.schedule.csv_form import to_csv

    text = to_csv(answer.result.plan)
    return lambda path: path.write_text(text, encoding="utf-8", newline="\n")


def _check(parsed: argparse.Namespace) -> None:
    """What can be known to be impossible before anything is built."""
    for flag in ("--ranks", "--microbatches", "--stages-per-rank"):
        value = getattr(parsed, flag[2:].replace("-", "_"))
        if value is not None and value < 1:
            raise ValueError(f"{flag} must be a whole number from 1 up, got {value}")
    limit = parsed.memory_limit
    if limit is not None:
        if parsed.schedule != SEARCH:
            raise ValueError(
                "--memory-limit goes with --schedule search; a named schedule holds what it holds"
            )
        if not (math.isfinite(limit) and limit > 0):
            raise ValueError(f"--memory-limit must be a number above 0, got {limit:g}")
    if parsed.schedule == SEARCH and parsed.stages_per_rank is not None:
        raise ValueError("--stages-per-rank goes with interleaved; a search tries its own numbers")
    if parsed.transfers is not None:
        from ..parallel.schedule.rendezvous import Discipline

        Discipline.named(parsed.transfers)
    if parsed.ranks and parsed.microbatches:
        stages = parsed.ranks * (parsed.stages_per_rank or 1)
        _check_number(stages, 3 * stages * parsed.microbatches)


def _check_number(stages: int, actions: int) -> None:
    """Raise ValueError for what would exhaust the memory."""
    if stages > MOST_STAGES:
        raise ValueError(f"{stages:,} stages are more than this command takes, {MOST_STAGES:,}")
    if actions > MOST_ACTIONS:
        raise ValueError(
            f"{actions:,} actions (F, I and W of each stage and micro-batch) are more than this "
            f"command takes, {MOST_ACTIONS:,}; use fewer ranks or micro-batches"
        )


def _costs(parsed: argparse.Namespace) -> tuple[Costs, Memory | None]:
    from ..parallel.simulate import Costs
    from ..parallel.simulate.cost_file import SUFFIXES, load_costs

    text = parsed.costs
    if text is None:
        return Costs(), None
    if text.lower().endswith(SUFFIXES) or ("=" not in text and _is_file(text)):
        file = load_costs(text)
        return file.costs, file.memory
    return Costs.parse(text), None


def _single(parsed: argparse.Namespace, costs: Costs, memory: Memory | None) -> Answer:
    """One schedule; costs and sizes are those of its stages."""
    from ..parallel.simulate import Memory, memory_of, simulate

    schedule, found = _schedule(parsed, costs)
    if found is not None:  # nobody could know how many stages it would have
        sizes = (schedule.num_ranks, schedule.num_stages)
        costs, memory = costs.for_ranks(*sizes), memory and memory.for_ranks(*sizes)
    result = simulate(schedule, costs)
    memories = memory_of(result, memory or Memory())
    return Answer(result, memories, memory, found=found)


def _compared(parsed: argparse.Namespace, costs: Costs, memory: Memory | None) -> Answer:
    """All schedules; costs and sizes are those of the model cut in as many stages as ranks."""
    from ..parallel.schedule import names
    from ..parallel.simulate.compare import compare

    chosen = parsed.schedule or DEFAULT
    ranks, microbatches = parsed.ranks, parsed.microbatches
    also: dict[str, Schedule] = {}
    found = None
    if chosen not in names() or ranks is None or microbatches is None:
        # A file or a search; and what is no schedule at all is an error here.
        also[chosen], found = _schedule(parsed, costs)
        ranks, microbatches = also[chosen].num_ranks, also[chosen].num_microbatches
    _check_number(ranks, 3 * ranks * microbatches * len(names()))
    shows = sys.stderr.isatty()
    try:
        comparison = compare(
            ranks,
            microbatches,
            costs,
            memory=memory,
            stages_per_rank=parsed.stages_per_rank,
            also=also,
            tell=_tell if shows else None,
        )
    finally:
        if shows:
            _tell("")
    if parsed.schedule is None and comparison.entry(chosen) is None:
        chosen = comparison.entries[0].name
    entry = comparison.entry(chosen)
    if entry is None:
        raise ValueError(
            next(f"{name}: {why}" for name, why in comparison.missing if name == chosen)
        )
    if not also:
        _check_transfers(parsed, entry.result.plan)
    return Answer(entry.result, entry.memories, memory, comparison, chosen, found)


def _schedule(parsed: argparse.Namespace, costs: Costs) -> tuple[Schedule, SearchResult | None]:
    """The chosen schedule, checked; and what the search says of it, if it was searched."""
    from .schedules import find_schedule

    found = None
    if parsed.schedule == SEARCH:
        if parsed.ranks is None or parsed.microbatches is None:
            raise ValueError("a search needs --ranks and --microbatches")
        from ..parallel.simulate.search import search

        found = search(parsed.ranks, parsed.microbatches, costs, memory_limit=parsed.memory_limit)
        schedule = found.schedule
    else:
        schedule = find_schedule(
            parsed.schedule or DEFAULT,
            ranks=parsed.ranks,
            microbatches=parsed.microbatches,
            stages_per_rank=parsed.stages_per_rank,
            costs=costs,
        )
    _check_number(schedule.num_stages, sum(map(len, schedule.rows)))
    _check_transfers(parsed, schedule)
    return schedule, found


def _check_transfers(parsed: argparse.Namespace, schedule: Schedule) -> None:
    if parsed.transfers is not None:
        from ..parallel.schedule import verify

        verify(schedule, parsed.transfers)


def _tell(name: str) -> None:
    """Show what is being simulated, in a line of its own that the next one covers."""
    print(f"\r{name:<20}\r", end="", file=sys.stderr, flush=True)
