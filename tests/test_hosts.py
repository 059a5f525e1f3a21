"""Hosts in network namespaces: which interface carries what, at what rate, and what remains."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import hosts
from bench.hosts import Host, NetworkError, network
from tests import cases_hosts as cases
from tests.ranks import RankPool

pytestmark = pytest.mark.alone

LINK_MBIT, LOCAL_MBIT = 200, 640
NUM_BYTES = 5_000_000


@pytest.fixture(scope="module")
def possible() -> None:
    reason = hosts.why_not()
    if reason is not None:
        pytest.skip(f"no network of hosts here: {reason}")


@pytest.fixture(scope="module")
def pair(possible: None) -> Iterator[tuple[Host, ...]]:
    with network(2, link_mbit=LINK_MBIT, local_mbit=LOCAL_MBIT) as made:
        yield made


@pytest.fixture(scope="module")
def pool(pair: tuple[Host, ...]) -> Iterator[RankPool]:
    """Ranks 0 and 1 on the first host, 2 and 3 on the second."""
    with RankPool(hosts=[host for host in pair for _ in range(2)]) as made:
        yield made


def least_seconds(num_bytes: int, mbit: float) -> float:
    """For this many bytes at this rate; what the bucket holds leaves at once."""
    return (num_bytes - hosts.BUCKET_BYTES) * 8 / (mbit * 1e6)


def test_ranks_on_two_hosts_talk_through_the_shaped_links(pool: RankPool) -> None:
    # Both ranks of a host at once, in both directions: they share its link.
    pairs = [(0, 2), (1, 3), (2, 0), (3, 1)]
    seconds, seen = pool.run(cases.transfer, world=4, pairs=pairs, num_bytes=NUM_BYTES)[0]
    # Headers and acknowledgements are about 1.2% of packets of 9000 bytes.
    assert 2 * NUM_BYTES < seen.link.tx_bytes < 2 * NUM_BYTES * 1.03
    assert 2 * NUM_BYTES < seen.link.rx_bytes < 2 * NUM_BYTES * 1.03
    assert seen.link.tx_packets > 2 * NUM_BYTES / 9000
    assert seen.loopback.tx_bytes < NUM_BYTES / 100
    assert seconds > least_seconds(2 * NUM_BYTES, LINK_MBIT)


@pytest.mark.usefixtures("possible")
def test_several_senders_share_the_link_of_the_host_that_they_send_to() -> None:
    with network(3, link_mbit=LINK_MBIT, mtu=1500) as three, RankPool(hosts=three) as pool:
        pairs = [(0, 2), (1, 2)]
        found = pool.run(cases.transfer, world=3, pairs=pairs, num_bytes=NUM_BYTES)
    assert found[2][1].link.rx_bytes > 2 * NUM_BYTES
    assert found[0][1].link.tx_packets > NUM_BYTES / 1500
    # Headers are 4.5% of packets of 1500 bytes; and nothing was lost and sent again.
    assert found[0][1].link.tx_bytes < 1.07 * NUM_BYTES
    assert found[0][0] > least_seconds(2 * NUM_BYTES, LINK_MBIT)


def test_ranks_of_one_host_talk_through_its_loopback_alone(pool: RankPool) -> None:
    pairs = [(0, 1), (1, 0), (2, 3), (3, 2)]
    seconds, seen = pool.run(cases.transfer, world=4, pairs=pairs, num_bytes=NUM_BYTES)[0]
    assert 2 * NUM_BYTES < seen.loopback.tx_bytes < 2 * NUM_BYTES * 1.03
    assert seen.link.tx_bytes < NUM_BYTES / 100
    assert seconds > least_seconds(2 * NUM_BYTES, LOCAL_MBIT)


@pytest.mark.usefixtures("possible")
def test_nothing_of_a_network_shows_on_the_machine_or_outlives_its_process() -> None:
    own = set(os.listdir("/sys/class/net"))
    code = """
from bench.hosts import network
from tests.cases_hosts import stay
from tests.ranks import RankPool

if __name__ == "__main__":
    with network(2, link_mbit=100) as pair, RankPool(hosts=pair) as pool:
        pool.run(stay, world=2, say=pair[0].namespace)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        namespace = Path(owner.stdout.readline().strip())  # its ranks are in the case by now
        inode = namespace.stat().st_ino
        assert set(os.listdir("/sys/class/net")) == own
        assert inode in namespaces_in_use()
        owner.send_signal(signal.SIGKILL)
        owner.wait(60)
    end = time.monotonic() + 60  # the ranks learn of it, and end too
    while inode in namespaces_in_use() and time.monotonic() < end:
        time.sleep(0.05)
    assert inode not in namespaces_in_use()
    assert not namespace.exists()
    assert set(os.listdir("/sys/class/net")) == own


def namespaces_in_use() -> set[int]:
    """Network namespaces that a process is in or holds open; the kernel removes all others."""
    found: set[int] = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(link).startswith("net:["):
                found.add(link.stat().st_ino)
    for link in Path("/proc").glob("[0-9]*/ns/net"):
        with contextlib.suppress(OSError):
            found.add(link.stat().st_ino)
    return found


def test_more_ranks_than_hosts_are_refused(pair: tuple[Host, ...]) -> None:
    with RankPool(hosts=pair) as pool, pytest.raises(ValueError, match="3 ranks, but hosts for 2"):
        pool.run(cases.transfer, world=3, pairs=[], num_bytes=0)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"num_hosts": 0, "link_mbit": 1.0}, "num_hosts must be 1..250, got 0"),
        ({"num_hosts": 2, "link_mbit": 0.0}, "link_mbit must be above 0 Mbit/s"),
        ({"num_hosts": 2, "link_mbit": 1.0, "local_mbit": -1.0}, "local_mbit must be above 0"),
        ({"num_hosts": 2, "link_mbit": 1.0, "mtu": 100}, "mtu must be 576..65535 bytes, got 100"),
        (
            {"num_hosts": 2, "link_mbit": 1.0, "bucket_bytes": 9000},
            "bucket_bytes=9000 must hold a packet of mtu=9000 and its header of 14 bytes",
        ),
    ],
)
def test_impossible_sizes_are_refused(sizes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason), network(**sizes):
        pass


def test_missing_programs_are_named_with_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(hosts, "_SYSTEM_PATHS", ())
    with pytest.raises(NetworkError, match="ip was not found; Debian has it in"):
        hosts._batch("ip", [])
