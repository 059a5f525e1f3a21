"""On a GPU, phase by phase on two streams, training gives the bits that one piece gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import cases_overlap as cases
from tests.ranks import RankPool


@pytest.mark.parametrize(
    ("world", "schedule", "pp", "ep", "options"),
    [
        pytest.param(1, "dualpipev", 1, 1, {}, id="one rank"),
        pytest.param(2, "dualpipev", 1, 2, {}, id="an expert group of two"),
        pytest.param(4, "dualpipe", 2, 2, {}, id="dualpipe"),
        pytest.param(4, "dualpipe", 2, 2, {"dtype": torch.bfloat16}, id="bf16"),
        pytest.param(
            2,
            "dualpipev",
            1,
            2,
            {"fp8": True, "payload": "fp8", "dtype": torch.bfloat16, "recompute": True},
            id="fp8, recomputation",
        ),
    ],
)
def test_training_with_overlap_gives_the_same_bits(
    ranks: RankPool, world: int, schedule: str, pp: int, ep: int, options: dict[str, Any]
) -> None:
    backend = "cpu:gloo,cuda:nccl"
    given = {"schedule": schedule, "pp": pp, "ep": ep, "device": "cuda:0", **options}
    for found in ranks.run(cases.with_and_without, world=world, backend=backend, **given):
        assert found["differing"] == []
