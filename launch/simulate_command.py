"""`counterflow simulate`: what a pipeline schedule costs, and how it compares with the others."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .outputs import Output, write_whole
from .simulate_options import DEFAULT, SEARCH, Options, check_number, read_options
from .simulate_progress import Progress

if TYPE_CHECKING:
    from ..parallel.schedule import Schedule
    from ..parallel.simulate import Memory, RankMemory, Result
    from ..parallel.simulate.compare import Comparison
    from ..parallel.simulate.search import SearchResult

# A shorter step cannot be divided by without an overflow.
_SHORTEST = 1e-250


@dataclass(frozen=True)
class Answer:
    """What the command prints.

    Attributes:
        name: of the schedule: its own, or in a comparison that of its entry.
        result: of its simulation.
        memories: per rank, what it holds.
        memory: sizes that the user gave; None: chunks are counted.
        of_model: whether costs and sizes are those of the model cut in as many stages as ranks,
            and not those of the schedule's own stages.
        comparison: with the other schedules, if asked for.
        found: what the search says of its schedule, if it was searched.
        limited: whether the search had a limit of memory.
    """

    name: str
    result: Result
    memories: tuple[RankMemory, ...]
    memory: Memory | None
    of_model: bool = False
    comparison: Comparison | None = None
    found: SearchResult | None = None
    limited: bool = False

    @property
    def chunk(self) -> float:
        """What an activation of a stage counts: 1, or its share of one of as many as ranks."""
        return self.result.ranks / self.result.stages if self.of_model else 1

    @property
    def memory_unit(self) -> str:
        if self.memory is not None:
            return self.memory.unit
        return f"chunks of 1/{self.result.ranks} model" if self.of_model else "chunks"


def run(parsed: argparse.Namespace) -> int:
    """Run the command; the exit status is returned.

    Raises:
        ValueError: one of the user's mistakes.
    """
    options = read_options(parsed)
    with Progress() as progress:
        answer = (_compared if options.compare else _single)(options, progress.tell)
    makespan = answer.result.makespan
    if not math.isfinite(makespan):
        raise ValueError("the costs are too large: the makespan is more than a number can hold")
    if makespan < _SHORTEST:
        raise ValueError(f"the costs are too small: the makespan is {makespan:g}")
    for output in options.outputs:
        write_whole(output.path, _writer(output, answer))
    if options.json:
        from .simulate_json import to_json

        print(json.dumps(to_json(answer), allow_nan=False))
    else:
        from .simulate_text import print_answer, print_written

        print_answer(answer)
        print_written(answer, options.outputs)
    return 0


def _writer(output: Output, answer: Answer) -> Callable[[Path], object]:
    unit = answer.memory_unit
    if output.flag == "--plot":
        from ..parallel.simulate.draw.pictures import save_picture

        return lambda path: save_picture(answer.result, answer.memories, path, memory_unit=unit)
    if output.flag == "--trace":
        from ..parallel.simulate.draw.trace import save_trace

        return lambda path: save_trace(answer.result, answer.memories, path, memory_unit=unit)
    from ..parallel.schedule import save

    return lambda path: save(answer.result.plan, path)


def _single(options: Options, tell: Callable[[str], None]) -> Answer:
    """One schedule; costs and sizes are those of its stages, but of a searched one the model's."""
    from ..parallel.simulate import Memory, memory_of, simulate

    tell(options.schedule or DEFAULT)
    schedule, found = _schedule(options)
    costs, memory = options.costs, options.memory or Memory()
    if found is not None:  # nobody could know how many stages it would have
        sizes = (schedule.num_ranks, schedule.num_stages)
        costs, memory = costs.for_ranks(*sizes), memory.for_ranks(*sizes)
    result = simulate(schedule, costs)
    return Answer(
        schedule.name,
        result,
        memory_of(result, memory),
        options.memory,
        of_model=found is not None,
        found=found,
        limited=options.memory_limit is not None,
    )


def _compared(options: Options, tell: Callable[[str], None]) -> Answer:
    """All schedules; costs and sizes are those of the model cut in as many stages as ranks."""
    from ..parallel.schedule import names
    from ..parallel.simulate.compare import compare

    chosen = options.schedule or DEFAULT
    ranks, microbatches = options.ranks, options.microbatches
    also: dict[str, Schedule] = {}
    found = None
    if chosen not in names() or ranks is None or microbatches is None:
        # A file or a search; and what is no schedule at all is an error here.
        tell(chosen)
        also[chosen], found = _schedule(options)
        ranks, microbatches = also[chosen].num_ranks, also[chosen].num_microbatches
    stages = ranks * max(2, options.stages_per_rank or 0)  # most that a named one has
    check_number(stages, 3 * stages * microbatches)
    comparison = compare(
        ranks,
        microbatches,
        options.costs,
        memory=options.memory,
        stages_per_rank=options.stages_per_rank,
        also=also,
        keep=chosen,
        tell=tell,
    )
    kept = comparison.kept
    if options.schedule is not None and kept.name != chosen:
        raise ValueError(
            next(f"{name}: {why}" for name, why in comparison.missing if name == chosen)
        )
    if not also:
        _check_transfers(options, kept.result.plan)
    return Answer(
        kept.name,
        kept.result,
        kept.memories,
        options.memory,
        of_model=True,
        comparison=comparison,
        found=found,
        limited=options.memory_limit is not None,
    )


def _schedule(options: Options) -> tuple[Schedule, SearchResult | None]:
    """The chosen schedule, checked; and what the search says of it, if it was searched."""
    from .schedules import find_schedule, require_sizes

    found = None
    if options.schedule == SEARCH:
        from ..parallel.simulate.search import search

        found = search(
            *require_sizes("a search", options.ranks, options.microbatches),
            options.costs,
            memory_limit=options.memory_limit,
            parameter_copies=options.parameter_copies,
        )
        schedule = found.schedule
    else:
        schedule = find_schedule(
            options.schedule or DEFAULT,
            ranks=options.ranks,
            microbatches=options.microbatches,
            stages_per_rank=options.stages_per_rank,
            costs=options.costs,
        )
    check_number(schedule.num_stages, sum(map(len, schedule.rows)))
    _check_transfers(options, schedule)
    return schedule, found


def _check_transfers(options: Options, schedule: Schedule) -> None:
    if options.transfers is not None:
        from ..parallel.schedule import verify

        verify(schedule, options.transfers)
