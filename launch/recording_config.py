"""The section of a configuration that says what to record traces of. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from .guards import require
from .ranges import Range, parse_ranges
from .settings import option


@dataclass(frozen=True)
class ProfileConfig:
    """Traces of training steps, by torch's profiler."""

    steps: str | None = option(
        None,
        "steps to record, from 1, such as 5, 5-7 or 3,8-9, a file a rank and stretch of steps in "
        "FOLDER/NAME/traces for `counterflow profile`; --profile for short; none: no step",
    )
    ranks: str = option("all", "ranks that record, such as 0 or 0,8-11; all: every one")

    def __post_init__(self) -> None:
        if self.steps is not None:
            first = _ranges("profile.steps", self.steps, "5, 5-7 or 3,8-9")[0].first
            require("profile.steps", self.steps, first >= 1, "steps from 1 up")
        if self.ranks != "all":
            _ranges("profile.ranks", self.ranks, "all, 0 or 0,8-11")

    @property
    def stretches(self) -> tuple[Range, ...]:
        """The steps to record, each stretch of neighbours for itself."""
        return () if self.steps is None else parse_ranges(self.steps)

    @property
    def recording(self) -> tuple[Range, ...] | None:
        """The ranks that record; None for all."""
        return None if self.ranks == "all" else parse_ranges(self.ranks)

    def records(self, rank: int) -> bool:
        """Whether this rank records, if there is a step to record."""
        ranges = self.recording
        return ranges is None or any(each.first <= rank <= each.last for each in ranges)


def _ranges(key: str, text: str, examples: str) -> tuple[Range, ...]:
    try:
        return parse_ranges(text)
    except ValueError as error:
        raise ValueError(f"{key}: {error}; give {examples}") from None
