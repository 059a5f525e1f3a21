"""One cluster for all tests of this folder, empty at the start of each."""

from collections.abc import Iterator

import pytest

from . import cluster
from .cluster import Cluster


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[Cluster]:
    reason = cluster.why_not()
    if reason is not None:
        pytest.skip(reason)
    with cluster.cluster() as made:
        yield made


@pytest.fixture
def slurm(shared_cluster: Cluster) -> Iterator[Cluster]:
    """Four idle nodes; jobs that a test leaves are cancelled, nodes that it took down come back."""
    yield shared_cluster
    shared_cluster.clear()
