"""Fixtures that every room's tests share."""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.ranks import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """A pool of processes; `ranks.run(case, world=4, ...)` runs a case on four ranks over gloo."""
    with RankPool() as pool:
        yield pool
