"""How a rank's gradients add up over micro-batches: in float32, whatever the parameters' dtype.

DeepSeek-V3 keeps accumulated gradients in float32 (arXiv 2412.19437, section 3.3.3): bfloat16 has 8
bits, so a sum of many micro-batches would lose what each of the later ones adds. A parameter that
`accumulate_in_float32` was told of has a `.grad` of float32. Autograd adds to that, by torch's
`Tensor.grad_dtype`; so does everything that adds to `.grad` by itself, through what stands here.
Sums over ranks and norms then run in float32 as well.

Products of bfloat16 operands for such a gradient are not rounded to bfloat16 on the way: cuBLAS
writes and adds float32, and on the CPU the operands are raised first, which is exact. What reaches
a gradient through autograd's own kernels (embeddings, biases, norms on a GPU, products outside of
queues) is rounded to the parameter's dtype once a micro-batch before it is added.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_LOW = (torch.bfloat16, torch.float16)


def accumulate_in_float32(parameters: Iterable[Tensor]) -> None:
    """Let the gradients of parameters below float32 be float32; others stay as they are.

    Raises:
        ValueError: a gradient of lower precision is there already.
    """
    for parameter in parameters:
        if parameter.dtype not in _LOW:
            continue
        if parameter.grad is not None and parameter.grad.dtype != torch.float32:
            raise ValueError(
                f"a gradient of {parameter.grad.dtype} is there already; drop it (zero_grad) "
                "before gradients are accumulated in float32"
            )
        parameter.grad_dtype = torch.float32


def grad_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which the gradient of `tensor` is added up."""
    # Only leaves can say so; None there allows any dtype.
    return (tensor.grad_dtype if tensor.is_leaf else None) or tensor.dtype


def accumulate_grad(parameter: Tensor, grad: Tensor) -> None:
    """Add `grad` to `parameter.grad`, which is created if it is None. Takes ownership of `grad`."""
    if parameter.grad is None:
        parameter.grad = grad.to(grad_dtype(parameter))
    else:
        parameter.grad.add_(grad)


def accumulate_product(parameter: Tensor, a_NM: Tensor, b_MK: Tensor) -> None:
    """Add a @ b to `parameter.grad`, [N, K], without rounding below the gradient's dtype."""
    if parameter.grad is None or parameter.grad.dtype == a_NM.dtype:
        accumulate_grad(parameter, product(a_NM, b_MK, grad_dtype(parameter)))
    else:
        add_product(parameter.grad, a_NM, b_MK)


def product(a_NM: Tensor, b_MK: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`, which is that of the operands or float32."""
    if a_NM.dtype == dtype:
        return a_NM @ b_MK
    if a_NM.is_cuda and a_NM.dtype in _LOW and dtype == torch.float32:
        return torch.mm(a_NM, b_MK, out_dtype=dtype)
    return a_NM.to(dtype) @ b_MK.to(dtype)


def add_product(into_NK: Tensor, a_NM: Tensor, b_MK: Tensor) -> None:
    """into += a @ b, in the dtype of `into`, which is that of the operands or float32."""
    dtype = into_NK.dtype
    # As addmm(out=), not addmm_, which torch's FLOP counter does not know.
    if a_NM.is_cuda and a_NM.dtype in _LOW and dtype == torch.float32:
        torch.addmm(into_NK, a_NM, b_MK, out_dtype=dtype, out=into_NK)
    else:
        torch.addmm(into_NK, a_NM.to(dtype), b_MK.to(dtype), out=into_NK)
