"""Pairs that overlap between hosts of their own: the same gradients, and hidden communication."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import pytest

from bench import hosts
from bench.hosts import network
from tests import cases_overlap_hosts as cases
from tests.cases_overlap_hosts import Sizes
from tests.ranks import RankPool

pytestmark = pytest.mark.alone

LINK_MBIT = 200
SMALL = Sizes(layers=1, hidden=128, heads=4, inner=128, microbatches=4, sequences=4, length=64)


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """A rank on each of two hosts."""
    reason = hosts.why_not()
    if reason is not None:
        pytest.skip(f"no network of hosts here: {reason}")
    with network(2, link_mbit=LINK_MBIT, bucket_bytes=16 << 10) as pair, RankPool(hosts=pair) as p:
        yield p


def test_overlapped_pairs_between_hosts_hide_communication_and_train_the_same(
    pool: RankPool, tmp_path: Path
) -> None:
    shares: list[tuple[float, float]] = []
    for _ in range(3):  # a machine that stops a rank within its one measured step hides nothing
        found = pool.run(cases.with_and_without, world=2, sizes=SMALL, folder=str(tmp_path))
        for rank in found:
            assert rank["to_without"] == 0.0  # to the last bit
            assert rank["to_torch"] < cases.TOLERANCE
        hidden, without = (
            fmean(rank[name].share for rank in found) for name in ("hidden", "hidden_without")
        )
        shares.append((hidden, without))
        # Without overlap it is reordering of rows on a communicating thread that counts as
        # computing.
        if hidden > 2 * without:
            break
    else:
        pytest.fail(f"(hidden, hidden without overlap) are {shares}")


def test_phases_timed_one_by_one_are_all_those_of_a_layer(pool: RankPool) -> None:
    found = pool.run(cases.timed_phases, world=2, sizes=SMALL)
    for rank in found:
        assert set(rank.ms) == {
            f"{phase}({direction})"
            for phase in ("attn", "dispatch", "shared", "mlp", "combine")
            for direction in ("FB" if phase in ("dispatch", "combine") else "FBW")
        }
        tokens = SMALL.sequences * SMALL.length
        # Each token to the other host and back, twice, if an expert of it is there; with headers.
        assert 0.5 < rank.link_bytes / (4 * tokens * SMALL.hidden * 4) < 1.3
        # The link's rate is what these exchanges cannot be faster than, on the rank that began them
        # first: one that comes late finds some of the rows there.
        comm_ms = sum(max(of.ms[name] for of in found) for name in cases.COMMUNICATING)
        free = 4 * (16 << 10)
        assert comm_ms > (rank.link_bytes - free) * 8 / (LINK_MBIT * 1e3)
