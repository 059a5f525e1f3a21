"""The section [preflight] of a run's configuration."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass

from ..guards import require
from ..settings import option


@dataclass(frozen=True)
class PreflightConfig:
    """What is looked at on every machine before a launched run starts."""

    enabled: bool = option(
        True, "before `counterflow launch` starts the ranks, look at GPUs, links, disk, memory"
    )
    together: bool = option(
        True,
        "on several nodes, have a process of each meet first, to compare versions and clocks, to "
        "see that they share the run's folder, and to decide together which nodes are bad: what "
        "most have is no node's fault; false: each decides by itself",
    )
    bandwidth: bool = option(
        False, "also measure all-to-all and all-reduce in every node and over all of them"
    )
    baseline: str = option(
        "", "file of measured bandwidths to hold them against (doctor --save-baseline writes it)"
    )
    least_share: float = option(
        0.8,
        "of the baseline's bandwidth, without one of the median of this job's nodes, below which a "
        "node is taken for bad",
    )
    command: str = option(
        "",
        "a program with its arguments, run on every node without a shell; an exit status other "
        "than 0 makes the node bad, and the last line that it prints is the reason",
    )
    command_timeout_s: float = option(60.0, "limit of preflight.command, seconds")

    def __post_init__(self) -> None:
        share = self.least_share
        require("preflight.least_share", share, 0 < share <= 1, "above 0, to 1")
        limit = self.command_timeout_s
        require("preflight.command_timeout_s", limit, 0 < limit < math.inf, "above 0")
        if self.baseline and not self.bandwidth:
            raise ValueError(
                f"preflight.baseline={self.baseline!r} with preflight.bandwidth=false: there is "
                "nothing to hold against it; set preflight.bandwidth to true"
            )
        if self.bandwidth and not self.together:
            raise ValueError(
                "preflight.bandwidth=true with preflight.together=false: bandwidths are measured "
                "by processes that meet; set preflight.together to true"
            )
        try:
            words = shlex.split(self.command)
        except ValueError as error:
            raise ValueError(
                f"preflight.command={self.command!r} cannot be split into words: {error}"
            ) from None
        if self.command and not words:
            raise ValueError(f"preflight.command={self.command!r} names no program; leave it empty")
