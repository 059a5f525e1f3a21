"""What `counterflow plan` found, as the table, the JSON and the page show it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ..predict.layout import Layout
    from ..predict.prediction import Prediction

GIB = 2**30


class Candidate(NamedTuple):
    """A layout of the search's table.

    Attributes:
        layout: which.
        step_ms, gpu_hours: as predicted: a step, and 1e12 tokens.
        mfu: None without a peak.
        memory_bytes: of the rank that holds most.
    """

    layout: Layout
    step_ms: float
    gpu_hours: float
    mfu: float | None
    memory_bytes: int


@dataclass(frozen=True)
class Refused:
    """Layouts that break one constraint.

    Attributes:
        constraint: which.
        count: how many.
        example: what does not fit in one of them, and what to change.
    """

    constraint: str
    count: int
    example: str


@dataclass(frozen=True)
class Searched:
    """What the search looked at.

    Attributes:
        best: the fastest first.
        layouts: of the space.
        timed: of them, that can run and were timed.
        pruned: that cannot be among the best, whether or not they can run.
        refused: the others, by what broke; those that break most first.
        seconds: that it took.
    """

    best: Sequence[Candidate]
    layouts: int
    timed: int
    pruned: int
    refused: Sequence[Refused]
    seconds: float

    @property
    def words(self) -> str:
        """What was looked at, for titles."""
        refused = sum(of.count for of in self.refused)
        parts = [f"{self.timed:,} timed", f"{refused:,} cannot run"]
        if self.pruned:
            parts.append(f"{self.pruned:,} cannot be among the best")
        return f"the best of {self.layouts:,} layouts: {', '.join(parts)}; {self.seconds:.1f} s"


@dataclass(frozen=True)
class Answer:
    """What the command prints.

    Attributes:
        prediction: of the layout that was given, or of the best.
        model: what the model is called.
        calibration: where speeds are from, in words.
        searched: None where one layout was given.
        saved: bytes that each saving of the recipe takes off the fullest rank, by its name.
        given: what the layout is from, such as "run.toml".
    """

    prediction: Prediction
    model: str
    calibration: str
    searched: Searched | None = None
    saved: dict[str, int] = field(default_factory=dict[str, int])
    given: str = "the options"

    @property
    def layout(self) -> Layout:
        """The predicted one, with the layers of its stages also where no one gave them."""
        found = self.prediction
        parts = found.layout.parts(found.model, found.result.plan.num_stages)
        return replace(found.layout, layers=tuple(len(part.layers) for part in parts))

    @property
    def over_bytes(self) -> int:
        """What the fullest rank lacks; 0 where all fits or a GPU's memory is not known."""
        found = self.prediction
        if not found.memory_bytes:
            return 0
        return max(0, found.memory[self.fullest].total - found.memory_bytes)

    @property
    def fullest(self) -> int:
        """The pipeline rank that holds most; the first of several."""
        totals = [memory.total for memory in self.prediction.memory]
        return totals.index(max(totals))
