"""The sections of a configuration that belong to DeepSeek-V3's FP8 recipe. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .guards import require, require_choice
from .settings import option

# The names of `fp8.Recipe` and `fp8.products`, said again here, where torch is not needed.
Scales = Literal["power_of_two", "float32"]
GradientFormat = Literal["e4m3", "e5m2"]
ProductBackend = Literal[
    "auto", "reference", "emulation", "cublas", "deep_gemm", "transformer_engine", "triton"
]


@dataclass(frozen=True)
class FP8Config:
    """DeepSeek-V3's FP8 (arXiv 2412.19437, section 3.3), as `fp8.Recipe` has it."""

    enabled: bool = option(
        False,
        "compute the linear layers in FP8, forward and backward, with weights in float32; "
        "embedding, head, routers, norms and the attention core stay in train.dtype. The rest of "
        "this section then counts",
    )
    scales: Scales = option(  # noqa: RUF009
        "power_of_two", "of tiles and blocks: powers of two, or amax / largest in float32"
    )
    gradient_format: GradientFormat = option(  # noqa: RUF009
        "e4m3", "of gradients: e4m3, or e5m2 as in hybrid recipes; all else is e4m3"
    )
    backend: ProductBackend = option(  # noqa: RUF009
        "auto",
        "what computes the products; auto: on a CPU the reference, on a GPU the fastest that is "
        "installed and fits; emulation: the accumulators of Hopper's tensor cores; cublas and "
        "transformer_engine are for models without experts",
    )
    e5m6: bool = option(
        True, "keep the input of the linear after attention in E5M6 (12 bits) and not in E4M3"
    )
    check: bool = option(
        False,
        "look for infinities and NaN in all that is quantised, and end the run with the layer's "
        "name; costs a GPU some speed",
    )

    def __post_init__(self) -> None:
        require_choice("fp8.scales", self.scales, Scales)
        require_choice("fp8.gradient_format", self.gradient_format, GradientFormat)
        require_choice("fp8.backend", self.backend, ProductBackend)
        for name in ("enabled", "e5m6", "check"):
            value = getattr(self, name)
            require(f"fp8.{name}", repr(value), isinstance(value, bool), "True or False")


@dataclass(frozen=True)
class RecomputeConfig:
    """What the backward makes again rather than keeps (arXiv 2412.19437, section 3.2.3)."""

    norms: bool | None = option(None, "outputs of the RMSNorms; none: as fp8.enabled")
    up_projections: bool | None = option(
        None,
        "queries, keys and values, from the latents they are expanded from; none: as fp8.enabled",
    )

    def __post_init__(self) -> None:
        for name in ("norms", "up_projections"):
            value = getattr(self, name)
            fine = value is None or isinstance(value, bool)
            require(f"recompute.{name}", repr(value), fine, "True, False or None")
