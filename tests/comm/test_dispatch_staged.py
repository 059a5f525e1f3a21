"""Dispatch in two steps: the same rows, and nothing of the device's touched out of turn."""

from __future__ import annotations

import pytest

from tests import cases_staged as cases
from tests.ranks import RankPool


@pytest.mark.parametrize("name", ["flat", "two_hop"])
def test_in_two_steps_the_same_arrives_as_in_one(ranks: RankPool, name: cases.Name) -> None:
    assert all(ranks.run(cases.same_as_in_one_step, world=4, name=name))


@pytest.mark.parametrize("name", ["dedup", "two_hop"])
def test_the_counts_end_without_work_on_the_devices_tensors(
    ranks: RankPool, name: cases.Name
) -> None:
    # On a GPU such work would be on the caller's stream, for which the rows do not wait.
    assert ranks.run(cases.touched_by_counts, world=4, name=name) == [0] * 4


def test_what_one_rank_has_wrong_all_of_them_refuse(ranks: RankPool) -> None:
    told = ranks.run(cases.refused, world=4)
    assert all(text for text in told)
    assert "weights_TK" in told[1]
