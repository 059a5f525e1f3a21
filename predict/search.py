"""The layouts that make a step fastest, of all that a cluster and its memory allow.

Layouts that share a schedule are a family. Within one they are looked at in the order of a bound,
of what their step cannot be faster than. As soon as that is no less than the step of the last of
those that are kept, no other layout of the family can take its place: what is left of it is counted
as pruned. The others are timed together.
"""

from __future__ import annotations

import bisect
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import NamedTuple

from ..model import ModelConfig
from .calibration import Calibration
from .cluster import Cluster
from .estimate import Estimator
from .feasible import Reason, keep_nearest, schedule_of, size_of
from .layout import Layout
from .memory import rank_memory
from .routing import Routing
from .space import Candidates, Space, candidates
from .step import device_of, limit_of, quick_step
from .waterfall import ideal_ms, waterfall

_TOGETHER = 256  # layouts that are timed at once, at most
_ROUNDING = 1e-9  # by which equal steps may differ, relative


class Bounded(NamedTuple):
    """A layout and what its step cannot be faster than."""

    bound_ms: float
    layout: Layout


class Ranked(NamedTuple):
    """A layout and the time of its step."""

    step_ms: float
    layout: Layout


@dataclass
class Ranking:
    """What `rank` finds.

    Attributes:
        best: the fastest, in order.
        num_evaluated: layouts that were timed; they can be.
        num_pruned: layouts that cannot be among the best, by their bound; whether they can be at
            all was not asked.
        infeasible: number of layouts that break each constraint, by its key.
        reasons: an example of each, of memory what lacks least.
    """

    best: list[Ranked] = field(default_factory=list[Ranked])
    num_evaluated: int = 0
    num_pruned: int = 0
    infeasible: Counter[str] = field(default_factory=Counter[str])
    reasons: dict[str, Reason] = field(default_factory=dict[str, Reason])


Progress = Callable[[int, int], None]
"""Is told how many layouts are done with, and of how many."""


def rank(
    families: Iterable[Sequence[Bounded]],
    why_not: Callable[[Layout], Reason | None],
    steps_ms: Callable[[Sequence[Layout]], Sequence[float]],
    *,
    keep: int = 10,
    prune: bool = True,
    progress: Progress | None = None,
) -> Ranking:
    """The `keep` fastest layouts.

    Pruning loses none of them: once a layout's bound is at least the step of the last that is kept,
    so is its step, and that of all that follow in its family. Layouts with equal steps are kept in
    the order in which they come, with or without pruning; of those that differ in nothing but how
    rows get to experts, and take as long, the first one.

    Args:
        families: layouts that are timed together.
        why_not: why a layout cannot be; None where it can.
        steps_ms: steps of layouts of one family, none less than its bound.
        keep: how many, 1 or more.
        prune: leave out what cannot be among the best.
        progress: told now and then.
    """
    ordered = [sorted(one, key=lambda member: member.bound_ms) for one in families if one]
    ordered.sort(key=lambda family: family[0].bound_ms)
    total, done = sum(map(len, ordered)), 0
    found = Ranking()
    for family in ordered:
        place = 0
        while place < len(family):
            most = _last_kept(found, keep) if prune else math.inf
            taken: list[Layout] = []
            start = place
            while place < len(family) and len(taken) < _TOGETHER:
                bound_ms, layout = family[place]
                if bound_ms >= most:
                    break
                place += 1
                reason = why_not(layout)
                if reason is None:
                    taken.append(layout)
                else:
                    found.infeasible[reason.key] += 1
                    keep_nearest(found.reasons, reason)
            if place == start:  # what is left cannot be among the best
                found.num_pruned += len(family) - place
                break
            if taken:
                _keep(found, steps_ms(taken), taken, keep)
        done += place
        if progress is not None:
            progress(done + found.num_pruned, total)
    return found


def _last_kept(found: Ranking, keep: int) -> float:
    return found.best[-1].step_ms if len(found.best) == keep else math.inf


def _keep(found: Ranking, steps: Sequence[float], layouts: Sequence[Layout], keep: int) -> None:
    """Put those layouts among the best that belong there."""
    found.num_evaluated += len(layouts)
    for step_ms, layout in zip(steps, layouts, strict=True):
        if step_ms >= _last_kept(found, keep) or any(
            _twins(one, step_ms, layout) for one in found.best
        ):
            continue
        bisect.insort_right(found.best, Ranked(step_ms, layout), key=lambda one: one.step_ms)
        del found.best[keep:]


def _twins(one: Ranked, step_ms: float, layout: Layout) -> bool:
    """Whether a layout differs from one that is kept in nothing that counts."""
    if not math.isclose(one.step_ms, step_ms, rel_tol=_ROUNDING):
        return False
    return _without_exchange(one.layout) == _without_exchange(layout)


def _without_exchange(layout: Layout) -> Layout:
    return replace(layout, comm_sms=None, dispatcher="flat", payload="exact")


@dataclass(frozen=True)
class Found:
    """One of the best layouts.

    Attributes:
        layout: with its cut.
        step_ms: simulated whole.
        memory_bytes: of the pipeline rank that takes most.
        mfu: model FLOPs utilisation.
        limit: what adds most to the step, of what a layout can change.
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
    num_layouts = len(found.layouts) * space.num_variants + found.infeasible.total()
    ranking, chosen = Ranking(), list[Layout]()
    if found.layouts:
        estimator = Estimator(model, cluster, calibration, found.layouts[0], routing)
        families = _families(space, estimator, found)
        ranking = rank(
            families,
            estimator.why_not,
            estimator.steps_ms,
            keep=keep,
            prune=prune,
            progress=progress,
        )
        chosen = [estimator.refined(estimator.cut(one.layout)) for one in ranking.best]
    for reason in ranking.reasons.values():
        keep_nearest(found.reasons, reason)
    best = [_found(model, cluster, layout, calibration, routing) for layout in chosen]
    return SearchResult(
        best=tuple(sorted(best, key=lambda one: one.step_ms)),
        num_layouts=num_layouts,
        num_evaluated=ranking.num_evaluated,
        num_pruned=ranking.num_pruned,
        infeasible=found.infeasible + ranking.infeasible,
        reasons=found.reasons,
        seconds=monotonic() - started,
    )


def _families(space: Space, estimator: Estimator, found: Candidates) -> list[list[Bounded]]:
    """The layouts with their schedules, by these; what no schedule makes fit is refused."""
    shapes: dict[tuple[int, int], list[list[Bounded]]] = {}
    for layout in found.layouts:
        reason = estimator.why_no_states(layout)
        if reason is not None:
            found.refuse(reason, space.num_variants)
            continue
        bound_ms = estimator.bound_ms(layout)
        variants = [Bounded(bound_ms, variant) for variant in space.variants(layout)]
        shapes.setdefault((layout.pp, layout.microbatches), []).append(variants)
    return [list(family) for shape in shapes.values() for family in zip(*shape, strict=True)]


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
    return Found(
        layout=layout,
        step_ms=quick.step_ms,
        memory_bytes=max(
            rank.total for rank in rank_memory(model, layout, schedule, device=device_of(cluster))
        ),
        mfu=ideal_ms(model, cluster, layout) / quick.step_ms,
        limit=limit_of(shares),
    )
