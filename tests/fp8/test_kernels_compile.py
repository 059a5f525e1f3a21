"""What the Triton kernels become for Hopper, compiled where there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs Triton; no GPU")

SHARED_LIMIT = 227 * 1024  # bytes that a thread block can have
REGISTERS = 65536  # of a multiprocessor
LIMIT_S = 240
PRODUCTS = ("matmul", "grouped", "grouped_along_k")
SWIGLU = ("swiglu_quantized", "swiglu_columns", "swiglu_backward", "swiglu_backward_quantized")

Kernels = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def printed() -> dict[str, Any]:
    """What `cases_fp8_compile` prints."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.cases_fp8_compile"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def kernels(printed: dict[str, Any]) -> Kernels:
    """By function, what `cases_fp8_compile.described` says of each kernel it launches."""
    return {name: found for name, found in printed.items() if name != "by counts"}


def test_one_kernel_serves_groups_of_any_sizes(printed: dict[str, Any]) -> None:
    assert printed["by counts"] == {"grouped": 1, "grouped_along_k": 1}


def test_products_use_hoppers_fp8_units_and_its_copy_engine(kernels: Kernels) -> None:
    # One is enough of the grouped kernel, which is the dense one with a table.
    assert [len(kernels[name]) for name in PRODUCTS] == [4, 1, 2]
    for name in PRODUCTS:
        for kernel in kernels[name]:
            assert kernel["wgmma"]
            # One instruction takes 32 along K, into float32.
            assert all("k32.f32.e4m3.e4m3" in op for op in kernel["wgmma"])
            assert kernel["copy_engine"] > 0


def test_every_kernel_fits_a_multiprocessor(kernels: Kernels) -> None:
    for name, variants in kernels.items():
        for kernel in variants:
            assert kernel["shared_bytes"] <= SHARED_LIMIT, name
            assert kernel["registers"] * kernel["warps"] * 32 <= REGISTERS, name


def test_registers_suffice(kernels: Kernels) -> None:
    for name, variants in kernels.items():
        for kernel in variants:
            allowed = 0
            if name == "swiglu_backward_quantized":
                allowed = 16  # bytes a thread, with two blocks of 128x128 in 512 threads
            if name in PRODUCTS and kernel["registers"] in (128, 255):
                allowed = 96  # two halves at once, tried on the GPU beside those that fit
            assert kernel["stack_bytes"] <= allowed, name
    for name in ("matmul", "grouped_along_k"):  # of which all configurations are compiled
        assert any(kernel["stack_bytes"] == 0 for kernel in kernels[name])


def test_two_programs_of_the_first_configuration_share_a_multiprocessor(kernels: Kernels) -> None:
    for name in ("matmul", "grouped"):
        first = kernels[name][0]
        assert 2 * first["registers"] * first["warps"] * 32 <= REGISTERS
        assert 2 * first["shared_bytes"] <= SHARED_LIMIT


def test_quantisers_convert_in_hardware_and_read_sixteen_bytes_at_once(kernels: Kernels) -> None:
    for name, (kernel, *_) in kernels.items():
        if name in (*PRODUCTS, "swiglu_backward"):
            continue
        form = "e5m2" if name == "quantize_tiles float32" else "e4m3"
        assert kernel["to_fp8"] == [f"cvt.rn.satfinite.{form}x2.f32"], name
        assert kernel["widest_load"] == 128, name


def test_what_must_give_the_references_bits_neither_approximates_nor_fuses(
    kernels: Kernels,
) -> None:
    for name in kernels.keys() - set(PRODUCTS):
        for kernel in kernels[name]:
            assert kernel["approximate"] == [], name
            assert kernel["fused"] == 0, name
            # The reciprocal in sigmoid is never subnormal, nor is what it is of.
            assert set(kernel["flushes"]) <= {"rcp.rn.ftz.f32"}, name
            assert not kernel["flushes"] or name in SWIGLU
