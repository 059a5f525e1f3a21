"""Searches for a schedule: every named one, then list schedules with tuned priorities."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from ..schedule import Placement, Schedule, Times, names
from ..schedule.greedy import (
    EARLIER_STAGE,
    LATER_STAGE,
    OLDEST,
    Built,
    Priorities,
)
from ..schedule.lanes import Lanes, lay_out
from ..schedule.named.catalogue import options
from ..schedule.named.sizes import require_counts
from ..schedule.tuning import Tuner, as_1f1b, shared
from .bounds import lower_bound
from .compare import tailored
from .costs import Costs
from .events import Result, simulate

# Sums of fractions of chunks differ by this much through rounding alone.
_ROUNDING = 1e-9

# Numbers of stages a rank that are tried where a named schedule leaves the choice, and on looped
# pipelines; above the default only while the schedule has no more than so many chunks.
_STAGES_PER_RANK, _LOOPS, _MOST_CHUNKS = (2, 3, 4, 8), (2, 4), 20_000

# Attempts on a placement, whatever their size: more find little.
_FEWEST, _MOST = 4, 200


@dataclass(frozen=True)
class SearchResult:
    """What `search` found.

    Attributes:
        schedule: the best schedule; it verifies and keeps the limits.
        makespan: its makespan, in the unit of the costs.
        found: where it comes from: a named schedule, or "greedy on ..." and a placement.
        best_named: name of the best named schedule that keeps the limits, with the stages a rank
            where they are not its default; None if none does.
        named_makespan: its makespan; infinity if there is none.
        bound: no schedule on any of the placements that were tried has a smaller makespan.
        tried: number of schedules that were constructed or taken from the catalogue.
    """

    schedule: Schedule
    makespan: float
    found: str
    best_named: str | None
    named_makespan: float
    bound: float
    tried: int

    @property
    def above_bound(self) -> float:
        """How far the makespan is above the bound, as a share of the bound."""
        return self.makespan / self.bound - 1


@dataclass(frozen=True)
class _Candidate:
    """A schedule that keeps the limits, where it comes from, and what decides between them."""

    schedule: Schedule
    found: str
    makespan: float
    copies: int
    peak: float

    @property
    def key(self) -> tuple[float, int, float]:
        # Twelve digits, so that rounding errors do not decide.
        return (float(f"{self.makespan:.12g}"), self.copies, self.peak)


@dataclass(frozen=True)
class _Model:
    """What is to be scheduled, and under which limits."""

    ranks: int
    microbatches: int
    costs: Costs
    limits: tuple[float, ...]
    parameter_copies: int | None

    def times(self, stages: int) -> Times:
        return self.costs.for_ranks(self.ranks, stages).times(stages)

    def simulate(self, schedule: Schedule) -> Result:
        return simulate(schedule, self.costs.for_ranks(self.ranks, schedule.num_stages))

    def fits(self, result: Result) -> bool:
        within = all(
            peak <= limit + _ROUNDING
            for peak, limit in zip(self.held(result), self.limits, strict=True)
        )
        copies = self.parameter_copies
        return within and (copies is None or result.parameter_copies <= copies)

    def held(self, result: Result) -> list[float]:
        """Per rank, most chunks alive at once, each one P-th of the model's."""
        return [peak * self.ranks / result.stages for peak in result.peak_chunks]

    def candidate(self, schedule: Schedule, found: str) -> _Candidate | None:
        """What a schedule comes to, unless it exceeds a limit."""
        result = self.simulate(schedule)
        if not self.fits(result):
            return None
        peak = max(self.held(result))
        return _Candidate(schedule, found, result.makespan, result.parameter_copies, peak)


