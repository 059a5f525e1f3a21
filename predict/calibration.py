"""What is known of how fast a machine really is: timed phases, or only the data sheet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..model import ModelConfig
from .cluster import Cluster
from .layout import Kind, Layout


@dataclass(frozen=True)
class Reference:
    """Phases of one kind of layer, timed.

    Attributes:
        kind: of the layer.
        model, layout: what ran.
        alone, paired: ms by phase, as of `times.LayerTimes`; phases that were not timed are not
            there.
        source: where from.
        cluster: that it ran on; None: the one that is predicted.
    """

    kind: Kind
    model: ModelConfig
    layout: Layout
    alone: Mapping[str, float] = field(hash=False)
    paired: Mapping[str, float] = field(hash=False)
    source: str
    cluster: Cluster | None = None


@dataclass(frozen=True)
class Calibration:
    """What is known of a machine's speed.

    A phase of which a reference is there takes the reference's time, times the ratio of their work
    at the peak; what has none takes its work by the shares of the peaks.

    Attributes:
        source: "trace", "measured" or "datasheet".
        name: of the file, or of the cluster.
        references: at most one of a kind.
        matmul, fp8_matmul, attention, memory: shares of the data sheet's peaks that are reached
            where no reference tells, 0 to 1; of products in FP8 less, as scales of tiles and sums
            in float32 take their time.
        contention: how much longer dispatch and combine take in a pair than alone, where no
            reference tells, on GPUs. In DeepSeek's published trace it is 1.25 to 1.8, by phase.
        pair_gaps: what a pair takes, over what its phases come to on two lanes: launches, and waits
            for other ranks; 1 or more.
        optimizer_gbps: bytes of states that the optimizer's update reads and writes a second, 1e9;
            None: memory's share of the data sheet's.
        overhead_ms: that an action takes besides its phases.
        layers: that a chunk of the reference had; 0: unknown.
        step_ms: that a step takes besides its schedule, reductions and update.
    """

    source: Literal["trace", "measured", "datasheet"]
    name: str
    references: tuple[Reference, ...] = ()
    matmul: float = 0.65
    fp8_matmul: float = 0.5
    attention: float = 0.5
    memory: float = 0.8
    contention: float = 1.4
    pair_gaps: float = 1.0
    optimizer_gbps: float | None = None
    overhead_ms: float = 0.0
    layers: int = 0
    step_ms: float = 0.0

    def reference(self, kind: Kind) -> Reference | None:
        """What was timed of a kind of layer."""
        return next((r for r in self.references if r.kind == kind), None)
