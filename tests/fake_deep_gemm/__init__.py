"""A FAKE of DeepGEMM, for tests on CPUs: its public names and signatures, none of its code.

DeepGEMM itself needs a Hopper GPU and a CUDA toolkit. The fake has the functions that the backend
calls as versions 2.1 and 2.6 declare them (deepseek-ai/DeepGEMM), refuses the arguments that the
real ones refuse on Hopper, and some that they would silently misread; it computes with this
project's reference.

    with installed("2.6") as calls:     # import deep_gemm now finds the fake
        ...
    calls                               # the names of what was called, in order
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from counterflow.fp8 import E4M3, Quantized, scaled_matmul

__all__ = ["installed"]

Operand = tuple[Tensor, Tensor]
_BLOCK = 128


@contextmanager
def installed(version: str = "2.6", alignment: int = 128) -> Iterator[list[str]]:
    """Within, `import deep_gemm` gives the fake; yields the names of the functions called.

    Args:
        version: "2.6"; or "2.1", which calls two arguments otherwise and knows fewer; or "1.0",
            none of whose functions take what later ones take.
        alignment: rows of groups in the grouped product.
    """
    calls: list[str] = []
    functions: dict[str, Callable[..., Any]] = {
        "2.6": _FUNCTIONS_2_6,
        "2.1": _FUNCTIONS_2_1,
        "1.0": {"gemm_fp8_fp8_bf16_nt": _fp8_gemm_nt},
    }[version]
    module = ModuleType("deep_gemm", __doc__)
    for name, function in functions.items():
        setattr(module, name, _recorded(name, function, calls))
    ask = "get_mk_alignment_for_contiguous_layout"
    setattr(module, ask if version == "2.6" else ask.replace("mk", "m"), lambda: alignment)
    before = sys.modules.get("deep_gemm")
    sys.modules["deep_gemm"] = module
    try:
        yield calls
    finally:
        del sys.modules["deep_gemm"]
        if before is not None:
            sys.modules["deep_gemm"] = before


def _recorded(name: str, function: Callable[..., Any], calls: list[str]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        return function(*arguments, **options)

    return call


def require(holds: bool, what: str) -> None:
    """Where the real library's host assertions fail, which are RuntimeErrors."""
    if not holds:
        raise RuntimeError(f"Assertion error (fake DeepGEMM): {what}")


def _fp8_gemm_nt(
    a: Operand,
    b: Operand,
    d: Tensor,
    c: Tensor | None = None,
    recipe: tuple[int, int, int] | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
) -> None:
    recipe = recipe or (1, 128, 128)
    (m, k), n = a[0].shape, b[0].shape[0]
    require(b[0].shape[1] == k and d.shape == (m, n), "shapes of a, b and d")
    for (values, scales), rows, high in ((a, m, recipe[0]), (b, n, recipe[1])):
        _check_values(values)
        _check_scales(scales, rows, k, high)
    _check_output(d)
    if recipe[1] == 128:  # 1D2D
        require(c is None and d.dtype == torch.bfloat16, "1D2D writes BF16 and adds nothing")
        high, wide = b[1].shape
        require(b[1].stride() in ((wide, 1), (1, high)), "scales of b lie densely")
    else:  # 1D1D
        require(c is not None and d.dtype == torch.float32, "1D1D adds to float32")
        for values, _ in (a, b):
            require(values.stride(0) == k, "1D1D takes rows to be K apart, whatever the stride")
    if c is not None:
        require(c.dtype == d.dtype and c.shape == d.shape, "c is like d")
        if c.data_ptr() != d.data_ptr():
            d.copy_(c)
        scaled_matmul(Quantized(*a), Quantized(*b), accumulate=d, backend="reference")
    else:
        d.copy_(scaled_matmul(Quantized(*a), Quantized(*b), backend="reference"))


def _fp8_fp4_gemm_nt(
    a: Operand,
    b: Operand,
    d: Tensor,
    c: Tensor | None = None,
    recipe: tuple[int, int, int] | None = None,
    recipe_a: tuple[int, int] | None = None,
    recipe_b: tuple[int, int] | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
) -> None:
    require(recipe_a is None and recipe_b is None, "the fake knows recipes of three numbers")
    _fp8_gemm_nt(a, b, d, c, recipe, compiled_dims, disable_ue8m0_cast)


def _m_grouped(
    a: Operand,
    b: Operand,
    d: Tensor,
    m_indices: Tensor,
    recipe: tuple[int, int, int] | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
) -> None:
    require(recipe is None, "the fake knows the default recipe")
    (m, k), (groups, n, k_of_b) = a[0].shape, b[0].shape
    require(k == k_of_b and d.shape == (m, n), "shapes of a, b and d")
    require(d.dtype == torch.bfloat16, "the grouped product writes BF16")
    _check_values(a[0])
    _check_scales(a[1], m, k, 1)
    require(b[0].stride(0) == n * k and b[1].shape[0] == groups, "matrices of b follow each other")
    require(b[1].stride(0) == b[1].shape[1] * b[1].shape[2], "and so do their scales")
    for e in range(groups):
        _check_values(b[0][e])
        _check_scales(b[1][e], n, k, 128)
    _check_output(d)
    require(
        m_indices.dtype == torch.int32 and m_indices.shape == (m,) and m_indices.is_contiguous(),
        "one group for each row, int32",
    )
    d.fill_(torch.nan)  # so that a row that nobody wrote is seen
    for start in range(0, m, _BLOCK):
        rows = slice(start, min(start + _BLOCK, m))
        group = int(m_indices[start])
        require(
            bool(((m_indices[rows] == group) | (m_indices[rows] == -1)).all()),
            "a block of 128 rows is of one group",
        )
        if group >= 0:
            block = scaled_matmul(
                Quantized(a[0][rows], a[1][rows]),
                Quantized(b[0][group], b[1][group]),
                backend="reference",
            )
            d[rows] = block.masked_fill((m_indices[rows] == -1)[:, None], torch.nan)


