"""Products by the Triton kernels of `kernels.product`, written for Hopper.

Shapes: see `base`.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor

from ..kernels import why_no_fp8, why_no_triton
from .base import Backend, Product

# The tensor memory accelerator, through which the kernels read, came with Hopper.
_CAPABILITY = (9, 0)


class Triton(Backend):
    """Every layout of scales, each of the three products in one launch."""

    name: ClassVar[str] = "triton"

    def missing(self) -> str | None:
        return why_no_triton()

    def why_not(self, product: Product) -> str | None:
        device, into = product.device, product.accumulate
        if into is not None and not into.is_contiguous():
            return "it accumulates into a contiguous tensor"
        if device.type == "cuda":
            reason = why_no_fp8(device)
            if reason is not None:
                return reason
            found = torch.cuda.get_device_capability(device)
            if found >= _CAPABILITY:
                return None
            return f"its kernels take capability 9.0 or higher, and {device} has {found}"
        if _interpreted():
            return None
        return f"its kernels run on a GPU, and the operands are on {device.type}"

    def _compute(self, product: Product) -> Tensor:
        kernels, out = _kernels(), product.accumulate
        a, b, add = product.a, product.b, out is not None
        if out is None:
            out = a.values.new_empty(product.shape, dtype=product.out_dtype)
        if product.kind == "dense":
            kernels.matmul(a, b, out, add)
        elif product.kind == "grouped":
            kernels.grouped(a, b, product.counts, out)
        else:
            kernels.grouped_along_k(a, b, product.counts, out)
        return out


def _kernels() -> ModuleType:
    return importlib.import_module("..kernels.product", __package__)


def _interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors."""
    return importlib.import_module("..kernels.numbers", __package__).interpreted()
