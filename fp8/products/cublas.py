"""Dense products by cuBLAS, through torch's scaled_mm with block-wise scales.

Rules of cuBLAS 12.9 and of torch's checks of them (torch.nn.functional.scaled_mm, its CUDA
implementation and its shape function): Hopper alone; one operand at most in blocks of 128x128, the
other in tiles of 1x128; not both E5M2.

Shapes: M, N rows; K summed over.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import E5M2, Quantized
from .base import Backend, Product, tile_scales
from .hopper import block_scales, dense, indivisible, row_major, why_no_gpu, why_not_hopper

_CUDA = (12, 9)


class Scaled(NamedTuple):
    """The first six arguments of `scaled_mm`.

    Attributes:
        a: [M, K], row-major.
        b: [K, N], column-major.
        scales_a, scales_b: float32. Of tiles [rows, ceil(K/128)], column-major; of blocks
            [ceil(K/128) rounded up to 4, ceil(rows/128)], column-major.
        recipe_a, recipe_b: torch.nn.functional.ScalingType.
    """

    a: Tensor
    b: Tensor
    scales_a: Tensor
    recipe_a: Any
    scales_b: Tensor
    recipe_b: Any


class Cublas(Backend):
    """cuBLAS has no accumulation here: that product is computed in float32 and added."""

    name: ClassVar[str] = "cublas"

    def missing(self) -> str | None:
        if not hasattr(F, "scaled_mm"):
            return f"torch {torch.__version__} has no scaled_mm; it takes torch 2.11 or newer"
        version = torch.version.cuda
        if version is None or tuple(int(x) for x in version.split(".")[:2]) < _CUDA:
            return (
                f"torch is built for {'CUDA ' + version if version else 'no CUDA'}; block-wise "
                "scales take a build for CUDA 12.9 or newer: see pytorch.org/get-started"
            )
        return why_no_gpu()

    def why_not(self, product: Product) -> str | None:
        if product.kind != "dense":
            return "cuBLAS has dense products alone; take backend='triton' or 'deep_gemm'"
        a, b = product.a.values, product.b.values
        if a.dtype == b.dtype == E5M2:
            return "it does not multiply E5M2 by E5M2; quantise one operand to float8_e4m3fn"
        # 16 bytes are the least step of a row; 8 rows of a result in BF16 are as many.
        sizes = {"M": (len(a), 8), "N": (len(b), 16), "K": (a.shape[1], 16)}
        return why_not_hopper(product.device) or indivisible(sizes)

    def _compute(self, product: Product) -> Tensor:
        into = product.accumulate
        dtype = product.out_dtype if into is None else torch.float32
        found = F.scaled_mm(*arguments(product.a, product.b), output_dtype=dtype)
        return found if into is None else into.add_(found)


def arguments(a: Quantized, b: Quantized) -> Scaled:
    """Operands as `scaled_mm` takes them.

    Scales that are too coarse for a pair cuBLAS has are written out for each tile: of two operands
    in blocks, those of `a`.
    """
    blocks_b = block_scales(b)
    blocks_a = block_scales(a) if blocks_b is None else None
    scales_a, recipe_a = _scales(a, blocks_a)
    scales_b, recipe_b = _scales(b, blocks_b)
    return Scaled(
        row_major(a.values), row_major(b.values).t(), scales_a, recipe_a, scales_b, recipe_b
    )


def _scales(q: Quantized, blocks: Tensor | None) -> tuple[Tensor, Any]:
    if blocks is None:
        return dense(tile_scales(q).t()).t(), F.ScalingType.BlockWise1x128
    padded = F.pad(blocks, (0, -blocks.shape[1] % 4))
    return dense(padded).t(), F.ScalingType.BlockWise128x128
