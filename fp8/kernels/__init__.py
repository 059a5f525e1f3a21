"""Triton kernels for what `quantize_reference`, `swiglu_reference` and `products` define.

Triton is imported when the first kernel is asked for, never before: without it, or without a GPU,
everything runs on the references.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

from torch import Tensor


@cache
def why_no_triton() -> str | None:
    """Why Triton cannot be used here, or None if it can."""
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken installation may raise anything
        return f"Triton cannot be imported ({error}); pip install 'counterflow[gpu]'"
    return None


def kernels_for(x: Tensor, module: str = "quantize") -> ModuleType | None:
    """The kernels of `module` ("quantize" or "swiglu") if they can serve `x`, else None."""
    if not x.is_cuda or why_no_triton() is not None:
        return None
    return importlib.import_module(f".{module}", __name__)
