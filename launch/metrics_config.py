"""The section [metrics] of a run's configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .guards import require
from .settings import option


@dataclass(frozen=True)
class MetricsConfig:
    """Where a run's numbers go, beside FOLDER/NAME/metrics.jsonl."""

    tensorboard: bool = option(True, "write TensorBoard's files where it is installed")
    wandb: bool = option(False, "send to Weights & Biases (the package wandb must be installed)")
    wandb_project: str = option("counterflow", "project of Weights & Biases")
    gpu_every: int = option(
        10,
        "steps between readings of the GPUs' power and use, and of all ranks' memory and waits; 0 "
        "for none",
    )
    peak_tflops: float | None = option(
        None,
        "dense BF16 peak of one GPU, TFLOP/s, that MFU is a share of; none: by the GPU's name, and "
        "no MFU where that is unknown",
    )

    def __post_init__(self) -> None:
        require("metrics.gpu_every", self.gpu_every, self.gpu_every >= 0, "0 or more")
        peak = self.peak_tflops
        good = peak is None or 0 < peak < math.inf
        require("metrics.peak_tflops", peak, good, "above 0, or none")
        if self.wandb and not self.wandb_project:
            raise ValueError("metrics.wandb needs a metrics.wandb_project")
