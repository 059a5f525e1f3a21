"""Dense products by Transformer Engine 2.12 or newer: its general_gemm on block-scaled tensors.

Its layouts (Float8BlockQuantizer): codes as uint8 [rows, K]; scales of tiles transposed,
[ceil(K/128), rows rounded up to 4]; scales of blocks [ceil(rows/128), ceil(K/128) rounded up to 4].

Shapes: M, N rows; K summed over.
"""

from __future__ import annotations

import importlib
import inspect
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import E5M2, Quantized
from .base import Backend, Product, tile_scales
from .hopper import block_scales, dense, indivisible, row_major, why_no_gpu, why_not_hopper

_GET_IT = "pip install 'counterflow[te]' for Transformer Engine 2.12 or newer"
_GEMM = "transformer_engine.pytorch.cpp_extensions.gemm"
_STORAGE = "transformer_engine.pytorch.tensor.storage.float8_blockwise_tensor_storage"
_CONSTANTS = "transformer_engine.pytorch.constants"


class TransformerEngine(Backend):
    """cuBLAS with Transformer Engine's own accumulation into the output.

    Its grouped product is a loop over dense ones and wants each group's rows to be a multiple of 8
    with scales laid out for each: DeepGEMM and Triton have one kernel, so it is left to them.
    """

    name: ClassVar[str] = "transformer_engine"

    def missing(self) -> str | None:
        return _why_no_library() or why_no_gpu()

    def why_not(self, product: Product) -> str | None:
        if product.kind != "dense":
            return "it serves dense products; take backend='deep_gemm' or 'triton'"
        a, b = product.a.values, product.b.values
        if a.dtype == b.dtype == E5M2:
            return "it does not multiply E5M2 by E5M2; quantise one operand to float8_e4m3fn"
        into = product.accumulate
        if into is not None and not into.is_contiguous():
            return "it accumulates into a contiguous tensor"
        sizes = {"M": (len(a), 8), "N": (len(b), 8), "K": (a.shape[1], 16)}
        return why_not_hopper(product.device) or indivisible(sizes)

    def _compute(self, product: Product) -> Tensor:
        blocks_b = block_scales(product.b)
        blocks_a = block_scales(product.a) if blocks_b is None else None
        into = product.accumulate
        gemm = importlib.import_module(_GEMM).general_gemm
        # Its A is the weight: out[M, N] = B[M, K] @ A[N, K].T is layout "TN".
        found, *_ = gemm(
            _stored(product.b, blocks_b),
            _stored(product.a, blocks_a),
            out_dtype=product.out_dtype if into is None else torch.float32,
            layout="TN",
            out=into,
            accumulate=into is not None,
            use_split_accumulator=True,
        )
        return found if into is None else into


def scale_layout(q: Quantized, blocks: Tensor | None) -> Tensor:
    """Float32 scales as Transformer Engine stores them: of `blocks`, or of q's tiles if None."""
    scales = tile_scales(q).t() if blocks is None else blocks
    return dense(F.pad(scales, (0, -scales.shape[1] % 4)))


def _stored(q: Quantized, blocks: Tensor | None) -> Any:
    """The operand as one of its tensors, without a copy of codes that lie row after row."""
    storage = importlib.import_module(_STORAGE).Float8BlockwiseQTensorStorage
    return storage(
        rowwise_data=row_major(q.values).view(torch.uint8),
        rowwise_scale_inv=scale_layout(q, blocks),
        columnwise_data=None,
        columnwise_scale_inv=None,
        fp8_dtype=importlib.import_module(_CONSTANTS).TE_DType[q.values.dtype],
        quantizer=None,
        is_2D_scaled=blocks is not None,
    )


@cache
def _why_no_library() -> str | None:
    try:
        gemm = inspect.signature(importlib.import_module(_GEMM).general_gemm)
        storage = importlib.import_module(_STORAGE).Float8BlockwiseQTensorStorage
        importlib.import_module(_CONSTANTS).TE_DType  # noqa: B018  may be absent
        layouts = inspect.signature(storage.__new__)
    except Exception as error:  # a broken installation may raise anything
        return f"Transformer Engine cannot be imported ({error!r}); {_GET_IT}"
    if "workspace" in gemm.parameters or "data_format" in layouts.parameters:
        return f"the Transformer Engine that is installed is older; {_GET_IT}"
    return None
