"""The section [checkpoint] of a run's configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..guards import require, require_choice
from ..settings import option

Resume = Literal["auto", "latest", "never"]


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept of a run so that it can go on, in FOLDER/NAME/checkpoints."""

    enabled: bool = option(True, "save checkpoints, and resume from them")
    every: int = option(
        100, "steps between checkpoints, 0 for one only at the end and when the run is stopped"
    )
    keep: int = option(2, "newest checkpoints that are kept; older ones are removed")
    asynchronous: bool = option(
        True, "write while training goes on, from a copy in CPU memory; false waits for the disk"
    )
    resume: Resume = option(  # noqa: RUF009  a Literal is immutable
        "auto",
        "auto: go on with an unfinished run of this name if it trains the same (an error says what "
        "differs), else begin anew; latest: go on whatever differs; never: begin anew",
    )
    weights: str = option(
        "", "a checkpoint, or a Hugging Face folder, whose weights a new run begins with"
    )
    grace_s: float = option(
        300.0,
        "limit from SIGTERM, SIGUSR1 or SIGUSR2 to the end of the checkpoint that they ask for, "
        "seconds; then the rank ends where it stands",
    )

    def __post_init__(self) -> None:
        require("checkpoint.every", self.every, self.every >= 0, "0 or more")
        require("checkpoint.keep", self.keep, self.keep >= 1, "1 or more")
        require_choice("checkpoint.resume", self.resume, Resume)
        require("checkpoint.grace_s", self.grace_s, 0 < self.grace_s < math.inf, "above 0")