def search(
    ranks: int,
    microbatches: int,
    costs: Costs,
    *,
    memory_limit: float | Sequence[float] | None = None,
    parameter_copies: int | None = None,
    budget: int = 600_000,
) -> SearchResult:
    """The fastest schedule that can be found within a memory limit.

    All named schedules that keep the limits are simulated, those that leave the number of stages a
    rank open with several. Then a list scheduler with tuned priorities places the same model on a
    straight, a V-shaped, two looped and a bidirectional pipeline. The better of both is returned,
    so that it never loses to a named schedule; of equal makespans the one with fewer copies of the
    parameters, then that with the lower peak of memory. What follows the rows (reductions, the
    optimizer) counts. Deterministic.

    Args:
        ranks: of the pipeline.
        microbatches: micro-batches a step.
        costs: of the model cut in `ranks` stages, which may differ; placements with more stages cut
            them finer (`Costs.for_ranks`), and those for which they cannot be cut are left out.
        memory_limit: most chunks that are alive on each rank, or on every rank, at once: one P-th
            of the model's share of a micro-batch, from its F until its B or W has ended. None: no
            limit.
        parameter_copies: most ranks that may hold any one stage; 1 leaves out bidirectional
            pipelines. None: no limit.
        budget: how many actions the list scheduler may place, over all its attempts; each
            placement gets at least a few attempts.

    Raises:
        ValueError: a size, a limit or the costs are impossible.
    """
    copies = {} if parameter_copies is None else {"parameter_copies": parameter_copies}
    require_counts("search", ranks=ranks, microbatches=microbatches, **copies)
    limits = _limits(ranks, memory_limit)
    model = _Model(ranks, microbatches, costs, limits, parameter_copies)
    costs.times(ranks)  # what is wrong with the costs themselves, is said here

    named: list[_Candidate] = []
    bounds: dict[Placement, float] = {}
    tried = 0
    for schedule, found in _named(model):
        tried += 1
        candidate = model.candidate(schedule, found)
        if candidate is not None:
            named.append(candidate)
            times = model.times(schedule.num_stages)
            bounds.setdefault(schedule.placement, lower_bound(schedule.placement, times))

    tuners = dict(_tuners(model))
    listed = _tune(model, tuners, budget)
    for lanes in (tuner.lanes for tuner in tuners.values()):
        bounds.setdefault(lanes.placement, lower_bound(lanes.placement, lanes.times))
    best = min((*named, *listed), key=lambda candidate: candidate.key)
    best_named = min(named, key=lambda candidate: candidate.key, default=None)
    return SearchResult(
        schedule=replace(best.schedule, name="search"),
        makespan=best.makespan,
        found=best.found,
        best_named=best_named.found if best_named else None,
        named_makespan=best_named.makespan if best_named else math.inf,
        bound=min(bounds.values()),
        tried=tried + sum(tuner.made for tuner in tuners.values()),
    )


def _named(model: _Model) -> Iterator[tuple[Schedule, str]]:
    """The named schedules that exist for these sizes and costs, and what to call them."""
    chunks = model.ranks * model.microbatches
    for name in names():
        open_number = "stages_per_rank" in options(name)
        for number in _STAGES_PER_RANK if open_number else (None,):
            default = number is None or number == _STAGES_PER_RANK[0]
            if not default and (number or 1) * chunks > _MOST_CHUNKS:
                break
            try:
                schedule = tailored(name, model.ranks, model.microbatches, model.costs, number)
                model.times(schedule.num_stages)
            except ValueError:
                continue  # it does not exist for these sizes, or the costs cannot be cut so
            yield schedule, name if default else f"{name} with {number} stages a rank"


def _limits(ranks: int, given: float | Sequence[float] | None) -> tuple[float, ...]:
    if given is None:
        return (math.inf,) * ranks
    limits = tuple(given) if isinstance(given, Sequence) else (given,) * ranks
    if len(limits) != ranks:
        raise ValueError(
            f"search: memory_limit has {len(limits)} entries, but there are {ranks} ranks; give "
            "one number, or one a rank"
        )
    for rank, limit in enumerate(limits):
        if not limit >= 1:  # also of what is not a number
            raise ValueError(
                f"search: memory_limit={limit!r} of rank {rank} is too small: a rank holds at "
                "least one chunk at a time; the smallest possible limit is 1"
            )
    return tuple(map(float, limits))