def _m_grouped_2_6(
    a: Operand,
    b: Operand,
    d: Tensor,
    grouped_layout: Tensor,
    recipe: tuple[int, int, int] | None = None,
    recipe_a: tuple[int, int] | None = None,
    recipe_b: tuple[int, int] | None = None,
    compiled_dims: str = "nk",
    disable_ue8m0_cast: bool = False,
    use_psum_layout: bool = False,
    ensure_zero_padding: bool = True,
    expected_m_for_psum_layout: int | None = None,
) -> None:
    require(not use_psum_layout and recipe_a is None, "the fake knows a group for each row")
    _m_grouped(a, b, d, grouped_layout, recipe, compiled_dims, disable_ue8m0_cast)


def _k_grouped(
    a: Operand,
    b: Operand,
    d: Tensor,
    ks: Sequence[int],
    ks_tensor: Tensor,
    c: Tensor | None = None,
    recipe: tuple[int, int, int] = (1, 1, 128),
    compiled_dims: str = "mn",
) -> None:
    groups, m, n = d.shape
    total = sum(ks)
    require(tuple(recipe) == (1, 1, 128), "tiles of 1x128 for both")
    require(isinstance(ks, list) and len(ks) == groups, "ks is a list of a size for each group")
    require(all(k % 128 == 0 for k in ks), "sizes along K are multiples of 128")
    require(
        ks_tensor.dtype == torch.int32 and ks_tensor.tolist() == ks and ks_tensor.is_contiguous(),
        "and the same as an int32 tensor",
    )
    require(c is not None and c.dtype == d.dtype == torch.float32, "it adds to float32")
    assert c is not None
    require(c.is_contiguous() and d.is_contiguous(), "c and d are contiguous")
    for (values, scales), rows in ((a, m), (b, n)):
        require(values.is_contiguous() and values.dtype == E4M3, "codes lie densely")
        require(values.numel() == total * rows, "each group is [rows, k], one after the other")
        require(values.data_ptr() % 16 == 0, "16-byte alignment")
        _check_scales(scales, rows, total, 1)
    if c.data_ptr() != d.data_ptr():
        d.copy_(c)
    for e, (start, stop) in enumerate(pairwise(accumulate(ks, initial=0))):
        if start < stop:
            parts = [
                Quantized(
                    values.view(-1)[start * rows : stop * rows].view(rows, stop - start),
                    scales[:, start // 128 : stop // 128],
                )
                for (values, scales), rows in ((a, m), (b, n))
            ]
            scaled_matmul(*parts, accumulate=d[e], backend="reference")


def _k_grouped_2_6(
    a: Operand,
    b: Operand,
    d: Tensor,
    ks_cpu: Sequence[int] | None,
    grouped_layout: Tensor,
    c: Tensor | None = None,
    recipe: tuple[int, int, int] = (1, 1, 128),
    compiled_dims: str = "mn",
    use_psum_layout: bool = False,
) -> None:
    require(not use_psum_layout and ks_cpu is not None, "Hopper knows sizes on the host alone")
    assert ks_cpu is not None
    _k_grouped(a, b, d, ks_cpu, grouped_layout, c, recipe, compiled_dims)


def _check_values(values: Tensor) -> None:
    require(values.dtype == E4M3, "codes are E4M3")
    require(values.stride(-1) == 1, "Hopper reads rows along K")
    require(values.stride(0) % 16 == 0 and values.data_ptr() % 16 == 0, "16-byte alignment")


def _check_scales(scales: Tensor, rows: int, k: int, high: int) -> None:
    require(scales.dtype == torch.float32, "scales are float32")
    require(scales.shape == (-(-rows // high), -(-k // 128)), f"scales' shape, of {high}x128")


def _check_output(d: Tensor) -> None:
    require(d.stride(-1) == 1, "results lie row after row")
    require(d.stride(0) * d.itemsize % 16 == 0 and d.data_ptr() % 16 == 0, "16-byte alignment")


_FUNCTIONS_2_1 = {
    "fp8_gemm_nt": _fp8_gemm_nt,
    "m_grouped_fp8_gemm_nt_contiguous": _m_grouped,
    "k_grouped_fp8_gemm_nt_contiguous": _k_grouped,
}
_FUNCTIONS_2_6 = {
    "fp8_gemm_nt": _fp8_fp4_gemm_nt,
    "m_grouped_fp8_gemm_nt_contiguous": _m_grouped_2_6,
    "k_grouped_fp8_gemm_nt_contiguous": _k_grouped_2_6,
}
