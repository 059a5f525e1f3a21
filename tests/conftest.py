"""Fixtures that every room's tests share, and how tests run in two processes at once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests import beside, tries
from tests.ranks import RankPool

if TYPE_CHECKING:
    from xdist.scheduler import LoadFileScheduling
    from xdist.workermanage import WorkerController


def pytest_configure(config: pytest.Config) -> None:
    beside.configure(config)
    with suppress(ImportError):  # a machine for the tests of the GPU may lack it
        from hypothesis import HealthCheck, settings

        # Other processes share the machine: how long an example takes says nothing.
        slow = [HealthCheck.too_slow]
        settings.register_profile("shared", deadline=None, suppress_health_check=slow)
        settings.load_profile("shared")


pytest_runtest_setup = tries.pytest_runtest_setup


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_configure_node(node: WorkerController) -> None:
    beside.configure_node(node)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    return beside.scheduler(config, log)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """A pool of processes; `ranks.run(case, world=4, ...)` runs a case on four ranks over gloo."""
    with RankPool() as pool:
        yield pool