def _placements(model: _Model) -> Iterator[tuple[str, Placement]]:
    """The placements that the list scheduler is tried on, and what to call them."""
    ahead, m = tuple(range(model.ranks)), model.microbatches
    yield "straight", Placement((ahead,), (0,) * m)
    if model.ranks == 1:
        return
    yield "V-shaped", Placement((ahead + ahead[::-1],), (0,) * m)
    for loops in _LOOPS:
        if loops == _LOOPS[0] or loops * model.ranks * m <= _MOST_CHUNKS:
            yield f"looped ({loops} stages a rank)", Placement((ahead * loops,), (0,) * m)
    # A chunk of either direction must fit beside one of the other.
    both = m % 2 == 0 and model.ranks % 2 == 0 and min(model.limits) >= 2
    if both and model.parameter_copies != 1:
        half = m // 2
        yield "bidirectional", Placement((ahead, ahead[::-1]), (0,) * half + (1,) * half)


def _tuners(model: _Model) -> Iterator[tuple[str, Tuner]]:
    """One for each placement for which the costs can be cut, and what its schedules are called."""
    for label, placement in _placements(model):
        stages = placement.num_stages
        try:
            times = model.times(stages)
        except ValueError:
            continue
        lanes = lay_out(
            placement, times, limit=model.limits, chunk=(model.ranks / stages,) * stages
        )
        tuner = Tuner(lanes, _score, 0, enough=lower_bound(placement, times))
        yield f"greedy on a {label} pipeline", tuner


def _score(built: Built) -> tuple[float, ...]:
    """The makespan; then what leaves room for a shorter one."""
    return (built.makespan, sum(span * span for span in built.spans))


def _tune(model: _Model, tuners: dict[str, Tuner], budget: int) -> list[_Candidate]:
    """The best of each placement: half of the budget for all alike, half for the best of them."""
    made: dict[str, _Candidate] = {}
    for label, tuner in tuners.items():
        share = budget // 2 // len(tuners) // tuner.lanes.num_actions
        tuner.left = max(_FEWEST, min(_MOST, share))
        starts_end = tuner.left // 4
        for start in _starts(model, tuner.lanes):
            if tuner.left > starts_end:
                tuner.attempt(start)
        assert tuner.priorities is not None, "a start was tried"
        tuner.sweep(tuner.priorities)
        made[label] = _simulated(model, label, tuner)
    # Simulated, because what follows the rows, such as the sum over copies, can decide.
    label = min(made, key=lambda label: made[label].key)
    best = tuners[label]
    if best.best_score[0] > best.enough:
        best.left = min(_MOST, budget // 2 // best.lanes.num_actions)
        best.wander()
        made[label] = min(made[label], _simulated(model, label, best), key=lambda made: made.key)
    return list(made.values())


def _simulated(model: _Model, label: str, tuner: Tuner) -> _Candidate:
    assert tuner.best is not None, "a start was tried"
    candidate = model.candidate(tuner.best.schedule("search"), label)
    assert candidate is not None, "the list scheduler keeps the limits"
    return candidate


def _starts(model: _Model, lanes: Lanes) -> Iterator[Priorities]:
    """Priorities to begin with, the likeliest first."""
    ranks = model.ranks
    caps: tuple[float | None, ...]
    if len(lanes.placement.routes) == 1 and lanes.num_stages == ranks:
        tapered = (as_1f1b(ranks, ranks), as_1f1b(ranks, 2 * ranks))
        caps, orders = (None,), ((LATER_STAGE, OLDEST),)
    else:
        tapered = ()
        caps = (None, ranks + 1, 0.75 * ranks, 0.5 * ranks, 2 * ranks)
        orders = (
            (LATER_STAGE, OLDEST),
            (OLDEST, OLDEST),
            (EARLIER_STAGE, OLDEST),
            (LATER_STAGE, EARLIER_STAGE),
            (OLDEST, LATER_STAGE),
        )
    times = lanes.times
    cheaper = any(b < i + w for b, i, w in zip(times.B, times.I, times.W, strict=True))
    for whole in (False, True) if cheaper else (False,):
        for priorities in tapered:
            yield replace(priorities, whole=whole)
        for (forward, backward), cap, first in product(orders, caps, (False, True)):
            if first and cap is None:
                continue  # without a limit all forwards would run before the first backward
            limit = None if cap is None else (cap,) * ranks
            yield replace(
                shared(ranks, limit),
                forward=forward,
                backward=backward,
                whole=whole,
                forward_first=first,
            )
