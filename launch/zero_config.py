"""The section [zero] of a run's configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .guards import require, require_choice
from .settings import option

ZeroBackend = Literal["counterflow", "deepspeed"]


@dataclass(frozen=True)
class ZeroConfig:
    """How the optimizer's states lie over data-parallel ranks."""

    stage: int = option(
        0, "0: every rank has all of its parameters' states; 1: a share of 1/dp (ZeRO-1)"
    )
    backend: ZeroBackend = option(  # noqa: RUF009  a Literal is immutable
        "counterflow", "whose ZeRO-1: this project's, or DeepSpeed's where it is installed"
    )

    def __post_init__(self) -> None:
        require("zero.stage", self.stage, self.stage in (0, 1), "0 or 1")
        require_choice("zero.backend", self.backend, ZeroBackend)
