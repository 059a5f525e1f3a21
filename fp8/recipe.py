"""Which numbers are quantised, how, and what is kept for the backward: one value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from .carried import carried
from .formats import E4M3, E5M2, TILE, Quantized, tiles_in
from .products import BACKENDS, Backend
from .quantize import (
    quantize_blocks,
    quantize_both,
    quantize_columns,
    quantize_tensor,
    quantize_tiles,
    transpose_tiles,
)
from .quantize_reference import pad_groups

Scales = Literal["power_of_two", "float32"]
Granularity = Literal["tile", "block", "tensor"]
Format = Literal["e4m3", "e5m2"]

_FORMATS = {"e4m3": E4M3, "e5m2": E5M2}


class NonFiniteError(ValueError):
    """A tensor on its way into FP8 holds an infinity or NaN."""


@dataclass(frozen=True)
class Recipe:
    """DeepSeek-V3's recipe (arXiv 2412.19437, section 3.3), and what it is compared with.

    Attributes:
        scales: "power_of_two", which makes turning 1x128 into 128x1 exact, or "float32". What comes
            in FP8 keeps the scales it has, since others would round it again.
        activations: what shares a scale in an input: "tile" 1x128, or "tensor".
        gradients: the same in the gradient of an output; "block" (128x128) makes training diverge
            (appendix B.2).
        weights: "block" 128x128, or "tensor".
        gradient_format: "e4m3", or "e5m2" as in hybrid recipes.
        backend: which products to take, one of `products.BACKENDS` or an object; "auto" is the
            fastest that fits. Whether it is installed is asked by the first product.
        e5m6: keep attention's output in E5M6 (12 bits), once for attention's own backward and for
            the linear after it. Read by models, whose attention packs it and has it carry how to
            make it again (see `carried`); the layers of this package do not ask.
        check: look for infinities and NaN in all that is quantised, and name the layer; stops a
            GPU's host at each look.

    Raises:
        ValueError: a value that does not exist, by name.
    """

    scales: Scales = "power_of_two"
    activations: Granularity = "tile"
    gradients: Granularity = "tile"
    weights: Granularity = "block"
    gradient_format: Format = "e4m3"
    backend: str | Backend = "auto"
    e5m6: bool = True
    check: bool = False

    def __post_init__(self) -> None:
        allowed = {
            "scales": get_args(Scales),
            "activations": ("tile", "tensor"),
            "gradients": get_args(Granularity),
            "weights": ("block", "tensor"),
            "gradient_format": get_args(Format),
        }
        for name, choices in allowed.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        if not isinstance(self.backend, Backend) and self.backend not in BACKENDS:
            raise ValueError(
                f"backend must be one of {', '.join(BACKENDS)}, or a Backend object, got "
                f"{self.backend!r}"
            )
        for name in ("e5m6", "check"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")

    @property
    def power_of_two(self) -> bool:
        """Whether scales are powers of two."""
        return self.scales == "power_of_two"

    @property
    def gradient_dtype(self) -> torch.dtype:
        """The FP8 format of gradients."""
        return _FORMATS[self.gradient_format]

    def weight(self, weight: Tensor) -> Quantized:
        """A weight [..., N, K] for the product with inputs; its `mT` for that with gradients."""
        quantize = quantize_blocks if self.weights == "block" else quantize_tensor
        return quantize(weight, power_of_two=self.power_of_two)

    def activation(self, x_MK: Tensor, name: str) -> Quantized:
        """An input, for the forward product; tiles that it carries are taken as they are."""
        tiles = _carried_tiles(x_MK, E4M3)
        if self.activations == "tensor":
            tiles = as_tiles(quantize_tensor(x_MK, power_of_two=self.power_of_two))
        elif tiles is None:
            tiles = quantize_tiles(x_MK, power_of_two=self.power_of_two)
        return self.checked(tiles, name, "input")

    def activation_columns(self, tiles: Quantized, counts: Sequence[int] | None) -> Quantized:
        """The input that `activation` gave, for the weight gradient's product."""
        if self.activations == "tensor":
            return _turned(tiles, counts)
        return transpose_tiles(tiles, counts, power_of_two=self.power_of_two)

    def gradient(
        self, grad_MN: Tensor, counts: Sequence[int] | None, name: str, *, columns: bool
    ) -> tuple[Quantized, Quantized | None]:
        """An output's gradient for the input gradient's product and, if asked for, the weight's.

        Tiles of the recipe's format that the gradient carries, as they came over the network, are
        taken as they are. Blocks concern the input gradient alone, as in the paper's experiment.
        """
        dtype, power = self.gradient_dtype, self.power_of_two
        tiles, across = _carried_tiles(grad_MN, dtype), None
        if self.gradients == "tensor":
            tiles = as_tiles(quantize_tensor(grad_MN, dtype=dtype, power_of_two=power))
            across = _turned(tiles, counts) if columns else None
        elif self.gradients == "block":
            tiles = as_tiles(quantize_blocks(grad_MN, dtype=dtype, power_of_two=power))
        elif tiles is None and columns:
            tiles, across = quantize_both(grad_MN, counts, dtype=dtype, power_of_two=power)
        if tiles is None:
            tiles = quantize_tiles(grad_MN, dtype=dtype, power_of_two=power)
        if columns and across is None:
            across = quantize_columns(grad_MN, counts, dtype=dtype, power_of_two=power)
        return self.checked(tiles, name, "gradient of the output"), across

    def checked(self, q: Quantized, name: str, what: str) -> Quantized:
        """`q`, if all of it is finite or nobody wants to know; `name` is the layer's."""
        if self.check and not bool(q.scales.float().isfinite().all()):
            where = q.scales.float().isfinite().logical_not().nonzero()[0].tolist()
            raise NonFiniteError(
                f"{name}: the {what} [{', '.join(map(str, q.values.shape))}] holds an infinity or "
                f"NaN, first under scale {where}; look at where it comes from, or lower the "
                "learning rate"
            )
        return q


def as_tiles(q_MK: Quantized) -> Quantized:
    """The same numbers with a scale for each tile of 1x128, whatever shared one before."""
    rows, columns = q_MK.values.shape
    scales = q_MK.scales
    if len(scales) != rows:
        scales = scales.repeat_interleave(TILE, dim=0)[:rows] if len(scales) > 1 else scales
    return Quantized(q_MK.values, scales.expand(rows, tiles_in(columns)).contiguous())


def _turned(q_MK: Quantized, counts: Sequence[int] | None) -> Quantized:
    """The transpose, groups padded as in `quantize_columns`, of tiles that all have one scale."""
    codes_PK = pad_groups(q_MK.values.view(torch.uint8), counts)
    values_KP = codes_PK.t().contiguous().view(q_MK.values.dtype)
    columns, padded = values_KP.shape
    scales = q_MK.scales.new_ones(columns, padded // TILE)
    if len(q_MK.scales):
        scales *= q_MK.scales[0, 0]
    return Quantized(values_KP, scales)


def _carried_tiles(x_MD: Tensor, dtype: torch.dtype) -> Quantized | None:
    """What `x_MD` carries, if that is tiles of this format."""
    tiles = carried(x_MD).tiles
    if tiles is None or tiles.values.dtype != dtype or tiles.values.shape != x_MD.shape:
        return None
    rows, columns = x_MD.shape
    return tiles if tuple(tiles.scales.shape) == (rows, tiles_in(columns)) else None
