"""All named schedules side by side, for the same model on the same ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    """A schedule and what it comes to for the compared model.

    Attributes:
        name: of a named schedule, or what the caller calls it.
        result: of its simulation.
        memories: per rank, what it holds.
    """

    name: str
    result: Result
    memories: tuple[RankMemory, ...]

    @property
    def chunks(self) -> tuple[float, ...]:
        """Per rank, `Result.peak_activations` in chunks of one of P equal stages.

        P is the number of ranks: a chunk of a stage half as long counts 1/2.
        """
        return self._shared(self.result.peak_activations)

    @property
    def held(self) -> tuple[float, ...]:
        """The same of `Result.peak_chunks`: with what W still needs."""
        return self._shared(self.result.peak_chunks)

    def _shared(self, peaks: Sequence[int]) -> tuple[float, ...]:
        return tuple(peak * self.result.ranks / self.result.stages for peak in peaks)

    def to_json(self, reference: float | None) -> dict[str, object]:
        """The entry as `--compare --json` prints it; `reference` is the makespan of 1F1B."""
        result = self.result
        return {
            "schedule": self.name,
            "stages": result.stages,
            "makespan": result.makespan,
            "ratio": None if reference is None else result.makespan / reference,
            "bubble_rate": result.bubble_rate,
            "rolling_bubble_rate": result.rolling_bubble_rate,
            "idle": list(result.idle),
            "peak_activations": list(self.chunks),
            "peak_chunks": list(self.held),
            "parameter_copies": result.parameter_copies,
            "peak_memory": [memory.peak for memory in self.memories],
        }


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
    """

    entries: tuple[Entry, ...]
    missing: tuple[Missing, ...]

    @property
    def reference(self) -> float | None:
        """The makespan of 1F1B, to which others are set in ratio; None where there is none."""
        entry = self.entry(REFERENCE)
        return None if entry is None else entry.result.makespan

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
    tell: Callable[[str], None] | None = None,
) -> Comparison:
    """Simulate every named schedule for one model.

    Args:
        ranks: of the pipeline.
        microbatches: micro-batches a step.
        costs: of the model cut in `ranks` stages; schedules with more stages cut each of them in
            equal parts.
        memory: sizes, of the same stages; None counts chunks.
        stages_per_rank: for the schedules that have this option; None: their default.
        also: further schedules, and what to call them.
        tell: called with the name of each schedule before its turn; large ones take a while.

    Raises:
        ValueError: the costs or sizes fit none of the schedules, or there is none.
    """
    costs.times(ranks)  # what is wrong with the costs themselves, is so for all
    entries: list[Entry] = []
    missing: list[Missing] = []
    for name, schedule in (*((name, None) for name in names()), *(also or {}).items()):
        if tell is not None:
            tell(name)
        try:
            made = schedule or tailored(name, ranks, microbatches, costs, stages_per_rank)
            entries.append(evaluate(name, made, costs, memory))
        except ValueError as error:
            missing.append(Missing(name, str(error).removeprefix(f"{name}: ")))
    if not entries:
        name, reason = missing[0]
        raise ValueError(f"no schedule can be simulated; {name}: {reason}")
    # Twelve digits, so that rounding errors do not order what is equally long.
    entries.sort(key=lambda entry: float(f"{entry.result.makespan:.12g}"))
    return Comparison(tuple(entries), tuple(missing))


def evaluate(name: str, schedule: Schedule, costs: Costs, memory: Memory | None = None) -> Entry:
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
    return Entry(name, result, memory_of(result, sizes))


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
