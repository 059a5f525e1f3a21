"""Triton kernels for what `quantize_reference`, `swiglu_reference` and `products` define.

Triton is imported when the first kernel is asked for, never before: without it, or without a GPU,
everything runs on the references.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

# The first NVIDIA GPUs that convert to and from E4M3 in hardware; for others Triton has no E4M3.
_CAPABILITY = (8, 9)


@cache
def why_no_triton() -> str | None:
    """Why Triton cannot be used here, or None if it can."""
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken installation may raise anything
        return f"Triton cannot be imported ({error}); pip install 'counterflow[gpu]'"
    return None


@cache
def why_no_fp8(device: torch.device) -> str | None:
    """Why a CUDA device cannot run these kernels, or None if it can."""
    if torch.version.hip is not None:
        return "its kernels are for NVIDIA's GPUs, and torch is built for AMD's"
    found = torch.cuda.get_device_capability(device)
    if found >= _CAPABILITY:
        return None
    needed, has = (".".join(map(str, c)) for c in (_CAPABILITY, found))
    return f"its kernels take capability {needed} or higher, and {device} has {has}"


def kernels_for(x: Tensor, module: str = "quantize") -> ModuleType | None:
    """The kernels of `module` ("quantize" or "swiglu") if they can serve `x`, else None.

    They can on an NVIDIA GPU of compute capability 8.9 or higher, where Triton is installed.
    """
    if not x.is_cuda or why_no_triton() is not None or why_no_fp8(x.device) is not None:
        return None
    return importlib.import_module(f".{module}", __name__)
