"""FP8 on a real GPU: kernels have the references' bits, and every backend its products."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from counterflow.fp8 import Quantized, quantize_blocks, quantize_columns, quantize_tiles
from counterflow.fp8.formats import TILE, tiles_in
from counterflow.fp8.products import BACKENDS, Backend, backend
from counterflow.fp8.products.reference import Reference

pytest.importorskip("triton", reason="needs Triton")

# Hopper's tensor cores keep 13 bits behind the point of the largest of 32 products that they add
# (arXiv 2412.19437, section 3.3.2, and 2505.09343): a partial sum over 128 takes four such steps,
# each off by 2**-13 of its largest magnitude or so. Then one rounding to bfloat16.
TOLERANCE = 4 * 2.0**-13 + 2.0**-8


def on_gpu(q: Quantized) -> Quantized:
    return Quantized(q.values.cuda(), q.scales.cuda())


def magnitudes(q: Quantized) -> Quantized:
    return Quantized(q.values.float().abs().to(q.values.dtype), q.scales)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("form", ["e4m3", "e5m2"])
@pytest.mark.parametrize("power_of_two", [True, False], ids=["power_of_two", "float32"])
@pytest.mark.parametrize("columns", [1, 129, 1024])
def test_quantisers_have_the_references_bits(
    dtype: str, form: str, power_of_two: bool, columns: int
) -> None:
    import tests.cases_fp8_kernels as cases

    cases.quantise_numbers(1300, columns, dtype, form, power_of_two, [1, 0, 299, 1000])


@pytest.mark.parametrize("form", ["e4m3", "e5m2"])
def test_every_number_of_sixteen_bits_and_every_code(form: str) -> None:
    import tests.cases_fp8_kernels as cases

    for dtype in ("bfloat16", "float16"):
        cases.quantise_every_half(dtype, form)
    for power_of_two in (True, False):
        cases.transpose_every_code(form, power_of_two)
    cases.shapes_that_are_kept()


@pytest.mark.parametrize("inner", [1, 200, 1024])
@pytest.mark.parametrize("stored", ["", "e4m3"])
@pytest.mark.parametrize("weighted", [True, False])
def test_swiglu_has_the_references_bits(inner: int, stored: str, weighted: bool) -> None:
    import tests.cases_fp8_kernels as cases

    for rows, counts in ((1300, [1, 0, 299, 1000]), (1301, None)):
        for dtype in ("bfloat16", "float32"):
            cases.swiglus(rows, inner, dtype, stored, weighted, counts)
    cases.swiglu_of_every_gate()


def present() -> list[Backend]:
    """Every backend of GPUs that is installed here."""
    found: list[Backend] = []
    for name in BACKENDS:
        if name in ("auto", "reference", "emulation"):
            continue
        try:
            found.append(backend(name))
        except ValueError:
            continue
    return found


def close(found: Tensor, expected: Tensor, bound: Tensor) -> None:
    """Within the tolerance of sums of magnitudes."""
    error = (found.float().cpu() - expected.float()).abs()
    assert bool((error <= TOLERANCE * bound.float() + 1e-6).all()), float((error / bound).max())


def numbers(*shape: int, seed: int) -> Tensor:
    """Normal numbers with a few columns a thousand times as large."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    x[..., ::77] *= 1000.0
    return x.bfloat16()


@pytest.mark.parametrize("shape", [(256, 384, 1024), (128, 256, 4096)], ids=str)
def test_every_backend_has_the_references_dense_product(shape: Sequence[int]) -> None:
    m, n, k = shape
    a, b = quantize_tiles(numbers(m, k, seed=0)), quantize_blocks(numbers(n, k, seed=1))
    expected = Reference().matmul(a, b)
    bound = Reference().matmul(magnitudes(a), magnitudes(b), out_dtype=torch.float32)
    served = []
    for by in present():
        try:
            found = by.matmul(on_gpu(a), on_gpu(b))
        except ValueError:  # it has no such product, and says so
            continue
        close(found, expected, bound)
        served.append(by.name)
    assert "triton" in served


@pytest.mark.parametrize("b_kind", ["tiles", "blocks", "tensor"])
@pytest.mark.parametrize("a_kind", ["tiles", "blocks", "tensor"])
def test_triton_serves_every_layout_and_size(a_kind: str, b_kind: str) -> None:
    import tests.cases_fp8_kernels as cases

    # Products of small integers fit in the tensor cores' bits: nothing is cut off.
    for m, n, k in ((1, 1, 1), (130, 129, 300), (300, 260, 512)):
        a, b = cases.operand((m, k), a_kind), cases.operand((n, k), b_kind, "e5m2", seed=1)
        cases.same(backend("triton").matmul(on_gpu(a), on_gpu(b)), Reference().matmul(a, b))


def test_every_backend_has_the_references_grouped_products() -> None:
    counts, n, k = [1, 0, 299, 128], 384, 512
    rows = sum(counts)
    x, w = numbers(rows, k, seed=2), numbers(len(counts), n, k, seed=3)
    grad = numbers(rows, n, seed=4)
    a, b = quantize_tiles(x), quantize_blocks(w)
    across, along = quantize_columns(grad, counts), quantize_columns(x, counts)
    total = torch.randn(len(counts), n, k, generator=torch.Generator().manual_seed(5))
    expected = Reference().grouped(a, b, counts)
    bound = Reference().grouped(magnitudes(a), magnitudes(b), counts, out_dtype=torch.float32)
    added = Reference().grouped_along_k(across, along, counts, accumulate=total.clone())
    added_bound = Reference().grouped_along_k(
        magnitudes(across), magnitudes(along), counts, accumulate=total.abs()
    )
    served = []
    for by in present():
        try:
            found = by.grouped(on_gpu(a), on_gpu(b), counts)
            sums = by.grouped_along_k(
                on_gpu(across), on_gpu(along), counts, accumulate=total.cuda()
            )
        except ValueError:
            continue
        close(found, expected, bound)
        close(sums, added, added_bound)
        served.append(by.name)
    assert "triton" in served


def test_the_tables_of_groups_do_not_wait_for_the_device() -> None:
    from counterflow.fp8.kernels.numbers import group_tiles

    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    table = group_tiles([5, 0, 300], device)
    assert not torch.cuda.current_stream().query(), "the host went on while the device was busy"
    assert table.shape == (2, 1 + sum(map(tiles_in, [0, 300])))
    assert table.tolist() == [[0, 5, 5 + TILE, 5 + 2 * TILE], [5, 5 + TILE, 5 + 2 * TILE, 305]]
