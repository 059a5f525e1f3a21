"""A FAKE of Transformer Engine, for tests on CPUs: a few names and signatures, none of its code.

Transformer Engine itself needs a Hopper GPU. The fake has `general_gemm`, the storage of
block-scaled tensors and the table of dtypes as NVIDIA/TransformerEngine 2.18 declares them, refuses
what its checks and cuBLAS refuse, and computes with this project's reference.

    with installed() as calls:      # import transformer_engine now finds the fake
        ...
    calls                           # the layout of each product asked for
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from counterflow.fp8 import Quantized, scaled_matmul

__all__ = ["installed"]

_ROOT = "transformer_engine"
_GEMM = f"{_ROOT}.pytorch.cpp_extensions.gemm"
_STORAGE = f"{_ROOT}.pytorch.tensor.storage.float8_blockwise_tensor_storage"
_CONSTANTS = f"{_ROOT}.pytorch.constants"


class DType(enum.IntEnum):
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8


TE_DType = {torch.float8_e4m3fn: DType.kFloat8E4M3, torch.float8_e5m2: DType.kFloat8E5M2}


class Float8BlockwiseQTensorStorage:
    """Codes and scales of one or both directions; the fake's products read rows."""

    def __new__(
        cls,
        rowwise_data: Tensor | None,
        rowwise_scale_inv: Tensor | None,
        columnwise_data: Tensor | None,
        columnwise_scale_inv: Tensor | None,
        fp8_dtype: DType,
        quantizer: Any,
        is_2D_scaled: bool,
        *args: Any,
        fake_dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> Float8BlockwiseQTensorStorage:
        made = super().__new__(cls)
        made._rowwise_data = rowwise_data
        made._rowwise_scale_inv = rowwise_scale_inv
        made._fp8_dtype = fp8_dtype
        made._is_2D_scaled = is_2D_scaled
        return made

    def __init__(self, *args: Any, **options: Any) -> None:
        self._rowwise_data: Tensor | None
        self._rowwise_scale_inv: Tensor | None
        self._fp8_dtype: DType
        self._is_2D_scaled: bool

    def read(self) -> Quantized:
        """What it stores, after the checks of its layout."""
        data, scales = self._rowwise_data, self._rowwise_scale_inv
        require(data is not None and scales is not None, "there is data by rows")
        assert data is not None
        assert scales is not None
        require(data.dtype == torch.uint8 and data.is_contiguous(), "codes are contiguous bytes")
        require(scales.dtype == torch.float32 and scales.is_contiguous(), "scales are float32")
        rows, k = data.shape
        require(k % 16 == 0, "K is a multiple of 16")
        tiles = -(-k // 128)
        if self._is_2D_scaled:
            require(scales.shape == (-(-rows // 128), tiles + -tiles % 4), "scales of blocks")
            logical = scales[:, :tiles]
        else:
            require(scales.shape == (tiles, rows + -rows % 4), "scales of tiles, transposed")
            logical = scales.t()[:rows]
        dtype = next(dtype for dtype, name in TE_DType.items() if name == self._fp8_dtype)
        return Quantized(data.view(dtype), logical)


@contextmanager
def installed(version: str = "2.18") -> Iterator[list[str]]:
    """Within, `import transformer_engine` gives the fake; yields the layouts of products called.

    Args:
        version: "2.18", or "2.8", whose general_gemm takes a workspace.
    """
    calls: list[str] = []

    def general_gemm(
        A: Any,
        B: Any,
        out_dtype: torch.dtype | None = None,
        quantization_params: Any = None,
        gelu: bool = False,
        gelu_in: Tensor | None = None,
        alpha: float = 1.0,
        beta: float | None = None,
        accumulate: bool = False,
        layout: str = "TN",
        out: Tensor | None = None,
        bias: Tensor | None = None,
        use_split_accumulator: bool = False,
        grad: bool = False,
        **options: Any,
    ) -> tuple[Tensor, None, None, None]:
        calls.append(layout)
        require(layout == "TN" and not options and bias is None, "the fake knows plain products")
        require(out is None or out.is_contiguous(), "Output tensor is not contiguous.")
        require(out is not None or not accumulate, "there is something to add to")
        return _gemm(A, B, out_dtype, out, accumulate), None, None, None

    def older_gemm(A: Any, B: Any, workspace: Tensor, out_dtype: Any = None) -> None:
        raise AssertionError("never called")

    gemm = general_gemm if version == "2.18" else older_gemm
    contents = {
        _GEMM: {"general_gemm": gemm},
        _STORAGE: {"Float8BlockwiseQTensorStorage": Float8BlockwiseQTensorStorage},
        _CONSTANTS: {"TE_DType": TE_DType, "DType": DType},
    }
    modules: dict[str, ModuleType] = {}
    for path, members in contents.items():
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            modules.setdefault(name, ModuleType(name, __doc__))
        vars(modules[path]).update(members)
    with mock.patch.dict(sys.modules, modules):
        yield calls


def require(holds: bool, what: str) -> None:
    """Where the real library's checks fail."""
    if not holds:
        raise RuntimeError(f"fake Transformer Engine: not so: {what}")


def _gemm(
    A: Float8BlockwiseQTensorStorage,
    B: Float8BlockwiseQTensorStorage,
    out_dtype: torch.dtype | None,
    out: Tensor | None,
    accumulate: bool,
) -> Tensor:
    """out[M, N] = B[M, K] @ A[N, K].T"""
    require(not (A._is_2D_scaled and B._is_2D_scaled), "one operand at most has blocks")
    weight, x = A.read(), B.read()
    require(not weight.values.dtype == x.values.dtype == torch.float8_e5m2, "one of them is E4M3")
    require(weight.values.shape[1] == x.values.shape[1], "the same K")
    require(len(weight.values) % 8 == 0, "N is a multiple of 8")
    require(B._is_2D_scaled or len(x.values) % 8 == 0, "M is a multiple of 8")
    if accumulate:
        assert out is not None
        require(out.dtype == torch.float32, "the fake adds to float32")
        return scaled_matmul(x, weight, accumulate=out, backend="reference")
    require(out is None, "the fake writes to what it makes")
    assert out_dtype is not None
    return scaled_matmul(x, weight, out_dtype=out_dtype, backend="reference")
