"""The section [preflight] of a run's configuration."""

from __future__ import annotations

from dataclasses import dataclass

from ..guards import require
from ..settings import option


@dataclass(frozen=True)
class PreflightConfig:
    """What is looked at on every machine before a launched run starts."""

    enabled: bool = option(
        True, "before `counterflow launch` starts the ranks, look at GPUs, links, disk, versions"
    )
    bandwidth: bool = option(
        False, "also measure all-to-all and all-reduce in every node and over all of them"
    )
    baseline: str = option(
        "", "file of measured bandwidths to hold them against (doctor --save-baseline writes it)"
    )
    least_share: float = option(
        0.8, "of the baseline's bandwidth, below which a node is taken for bad"
    )

    def __post_init__(self) -> None:
        share = self.least_share
        require("preflight.least_share", share, 0 < share <= 1, "above 0, to 1")
        if self.baseline and not self.bandwidth:
            raise ValueError(
                f"preflight.baseline={self.baseline!r} with preflight.bandwidth=false: there is "
                "nothing to hold against it; set preflight.bandwidth to true"
            )
