"""How layers are made, apart from their sizes: numbers, device, and what is computed twice."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from ..fp8.linear import Call
from ..fp8.recipe import Recipe
from ..fp8.weights import QuantizedWeight


@dataclass(frozen=True)
class Recompute:
    """What the backward makes again rather than keeps (arXiv 2412.19437, section 3.2.3).

    Attributes:
        norms: outputs of RMSNorms.
        up_projections: queries, keys and values, from the compressed latents.
    """

    norms: bool = False
    up_projections: bool = False


@dataclass(frozen=True)
class Build:
    """What all layers of a model share.

    Attributes:
        dtype: of activations, and of weights that are not multiplied in FP8.
        device: of the weights.
        recipe: how linear layers are computed in FP8, whose weights are then float32 masters; None
            keeps them in `dtype`. Embedding, head, router, norms and the attention core are never
            in FP8 (section 3.3.1).
        recompute: what is not kept for the backward.
    """

    dtype: torch.dtype = torch.float32
    device: torch.device | None = None
    recipe: Recipe | None = None
    recompute: Recompute = field(default_factory=Recompute)

    def weight(self, *shape: int, fp8: bool = False) -> nn.Parameter:
        """A weight without values; `fp8`: of a product that the recipe covers."""
        dtype = self.dtype
        if fp8 and self.recipe is not None:
            dtype = torch.promote_types(dtype, torch.float32)
        return nn.Parameter(torch.empty(shape, dtype=dtype, device=self.device))

    def call(self) -> Call | None:
        """What a product in FP8 needs besides tensors; None without a recipe."""
        return None if self.recipe is None else Call(self.recipe, QuantizedWeight())
