"""The Triton kernels give the references' bits, in Triton's interpreter."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="needs Triton; no GPU")

LIMIT_S = 280  # of one case; a machine may be busy with other things
Interpret = Callable[..., None]


@pytest.fixture(scope="module")
def interpret() -> Iterator[Interpret]:
    """Runs a case of cases_fp8_kernels in a process of its own.

    Triton decides when it is first imported whether kernels are interpreted, and other tests of
    this process may have imported it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        with pool:
            pool.submit(int).result(LIMIT_S)  # starts the process, which takes the variables

            def run(case: str, *args: Any) -> None:
                pool.submit(run_case, case, args).result(LIMIT_S)

            yield run


def run_case(case: str, args: tuple[Any, ...]) -> None:
    import tests.cases_fp8_kernels as cases

    getattr(cases, case)(*args)


@pytest.mark.parametrize(
    ("rows", "columns", "counts"),
    [
        (1, 1, None),
        (5, 128, [2, 0, 3]),
        (127, 129, None),
        (130, 300, [1, 129]),
        (256, 128, [128, 0, 128]),
    ],
    ids=str,
)
@pytest.mark.parametrize("power_of_two", [True, False], ids=["power_of_two", "float32"])
def test_quantisers_of_any_shape(
    interpret: Interpret, rows: int, columns: int, counts: list[int] | None, power_of_two: bool
) -> None:
    dtype = ["bfloat16", "float16", "float32"][rows % 3]
    form = "e5m2" if columns == 129 else "e4m3"
    interpret("quantise_numbers", rows, columns, dtype, form, power_of_two, counts)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("form", ["e4m3", "e5m2"])
def test_quantisers_of_any_dtype(interpret: Interpret, dtype: str, form: str) -> None:
    interpret("quantise_numbers", 128, 64, dtype, form, True, [60, 68])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("form", ["e4m3", "e5m2"])
def test_every_number_of_sixteen_bits(interpret: Interpret, dtype: str, form: str) -> None:
    interpret("quantise_every_half", dtype, form)


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=6),
    st.sampled_from(["e4m3", "e5m2"]),
    st.booleans(),
)
def test_any_bits_of_float32(
    interpret: Interpret, bits: list[int], form: str, power_of_two: bool
) -> None:
    interpret("quantise_bits", bits, form, power_of_two)


def test_leading_dimensions_strides_and_nothing(interpret: Interpret) -> None:
    interpret("shapes_that_are_kept")


@pytest.mark.parametrize("form", ["e4m3", "e5m2"])
@pytest.mark.parametrize("power_of_two", [True, False], ids=["power_of_two", "float32"])
def test_every_code_is_transposed(interpret: Interpret, form: str, power_of_two: bool) -> None:
    interpret("transpose_every_code", form, power_of_two)


@pytest.mark.parametrize(
    ("rows", "inner", "dtype", "stored", "weighted", "counts"),
    [
        (1, 1, "bfloat16", "", True, None),
        (5, 64, "float32", "e4m3", True, [2, 0, 3]),
        (7, 200, "bfloat16", "e4m3", True, None),
        (130, 128, "bfloat16", "e4m3", True, [1, 129]),
        (128, 128, "bfloat16", "", False, None),
        (101, 128, "float32", "e5m2", False, [0, 101]),
        (0, 128, "bfloat16", "", True, [0, 0]),
    ],
    ids=str,
)
def test_swiglu_and_its_gradient(
    interpret: Interpret,
    rows: int,
    inner: int,
    dtype: str,
    stored: str,
    weighted: bool,
    counts: list[int] | None,
) -> None:
    interpret("swiglus", rows, inner, dtype, stored, weighted, counts)


def test_swiglu_of_every_bfloat16(interpret: Interpret) -> None:
    interpret("swiglu_of_every_gate")


@pytest.mark.parametrize(
    ("shape", "a_kind", "b_kind", "form"),
    [
        ((1, 1, 1), "tiles", "tiles", "e4m3"),
        ((1, 128, 128), "tiles", "blocks", "e4m3"),
        ((128, 1, 128), "tensor", "tiles", "e4m3"),
        ((5, 130, 128), "tensor", "tensor", "e4m3"),
        ((130, 129, 200), "tiles", "blocks", "e4m3"),
        ((40, 70, 300), "blocks", "tiles", "e5m2"),
    ],
    ids=str,
)
def test_products_whose_sums_are_exact(
    interpret: Interpret, shape: tuple[int, int, int], a_kind: str, b_kind: str, form: str
) -> None:
    # The interpreter adds in another order than is stated; of small integers every order is exact.
    interpret("dense_products", *shape, a_kind, b_kind, form)


@pytest.mark.parametrize(
    ("counts", "b_kind"),
    [([3, 0, 130, 1], "blocks"), ([128, 0], "tiles"), ([0, 5], "tensor"), ([0, 0], "blocks")],
    ids=str,
)
def test_grouped_products_whose_sums_are_exact(
    interpret: Interpret, counts: list[int], b_kind: str
) -> None:
    interpret("grouped_products", counts, 130, 200, b_kind)


@pytest.mark.parametrize("counts", [[3, 0, 130, 1], [0, 0]], ids=str)
def test_products_along_k_whose_sums_are_exact(interpret: Interpret, counts: list[int]) -> None:
    interpret("products_along_k", counts, 70, 130)


@pytest.mark.parametrize("chosen", range(4))
def test_products_in_each_configuration_that_is_tried(interpret: Interpret, chosen: int) -> None:
    interpret("products_of_a_configuration", chosen)


def test_counts_of_groups_are_no_reason_to_tune_anew(interpret: Interpret) -> None:
    interpret("counts_and_tuning")
