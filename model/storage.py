"""In which numbers a model's weights and activations are kept. No torch needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .build import Build

_FLOAT = 4  # bytes of a float32


@dataclass(frozen=True)
class Storage:
    """What `Build` says of memory, in whole bytes.

    Attributes:
        itemsize: bytes of a number of the model's dtype.
        fp8: linear layers compute in FP8 (arXiv 2412.19437, section 3.3): their weights are float32
            at least, with an FP8 form beside, and they keep their inputs in FP8.
        e5m6: the linear layer after attention keeps its input in E5M6 instead; only with `fp8`.
        norms, up_projections: as of `Recompute`: what is made again and not kept.

    Raises:
        ValueError: E5M6 without FP8.
    """

    itemsize: int
    fp8: bool = False
    e5m6: bool = False
    norms: bool = False
    up_projections: bool = False

    def __post_init__(self) -> None:
        if self.e5m6 and not self.fp8:
            raise ValueError("E5M6 is a form of FP8's recipe; compute in FP8, or turn it off")

    @property
    def wide(self) -> int:
        """Bytes of a number of what is never below float32."""
        return max(self.itemsize, _FLOAT)

    @classmethod
    def of(cls, build: Build) -> Storage:
        """Of layers that are made so."""
        return cls(
            build.dtype.itemsize,
            fp8=build.recipe is not None,
            e5m6=build.recipe is not None and build.recipe.e5m6,
            norms=build.recompute.norms,
            up_projections=build.recompute.up_projections,
        )
