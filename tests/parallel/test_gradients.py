"""Sums of gradients over a group."""

from __future__ import annotations

import pytest

from tests import cases_gradients as cases
from tests.ranks import RankPool


@pytest.mark.parametrize("alone_bytes", [1, 40, 1 << 20])
def test_sums_are_those_of_each_parameter_whatever_travels_together(
    ranks: RankPool, alone_bytes: int
) -> None:
    results = ranks.run(cases.sums, world=3, alone_bytes=alone_bytes)
    for grads in results:
        # Rank r has r + 1 everywhere: 1 + 2 + 3 = 6, scaled by 1/2.
        assert grads == {
            "float32": 3.0,
            "float64": 3.0,
            "on rank 1 only": 1.0,
            "on no rank": None,
            # 2**-12 more on every rank that has one: bfloat16 would lose it.
            "bfloat16": 3.0 + 1.5 * 2.0**-12,
            "bfloat16 on rank 1 only": 1.0 + 0.5 * 2.0**-12,
        }
