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
from ..schedule.named.sizes import require_count
from ..schedule.tuning import Tuner, as_1f1b, shared
from .bounds import lower_bound
from .compare import tailored
from .costs import Costs
from .events import Result, simulate

# Rounding: of makespans that differ by less, the first one found is taken.
_ROUNDING = 1e-9

# Attempts on a placement, whatever their size: more find little.
_FEWEST, _MOST = 4, 200


@dataclass(frozen=True)
class SearchResult:
    """What `search` found.

    Attributes:
        schedule: the best schedule; it verifies and keeps the limits.
        makespan: its makespan, in the unit of the costs.
        found: where it comes from: a named schedule, or "greedy on ..." and a placement.
        best_named: name of the best named schedule that keeps the limits; None if none does.
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
        share = self.ranks / result.stages
        within = all(
            peak * share <= limit + _ROUNDING
            for peak, limit in zip(result.peak_chunks, self.limits, strict=True)
        )
        copies = self.parameter_copies
        return within and (copies is None or result.parameter_copies <= copies)


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

    All named schedules that keep the limits are simulated. Then a list scheduler with tuned
    priorities places the same model on a straight, a V-shaped and a bidirectional pipeline. The
    better of both is returned, so that it never loses to a named schedule. Deterministic.

    Args:
        ranks: of the pipeline.
        microbatches: micro-batches a step.
        costs: of the model cut in `ranks` stages, which may differ; placements with more stages cut
            each of them in equal parts.
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
    require_count("search", "ranks", ranks)
    require_count("search", "microbatches", microbatches)
    if parameter_copies is not None:
        require_count("search", "parameter_copies", parameter_copies)
    limits = _limits(ranks, memory_limit)
    model = _Model(ranks, microbatches, costs, limits, parameter_copies)
    costs.times(ranks)  # what is wrong with the costs themselves, is said here

    tried = 0
    bounds: dict[Placement, float] = {}
    best: tuple[float, str, Schedule] | None = None
    for name in names():
        try:
            schedule = tailored(name, ranks, microbatches, costs)
            times = model.times(schedule.num_stages)
        except ValueError:
            continue  # it does not exist for these sizes
        tried += 1
        result = model.simulate(schedule)
        if model.fits(result):
            bounds.setdefault(schedule.placement, lower_bound(schedule.placement, times))
            if best is None or result.makespan < best[0] * (1 - _ROUNDING):
                best = (result.makespan, name, schedule)
    named = best

    tuners = {label: _tuner(model, placement) for label, placement in _placements(model)}
    _tune(model, tuners, budget)
    for label, tuner in tuners.items():
        tried += tuner.made
        lanes = tuner.lanes
        bounds.setdefault(lanes.placement, lower_bound(lanes.placement, lanes.times))
        assert tuner.best is not None, "each placement was tried"
        schedule = tuner.best.schedule("search")
        makespan = model.simulate(schedule).makespan
        if best is None or makespan < best[0] * (1 - _ROUNDING):
            best = (makespan, f"greedy on a {label} pipeline", schedule)
    assert best is not None, "a straight pipeline always exists"
    makespan, found, schedule = best
    return SearchResult(
        schedule=replace(schedule, name="search"),
        makespan=makespan,
        found=found,
        best_named=named[1] if named else None,
        named_makespan=named[0] if named else math.inf,
        bound=min(bounds.values()),
        tried=tried,
    )


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
    # A chunk of either direction must fit beside one of the other.
    both = m % 2 == 0 and model.ranks % 2 == 0 and min(model.limits) >= 2
    if both and model.parameter_copies != 1:
        half = m // 2
        yield "bidirectional", Placement((ahead, ahead[::-1]), (0,) * half + (1,) * half)


def _tuner(model: _Model, placement: Placement) -> Tuner:
    stages = placement.num_stages
    share = model.ranks / stages
    times = model.times(stages)
    lanes = lay_out(placement, times, limit=model.limits, chunk=(share,) * stages)
    return Tuner(lanes, _score, 0, enough=lower_bound(placement, times))


def _score(built: Built) -> tuple[float, ...]:
    """The makespan; then what leaves room for a shorter one."""
    return (built.makespan, sum(span * span for span in built.spans))


def _tune(model: _Model, tuners: dict[str, Tuner], budget: int) -> None:
    """Share out the budget: half of it to all placements alike, half to the best of them."""
    for tuner in tuners.values():
        share = budget // 2 // len(tuners) // tuner.lanes.num_actions
        tuner.left = max(_FEWEST, min(_MOST, share))
        starts_end = tuner.left // 4
        for start in _starts(model, tuner.lanes):
            if tuner.left > starts_end:
                tuner.attempt(start)
        assert tuner.priorities is not None, "a start was tried"
        tuner.sweep(tuner.priorities)
    best = min(tuners.values(), key=lambda tuner: tuner.best_score)
    if best.best_score[0] > best.enough:
        best.left = min(_MOST, budget // 2 // best.lanes.num_actions)
        best.wander()


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
