"""All named schedules side by side, for the same model on the same ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ..schedule import Schedule, build, names
from ..schedule.named.catalogue import options
from .costs import Costs
from .events import Result, simulate
from .memory import Memory, RankMemory, memory_of

REFERENCE = "1f1b"


@dataclass(frozen=True)
class Entry:
    """A schedule and what it comes to for the compared model, as one line of a table.

    Attributes:
        name: of a named schedule, or what the caller calls it.
        stages: that it cuts the model into.
        makespan, bubble_rate, rolling_bubble_rate, idle, parameter_copies: as in `Result`.
        chunks: per rank, `Result.peak_activations` in chunks of one of P equal stages, P being the
            number of ranks: a chunk of a stage half as long counts 1/2.
        held: the same of `Result.peak_chunks`: with what W still needs.
        peak_memory: per rank, the most that it holds at once.
    """

    name: str
    stages: int
    makespan: float
    bubble_rate: float
    rolling_bubble_rate: float
    idle: tuple[float, ...]
    chunks: tuple[float, ...]
    held: tuple[float, ...]
    parameter_copies: int
    peak_memory: tuple[float, ...]

    def to_json(self, reference: float | None) -> dict[str, object]:
        """The entry as `--compare --json` prints it; `reference` is the makespan of 1F1B."""
        return {
            "schedule": self.name,
            "stages": self.stages,
            "makespan": self.makespan,
            "ratio": None if reference is None else self.makespan / reference,
            "bubble_rate": self.bubble_rate,
            "rolling_bubble_rate": self.rolling_bubble_rate,
            "idle": list(self.idle),
            "model_peak_activations": list(self.chunks),
            "model_peak_chunks": list(self.held),
            "parameter_copies": self.parameter_copies,
            "peak_memory": list(self.peak_memory),
        }


@dataclass(frozen=True)
class Evaluation:
    """A schedule simulated for a model: all that there is, which for a large one is much.

    Attributes:
        name: of a named schedule, or what the caller calls it.
        result: of its simulation.
        memories: per rank, what it holds.
    """

    name: str
    result: Result
    memories: tuple[RankMemory, ...]

    def entry(self) -> Entry:
        """Its line in a comparison."""
        result = self.result
        share = result.ranks / result.stages
        return Entry(
            name=self.name,
            stages=result.stages,
            makespan=result.makespan,
            bubble_rate=result.bubble_rate,
            rolling_bubble_rate=result.rolling_bubble_rate,
            idle=result.idle,
            chunks=tuple(peak * share for peak in result.peak_activations),
            held=tuple(peak * share for peak in result.peak_chunks),
            parameter_copies=result.parameter_copies,
            peak_memory=tuple(memory.peak for memory in self.memories),
        )


class Missing(NamedTuple):
    """A schedule that does not exist for these sizes, and why, with sizes for which it does."""

    schedule: str
    reason: str


@dataclass(frozen=True)
class Comparison:
    """What `compare` finds.

    Attributes:
        entries: in the order of the makespan, equal ones as the catalogue lists them.
        missing: the schedules that could not be made or simulated.
        kept: of one of the entries, all that there is.
    """

    entries: tuple[Entry, ...]
    missing: tuple[Missing, ...]
    kept: Evaluation

    @property
    def reference(self) -> float | None:
        """The makespan of 1F1B, to which others are set in ratio; None where there is none."""
        entry = self.entry(REFERENCE)
        return None if entry is None else entry.makespan

    def entry(self, name: str) -> Entry | None:
        """The entry of this name, if there is one."""
        return next((entry for entry in self.entries if entry.name == name), None)

    def to_json(self) -> dict[str, object]:
        """What `--compare --json` prints of the comparison."""
        return {
            "schedules": [entry.to_json(self.reference) for entry in self.entries],
            "missing": [missing._asdict() for missing in self.missing],
        }


def compare(
    ranks: int,
    microbatches: int,
    costs: Costs,
    *,
    memory: Memory | None = None,
    stages_per_rank: int | None = None,
    also: Mapping[str, Schedule] | None = None,
    keep: str | None = None,
    tell: Callable[[str], None] | None = None,
) -> Comparison:
    """Simulate every named schedule for one model.

    Results of large schedules fill the memory, so that all of one only is kept.

    Args:
        ranks: of the pipeline.
        microbatches: micro-batches a step.
        costs: of the model cut in `ranks` stages; schedules with more stages cut each of them in
            equal parts.
        memory: sizes, of the same stages; None counts chunks.
        stages_per_rank: for the schedules that have this option; None: their default.
        also: further schedules, and what to call them.
        keep: name of the one to keep; None, or one that is missing: the shortest.
        tell: called with the name of each schedule before its turn; large ones take a while.

    Raises:
        ValueError: the costs or sizes fit none of the schedules, or there is none.
    """
    costs.times(ranks)  # what is wrong with the costs themselves, is so for all
    entries: list[Entry] = []
    missing: list[Missing] = []
    kept: Evaluation | None = None
    for name, schedule in (*((name, None) for name in names()), *(also or {}).items()):
        if tell is not None:
            tell(name)
        try:
            made = schedule or tailored(name, ranks, microbatches, costs, stages_per_rank)
            found = evaluate(name, made, costs, memory)
        except ValueError as error:
            missing.append(Missing(name, str(error).removeprefix(f"{name}: ")))
            continue
        entries.append(found.entry())
        if kept is None or name == keep or (kept.name != keep and _length(found) < _length(kept)):
            kept = found
    if kept is None:
        name, reason = missing[0]
        raise ValueError(f"no schedule can be simulated; {name}: {reason}")
    entries.sort(key=lambda entry: _digits(entry.makespan))
    return Comparison(tuple(entries), tuple(missing), kept)


def _length(found: Evaluation) -> float:
    return _digits(found.result.makespan)


def _digits(makespan: float) -> float:
    """Twelve digits, so that rounding errors do not order what is equally long."""
    return float(f"{makespan:.12g}")


def evaluate(
    name: str, schedule: Schedule, costs: Costs, memory: Memory | None = None
) -> Evaluation:
    """One schedule for a model whose costs and sizes are given for as many stages as ranks.

    Args:
        name: what to call it.
        schedule: any.
        costs, memory: of the model cut in as many stages as the schedule has ranks.

    Raises:
        ValueError: the stages are no multiple of the ranks, or costs or sizes do not fit them.
    """
    ranks, stages = schedule.num_ranks, schedule.num_stages
    if stages % ranks:
        raise ValueError(f"its {stages} stages are no multiple of the {ranks} ranks")
    result = simulate(schedule, costs.for_ranks(ranks, stages))
    sizes = (memory or Memory()).for_ranks(ranks, stages)
    return Evaluation(name, result, memory_of(result, sizes))


def tailored(
    name: str,
    ranks: int,
    microbatches: int,
    costs: Costs,
    stages_per_rank: int | None = None,
) -> Schedule:
    """The schedule called `name`, made for these costs if its builder goes by costs.

    Args:
        name: one of `parallel.schedule.names()`.
        ranks: of the pipeline.
        microbatches: micro-batches a step.
        costs: of the model cut in `ranks` stages.
        stages_per_rank: for the schedules that have this option; None: their default.

    Raises:
        ValueError: there is no such schedule, or not for these sizes; or the costs do not fit.
    """
    known = options(name)
    given: dict[str, object] = {}
    if "times" in known:
        given["times"] = costs.times(ranks)
    if "stages_per_rank" in known and stages_per_rank is not None:
        given["stages_per_rank"] = stages_per_rank
    return build(name, ranks=ranks, microbatches=microbatches, **given)
