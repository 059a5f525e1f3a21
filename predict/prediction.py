"""The values that a prediction gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..model import ModelConfig
from ..parallel.simulate import Result
from .cluster import Cluster
from .layout import Layout
from .times import LayerTimes


class RankTime(NamedTuple):
    """Where a pipeline rank's step goes, ms, the mean over its data-parallel ranks.

    The sum is the step.

    Attributes:
        forward: F alone.
        backward: B and I alone.
        weight: W alone.
        paired: forwards and backwards that overlap.
        bubble: nothing runs: waiting for other pipeline ranks.
        reduce: gradients over data-parallel ranks and replicas, and gathered parameters.
        optimizer: update.
    """

    forward: float
    backward: float
    weight: float
    paired: float
    bubble: float
    reduce: float
    optimizer: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self)


class Share(NamedTuple):
    """A piece of the way from the ideal step to the predicted one.

    Attributes:
        name: such as "exposed communication".
        ms: that it adds; negative where it takes away.
        why: one sentence, with its source.
    """

    name: str
    ms: float
    why: str


class Note(NamedTuple):
    """What a reader of the prediction must know.

    Attributes:
        kind: "source": where numbers come from; "assumed": what no source determines;
            "extrapolated": far outside what was calibrated.
        text: what; for an assumption also how much it matters.
    """

    kind: Literal["source", "assumed", "extrapolated"]
    text: str


@dataclass(frozen=True)
class RankMemory:
    """Bytes of a pipeline rank by category.

    Attributes:
        parts: by category, in the order of `memory.CATEGORIES`, on the device.
        host: in the host's memory: the parameters' moving average, and `staging`.
        staging: of it, the copy that a checkpoint is written from while training goes on.
    """

    parts: Mapping[str, int]
    host: int
    staging: int = 0

    @property
    def total(self) -> int:
        """On the device."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Prediction:
    """What a step will take.

    Attributes:
        model, cluster, layout: of what.
        result: the simulation of one pipeline, whose makespan is without the random part.
        stages: per stage its layers' times.
        step_ms: the whole step, with routing's imbalance and jitter.
        ranks: per pipeline rank.
        waterfall: from the ideal step; the sum is `step_ms`. The first entry is the ideal itself:
            all model FLOPs at the peak.
        memory: per pipeline rank.
        memory_bytes: of a GPU; 0 where unknown.
        mfu: model FLOPs utilisation (`model.flops`); None without a peak.
        notes: sources, assumptions, extrapolations.
        limit: in a sentence, what to change first.
    """

    model: ModelConfig
    cluster: Cluster
    layout: Layout
    result: Result
    stages: tuple[tuple[LayerTimes, ...], ...]
    step_ms: float
    ranks: tuple[RankTime, ...]
    waterfall: tuple[Share, ...]
    memory: tuple[RankMemory, ...]
    memory_bytes: int
    mfu: float | None
    notes: tuple[Note, ...]
    limit: str

    @property
    def tokens_per_second(self) -> float:
        """Of all ranks."""
        return self.layout.tokens_per_step / self.step_ms * 1e3

    @property
    def gpu_hours_per_trillion(self) -> float:
        """GPU hours for 1e12 tokens."""
        return 1e12 / self.tokens_per_second / 3600 * self.layout.world_size

    @property
    def fits(self) -> bool:
        """Whether every rank fits; True where the memory of a GPU is not known."""
        return not self.memory_bytes or all(m.total <= self.memory_bytes for m in self.memory)
