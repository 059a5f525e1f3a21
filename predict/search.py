"""The layouts that make a step fastest, of all that a cluster and its memory allow.

Layouts are looked at in the order of a bound, of what their step cannot be faster than. As soon as
that is above the step of the last of those that are kept, no other layout can take its place, and
the search ends: what it has not looked at is counted as pruned.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import NamedTuple

from ..model import ModelConfig
from .calibration import Calibration
from .cluster import Cluster
from .estimate import Estimator
from .feasible import Reason, schedule_of, size_of
from .layout import Layout
from .memory import rank_memory
from .routing import Routing
from .space import Space, candidates
from .step import quick_step
from .waterfall import ideal_ms, waterfall


class Bounded(NamedTuple):
    """Layouts that share a bound.

    Attributes:
        bound_ms: what a step of none of them can be faster than.
        layouts: makes them.
        size: how many they are.
    """

    bound_ms: float
    layouts: Callable[[], Iterable[Layout]]
    size: int


class Ranked(NamedTuple):
    """A layout and the time of its step."""

    step_ms: float
    layout: Layout


@dataclass
class Ranking:
    """What `rank` finds.

    Attributes:
        best: the fastest, in order.
        num_evaluated: layouts that were timed.
        num_pruned: layouts that cannot be among the best, by their bound; whether they can be at
            all was not asked.
        infeasible: number of layouts that break each constraint, by its key.
        reasons: an example of each.
    """

    best: list[Ranked] = field(default_factory=list[Ranked])
    num_evaluated: int = 0
    num_pruned: int = 0
    infeasible: Counter[str] = field(default_factory=Counter[str])
    reasons: dict[str, Reason] = field(default_factory=dict[str, Reason])


Progress = Callable[[int, int], None]
"""Is told how many layouts are done with, and of how many."""


def rank(
    groups: Iterable[Bounded],
    consider: Callable[[Layout], float | Reason],
    *,
    keep: int = 10,
    prune: bool = True,
    progress: Progress | None = None,
) -> Ranking:
    """The `keep` fastest layouts.

    Pruning loses none of them: groups come by rising bounds, and once one's bound is at least the
    step of the last that is kept, so is every later layout's step. Layouts with equal steps are
    kept in the order in which they come, with or without pruning. Of those that take as long with
    any number of SMs for communication, nothing running beside it, the first one is kept.

    Args:
        groups: of layouts.
        consider: the step of a layout, ms, no less than its bound; or why it cannot be.
        keep: how many, 1 or more.
        prune: leave out what cannot be among the best.
        progress: told now and then.
    """
    ordered = sorted(groups, key=lambda group: group.bound_ms)
    total = sum(group.size for group in ordered)
    found = Ranking()
    done = 0
    for group in ordered:
        full = len(found.best) == keep
        if prune and full and group.bound_ms >= found.best[-1].step_ms:
            found.num_pruned = total - done
            break
        for layout in group.layouts():
            result = consider(layout)
            if isinstance(result, Reason):
                found.infeasible[result.key] += 1
                found.reasons.setdefault(result.key, result)
                continue
            found.num_evaluated += 1
            if any(_twins(one, result, layout) for one in found.best):
                continue
            bisect.insort_right(found.best, Ranked(result, layout), key=lambda one: one.step_ms)
            del found.best[keep:]
        done += group.size
        if progress is not None:
            progress(done, total)
    return found


def _twins(one: Ranked, step_ms: float, layout: Layout) -> bool:
    """Whether a layout differs from one that is kept in nothing that counts."""
    same = one.step_ms == step_ms
    return same and replace(one.layout, comm_sms=None) == replace(layout, comm_sms=None)


@dataclass(frozen=True)
class Found:
    """One of the best layouts.

    Attributes:
        layout: with its cut.
        step_ms: simulated whole.
        memory_bytes: of the pipeline rank that takes most.
        mfu: model FLOPs utilisation.
        limit: what adds most to the ideal step.
    """

    layout: Layout
    step_ms: float
    memory_bytes: int
    mfu: float
    limit: str

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks."""
        return self.layout.tokens_per_step / self.step_ms * 1e3


