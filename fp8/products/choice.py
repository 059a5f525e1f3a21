"""Which backend computes a product: by name, or the best that is there and fits.

Shapes: M, N, R rows; K summed over; E groups (experts); P columns of padded groups.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..formats import Quantized
from .base import Backend, Kind, Product
from .cublas import Cublas
from .deep_gemm import DeepGemm
from .emulation import Emulation
from .reference import Reference
from .transformer_engine import TransformerEngine
from .triton import Triton

log = logging.getLogger(__name__)

AUTO = "auto"
_CLASSES: dict[str, type[Backend]] = {
    kind.name: kind for kind in (Reference, Emulation, Cublas, DeepGemm, TransformerEngine, Triton)
}
BACKENDS = (AUTO, *_CLASSES)

# The order in which `auto` asks on a GPU, the fastest first. Transformer Engine is for those who
# have its layouts already: its products are cuBLAS's.
_ON_GPU: dict[Kind, tuple[type[Backend], ...]] = {
    "dense": (DeepGemm, Cublas, Triton, Reference),
    "grouped": (DeepGemm, Triton, Reference),
    "grouped_along_k": (DeepGemm, Triton, Reference),
}


class Auto(Backend):
    """For each product the backend that `choose` finds; each choice is logged once."""

    name: ClassVar[str] = AUTO

    def _compute(self, product: Product) -> Tensor:
        chosen, why = choose(product)
        _say_once(product.kind, product.device.type, chosen.name, why)
        return chosen.run(product)


def backend(which: str | Backend) -> Backend:
    """A backend by its name.

    Args:
        which: one of `BACKENDS`, or a backend, which is returned as it is.

    Raises:
        ValueError: no such name, or it is not installed here: what is missing and how to get it.
    """
    if isinstance(which, Backend):
        return which
    if which == AUTO:
        return Auto()
    if which not in _CLASSES:
        raise ValueError(
            f"there is no FP8 product backend {which!r}; choose from {', '.join(BACKENDS)}"
        )
    found = _CLASSES[which]()
    missing = found.missing()
    if missing is not None:
        raise ValueError(f"FP8 product backend {which!r} cannot be used here: {missing}")
    return found


def choose(product: Product) -> tuple[Backend, str]:
    """The backend that `auto` takes for a product, and why: what was passed over and the reason.

    On a CPU it is the reference. On a GPU it is the first that is installed and fits, of DeepGEMM,
    cuBLAS (dense products only) and the Triton kernels; the reference serves what none of them can.
    """
    if product.device.type != "cuda":
        return Reference(), f"on {product.device.type} the reference computes"
    passed: list[str] = []
    for kind in _ON_GPU[product.kind]:
        candidate = kind()
        reason = candidate.missing() or candidate.why_not(product)
        if reason is None:
            return candidate, "; ".join(passed) or "the first choice fits"
        passed.append(f"not {candidate.name}: {reason}")
    raise AssertionError("the reference computes every product")


def scaled_matmul(
    a: Quantized,
    b: Quantized,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    accumulate: Tensor | None = None,
    backend: str | Backend = AUTO,
) -> Tensor:
    """a @ b.T of FP8 matrices, partial sums promoted to float32 every 128 along K.

    Args:
        a: [M, K].
        b: [N, K]. Scales of either are of 1x128 tiles, 128x128 blocks or one in all.
        out_dtype: bfloat16 or float32; of no effect with `accumulate`.
        accumulate: float32 [M, N], to which the product is added in place.
        backend: one of `BACKENDS`, or an object.

    Returns:
        [M, N] of `out_dtype`, or `accumulate` itself.

    Raises:
        ValueError: the arguments do not fit together; the backend is not there or cannot serve.
    """
    return _find(backend).matmul(a, b, out_dtype=out_dtype, accumulate=accumulate)


def grouped_matmul(
    a: Quantized,
    b: Quantized,
    counts: Sequence[int],
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: str | Backend = AUTO,
) -> Tensor:
    """Each group of rows of `a` with its own matrix of `b`, as experts do: a_e @ b[e].T.

    Args:
        a: [R, K], groups of rows one after another.
        b: [E, N, K].
        counts: E numbers of rows that add up to R, zeros allowed.
        out_dtype: bfloat16 or float32.
        backend: one of `BACKENDS`, or an object.

    Returns:
        [R, N] of `out_dtype`.

    Raises:
        ValueError: as of `scaled_matmul`.
    """
    return _find(backend).grouped(a, b, counts, out_dtype=out_dtype)


def grouped_matmul_along_k(
    a: Quantized,
    b: Quantized,
    counts: Sequence[int],
    *,
    accumulate: Tensor,
    backend: str | Backend = AUTO,
) -> Tensor:
    """Weight gradients of experts: accumulate[e] += a_e @ b_e.T, each group its own columns.

    Args:
        a: [M, P] from `quantize_columns(.., counts)`.
        b: [N, P] from the same counts.
        counts: E numbers of columns before padding, zeros allowed.
        accumulate: float32 [E, M, N], added to in place.
        backend: one of `BACKENDS`, or an object.

    Returns:
        `accumulate`.

    Raises:
        ValueError: as of `scaled_matmul`.
    """
    return _find(backend).grouped_along_k(a, b, counts, accumulate=accumulate)


_find = backend  # the functions above have an argument of that name


_said: set[tuple[Kind, str, str]] = set()


def _say_once(kind: Kind, device: str, name: str, why: str) -> None:
    """`why` names sizes, which change from product to product: the first one's are logged."""
    if (kind, device, name) not in _said:
        _said.add((kind, device, name))
        log.info("FP8 %s products on %s: backend %s (%s)", kind, device, name, why)
