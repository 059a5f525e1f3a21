"""Memory over time: what each rank holds of weights, gradients, optimizer state and activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

from ..schedule import Op, actions
from .amounts import ByStage, by_stage, checked, finer
from .events import Result


@dataclass(frozen=True)
class Memory:
    """Size of what a stage holds, in any one unit.

    Without arguments it counts chunks: one stage's share of one micro-batch is 1 until nothing
    needs it any more, and the rest weighs nothing.

    Attributes:
        weights, gradients, optimizer: of a stage, there from the beginning to the end of a step.
        activations: of a chunk, from the start of F to the end of B, or to the end of I.
        kept: what of them W still needs, from the end of I to the end of W; None: all.
        unit: name of the unit, such as "GiB", for pictures and tables.

    Raises:
        ValueError: a size is not a finite number from 0 up, or `kept` is more than `activations`.
    """

    weights: ByStage = 0
    gradients: ByStage = 0
    optimizer: ByStage = 0
    activations: ByStage = 1
    kept: ByStage | None = None
    unit: str = "chunks"

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self) if field.name != "unit"):
            if name != "kept" or self.kept is not None:
                object.__setattr__(self, name, checked(f"memory {name}", getattr(self, name)))

    def for_ranks(self, ranks: int, stages: int) -> Memory:
        """The same model, whose sizes are given for `ranks` stages, cut into `stages`.

        Raises:
            ValueError: `stages` is not a multiple of `ranks`.
        """

        def cut(name: str, value: ByStage) -> tuple[float, ...]:
            return finer(f"memory {name}", value, ranks, stages)

        return Memory(
            weights=cut("weights", self.weights),
            gradients=cut("gradients", self.gradients),
            optimizer=cut("optimizer", self.optimizer),
            activations=cut("activations", self.activations),
            kept=None if self.kept is None else cut("kept", self.kept),
            unit=self.unit,
        )


class Holding(NamedTuple):
    """Activations of one chunk on one rank, from `start` to `end`.

    A chunk whose backward is split has two: what goes with I, and what stays until W.
    """

    stage: int
    microbatch: int
    start: float
    end: float
    size: float


@dataclass(frozen=True)
class RankMemory:
    """What one rank holds over a step.

    Attributes:
        weights, gradients, optimizer: of all its stages, throughout.
        holdings: its activations, by their start.
        changes: (time, size) of what is taken, or given back (below 0), as the steps of the rank
            follow each other, be it at one time.
    """

    weights: float
    gradients: float
    optimizer: float
    holdings: tuple[Holding, ...]
    changes: tuple[tuple[float, float], ...]

    @property
    def static(self) -> float:
        """Weights, gradients and optimizer state together."""
        return self.weights + self.gradients + self.optimizer

    @cached_property
    def curve(self) -> tuple[tuple[float, float], ...]:
        """(time, activations held from then on), at each time of a change, from time 0."""
        points = {0.0: 0.0}
        level = 0.0
        for time, size in self.changes:
            level += size
            points[time] = level
        return tuple(points.items())

    @property
    def peak(self) -> float:
        """The most that is held at once, static parts included."""
        return self.static + max(accumulate((size for _, size in self.changes), initial=0.0))


def memory_of(result: Result, memory: Memory) -> tuple[RankMemory, ...]:
    """Per rank, what it holds over the simulated step.

    Raises:
        ValueError: the sizes do not fit the number of stages, or W would need more than there is.
    """
    stages = result.stages
    weights, gradients, optimizer, activations = (
        by_stage(f"memory {name}", getattr(memory, name), stages)
        for name in ("weights", "gradients", "optimizer", "activations")
    )
    kept = activations if memory.kept is None else by_stage("memory kept", memory.kept, stages)
    for stage, (part, whole) in enumerate(zip(kept, activations, strict=True)):
        if part > whole:
            raise ValueError(
                f"memory kept={part:g} of stage {stage} is more than its activations, {whole:g}"
            )
    placement = result.plan.placement
    found: list[RankMemory] = []
    for rank in range(result.ranks):
        held = placement.stages(rank)
        holdings, changes = _activations(result, rank, activations, kept)
        found.append(
            RankMemory(
                weights=sum(weights[stage] for stage in held),
                gradients=sum(gradients[stage] for stage in held),
                optimizer=sum(optimizer[stage] for stage in held),
                holdings=holdings,
                changes=changes,
            )
        )
    return tuple(found)


def _activations(
    result: Result, rank: int, activations: Sequence[float], kept: Sequence[float]
) -> tuple[tuple[Holding, ...], tuple[tuple[float, float], ...]]:
    """A rank's holdings by their start, and their changes in the order of its row."""
    begun: dict[tuple[int, int], float] = {}
    holdings: list[Holding] = []
    changes: list[tuple[float, float]] = []
    for step, start, end in result.spans[rank]:
        for stage, op, microbatch in actions(step):
            if op is Op.F:
                begun[stage, microbatch] = start
                changes.append((start, activations[stage]))
        for stage, op, microbatch in actions(step):
            if op is Op.F and result.plan.has_backward:
                continue
            size = activations[stage]
            if op is Op.I:
                size -= kept[stage]
            elif op is Op.W:
                size = kept[stage]
            if size:
                holdings.append(Holding(stage, microbatch, begun[stage, microbatch], end, size))
                changes.append((end, -size))
    holdings.sort(key=lambda held: (held.start, held.end))
    return tuple(holdings), tuple(changes)
