"""Dispatch over NCCL gives the bits that dispatch over gloo gives."""

from __future__ import annotations

import pytest

from tests import cases_gpu
from tests.ranks import RankPool


@pytest.mark.parametrize("payload", ["exact", "bf16", "fp8"])
@pytest.mark.parametrize(
    ("name", "nodes"),
    [
        ("flat", [0, 0, 0, 0]),
        ("dedup", [0, 0, 0, 0]),
        ("two_hop", [0, 0, 1, 1]),
        ("two_hop", [0, 1, 2, 3]),
        ("flat", [0]),
    ],
    ids=str,
)
def test_forward_and_backward_equal_those_on_the_cpu_bit_for_bit(
    ranks: RankPool, name: str, nodes: list[int], payload: str
) -> None:
    found = ranks.run(
        cases_gpu.dispatch_on_both,
        world=len(nodes),
        backend="cpu:gloo,cuda:nccl",
        name=name,
        nodes=nodes,
        payload=payload,
    )
    assert all(found)