@dataclass(frozen=True)
class SearchResult:
    """What `search` finds.

    Attributes:
        best: the fastest layouts, in order.
        num_layouts: of the space.
        num_evaluated: that were timed.
        num_pruned: that cannot be among the best, whether or not they can be.
        infeasible: number of layouts that break each constraint, of those that were looked at.
        reasons: an example of each.
        seconds: that it took.
    """

    best: tuple[Found, ...]
    num_layouts: int
    num_evaluated: int
    num_pruned: int
    infeasible: Mapping[str, int]
    reasons: Mapping[str, Reason]
    seconds: float


def search(
    model: ModelConfig,
    cluster: Cluster,
    calibration: Calibration,
    *,
    gpus: int,
    batch_sequences: int,
    length: int,
    space: Space | None = None,
    routing: Routing | None = None,
    keep: int = 10,
    prune: bool = True,
    progress: Progress | None = None,
) -> SearchResult:
    """The layouts of a space whose steps are fastest.

    Layouts are compared by `Estimator.step_ms`, each with an even cut. Those that are kept get the
    cut that suits them best, and are simulated whole and put in order again.

    Args:
        model: that is trained.
        cluster: on what.
        calibration: how fast that is.
        gpus: how many of the cluster.
        batch_sequences: of a step, over all ranks.
        length: of a sequence, tokens.
        space: what to choose from; None: all of `Space`.
        routing: how uneven tokens fall on ranks; None: balanced.
        keep: how many of the best are told.
        prune: leave out what cannot be among them.
        progress: told now and then.

    Raises:
        ValueError: a number that cannot be, or a cluster with fewer GPUs.
    """
    for name, value in (
        ("gpus", gpus),
        ("batch_sequences", batch_sequences),
        ("length", length),
        ("keep", keep),
    ):
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")
    cluster.check_gpus(gpus)
    space = space or Space()
    started = monotonic()
    found = candidates(
        model, cluster, space, gpus=gpus, batch_sequences=batch_sequences, length=length
    )
    ranking, chosen = Ranking(), list[Layout]()
    if found.layouts:
        estimator = Estimator(model, cluster, calibration, found.layouts[0], routing)
        groups = [_group(space, estimator, layout) for layout in found.layouts]
        consider = _Considered(estimator)
        ranking = rank(groups, consider, keep=keep, prune=prune, progress=progress)
        chosen = [estimator.refined(estimator.cut(one.layout)) for one in ranking.best]
    best = [_found(model, cluster, layout, calibration, routing) for layout in chosen]
    return SearchResult(
        best=tuple(sorted(best, key=lambda one: one.step_ms)),
        num_layouts=len(found.layouts) * space.num_variants + found.infeasible.total(),
        num_evaluated=ranking.num_evaluated,
        num_pruned=ranking.num_pruned,
        infeasible=found.infeasible + ranking.infeasible,
        reasons={**ranking.reasons, **found.reasons},
        seconds=monotonic() - started,
    )


class _Considered:
    """Why a layout cannot be, or its step; what does not depend on all of it is kept."""

    def __init__(self, estimator: Estimator) -> None:
        self._estimator = estimator
        self._memory: dict[Layout, Reason | None] = {}

    def __call__(self, layout: Layout) -> float | Reason:
        estimator = self._estimator
        reason = estimator.why_not(layout)
        if reason is not None:
            return reason
        layout = estimator.cut(layout)
        key = replace(layout, comm_sms=None)  # which SMs communicate takes no memory
        if key not in self._memory:
            self._memory[key] = estimator.why_no_memory(layout)
        return self._memory[key] or estimator.step_ms(layout)


def _group(space: Space, estimator: Estimator, layout: Layout) -> Bounded:
    bound = estimator.bound_ms(layout)
    return Bounded(bound, lambda: space.variants(layout), space.num_variants)


def _found(
    model: ModelConfig,
    cluster: Cluster,
    layout: Layout,
    calibration: Calibration,
    routing: Routing | None,
) -> Found:
    """A layout simulated whole."""
    quick = quick_step(model, cluster, layout, calibration, routing)
    schedule = schedule_of(*size_of(layout))
    assert not isinstance(schedule, str), schedule
    shares = waterfall(
        model, cluster, layout, calibration, schedule, quick.stages, step_ms=quick.step_ms
    )
    most = max(shares[1:], key=lambda share: share.ms)
    return Found(
        layout=layout,
        step_ms=quick.step_ms,
        memory_bytes=max(rank.total for rank in rank_memory(model, layout, schedule)),
        mfu=ideal_ms(model, cluster, layout) / quick.step_ms,
        limit=f"{most.name}: {most.why}",
    )
