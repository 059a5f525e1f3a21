"""The section of a configuration that orders the phases of a step. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from ..parallel.schedule.interleaving import (
    BACKWARD_ORDER,
    FORWARD_ORDER,
    PUBLISHED_ORDER,
    Interleaving,
    InterleavingError,
)
from .guards import require
from .settings import option


@dataclass(frozen=True)
class OverlapConfig:
    """In which order phases are issued, so that communication hides behind compute.

    See `Interleaving` for what an order means.
    """

    enabled: bool = option(
        True,
        "run stages phase by phase, communication beside compute; false runs each in one piece. "
        "Numbers are the same to the last bit",
    )
    pair: tuple[str, ...] = option(
        PUBLISHED_ORDER,
        "of a forward and a backward that the schedule pairs; empty runs them one after the other",
    )
    forward: tuple[str, ...] = option(FORWARD_ORDER, "of a forward alone")
    backward: tuple[str, ...] = option(BACKWARD_ORDER, "of a backward alone")

    def __post_init__(self) -> None:
        known = isinstance(self.enabled, bool)
        require("overlap.enabled", repr(self.enabled), known, "True or False")
        for key in ("pair", "forward", "backward"):
            try:
                Interleaving(**{key: getattr(self, key)})
            except InterleavingError as error:
                reason = str(error).removeprefix("interleaving: ")
                raise ValueError(f"overlap.{key}: {reason}") from None

    @property
    def interleaving(self) -> Interleaving | None:
        """The orders as a value; None where nothing is to overlap."""
        return Interleaving(self.pair, self.forward, self.backward) if self.enabled else None
