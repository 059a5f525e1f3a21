"""The section [guard] of a run's configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..guards import require, require_choice
from ..settings import option

OnNan = Literal["stop", "skip", "rollback"]
OnSpike = Literal["ignore", "skip", "rollback", "stop"]


@dataclass(frozen=True)
class GuardConfig:
    """What happens at a step whose loss or gradient norm is not finite, or whose loss spikes."""

    on_nan: OnNan = option(  # noqa: RUF009  a Literal is immutable
        "stop",
        "a loss or gradient norm that is not finite: stop: end with an error; skip: no update from "
        "this batch; rollback: back to the last checkpoint, and on without the batches since then",
    )
    on_spike: OnSpike = option(  # noqa: RUF009
        "ignore", "a loss far above those before it: ignore, or as guard.on_nan"
    )
    spike_sigma: float = option(
        6.0, "a spike: above the mean of the losses before by this many standard deviations"
    )
    window: int = option(100, "losses that mean and standard deviation are of, the last ones")
    max_events: int = option(10, "steps skipped or rolled back in a run before it stops")

    def __post_init__(self) -> None:
        require_choice("guard.on_nan", self.on_nan, OnNan)
        require_choice("guard.on_spike", self.on_spike, OnSpike)
        sigma = self.spike_sigma
        require("guard.spike_sigma", sigma, 0 < sigma < math.inf, "above 0")
        require("guard.window", self.window, self.window >= 2, "2 or more")
        require("guard.max_events", self.max_events, self.max_events >= 0, "0 or more")
