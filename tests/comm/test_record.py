"""Records lie in memory as C structs do, and their parts are views."""

from __future__ import annotations

import ctypes

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.comm.dispatch.record import RecordFormat
from tests.cases_dispatch import C_TYPES

parts = st.lists(
    st.tuples(st.sampled_from(list(C_TYPES)), st.integers(1, 9)), min_size=1, max_size=4
)


@settings(deadline=None)
@given(parts, st.integers(0, 5))
def test_parts_lie_where_a_c_struct_has_its_arrays(
    given_parts: list[tuple[torch.dtype, int]], num_records: int
) -> None:
    fields = [(f"f{i}", C_TYPES[dtype] * n) for i, (dtype, n) in enumerate(given_parts)]
    struct = type("Record", (ctypes.Structure,), {"_fields_": fields})
    form = RecordFormat.of([torch.empty(2, n, dtype=dtype) for dtype, n in given_parts])
    assert form.width == ctypes.sizeof(struct)
    records = torch.zeros(num_records, form.width, dtype=torch.uint8)
    for i, (dtype, n) in enumerate(given_parts):
        view = form.part(records, i)
        assert view.dtype == dtype
        assert view.shape == (num_records, n)
        if num_records:
            assert view.data_ptr() - records.data_ptr() == getattr(struct, f"f{i}").offset


@settings(deadline=None)
@given(parts)
def test_what_is_written_into_the_parts_comes_back(
    given_parts: list[tuple[torch.dtype, int]],
) -> None:
    form = RecordFormat(tuple(given_parts))
    records = torch.zeros(3, form.width, dtype=torch.uint8)
    random = torch.Generator().manual_seed(0)
    written = [torch.randint(99, (3, n), generator=random).to(dtype) for dtype, n in given_parts]
    for i, values in enumerate(written):
        form.part(records, i).copy_(values)
    for i, values in enumerate(written):
        assert torch.equal(form.part(records.clone(), i), values)
