"""Several hosts on one machine: network namespaces on one switch, with links of a chosen rate.

    with network(4, link_mbit=200, local_mbit=640) as hosts:
        with RankPool(hosts=[h for h in hosts for _ in range(2)]) as pool:   # two ranks a host
            ...

A host has one link to the switch and a loopback. Ranks on different hosts reach each other through
the links, ranks on one host through its loopback; nothing else is connected. `tc tbf` keeps a
link's rate in both directions: at the host for what leaves it, and at the switch's port for what
comes in, so that several senders to one host share its link.

The namespaces have no names. This process's file descriptors hold them, and so do the processes
that entered; when these end, however they end, the kernel removes namespaces, links and bridge.
Two runs cannot get in each other's way, and none can leave anything behind.

Needs Linux, root (CAP_SYS_ADMIN and CAP_NET_ADMIN) and iproute2; `why_not` says what is missing.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

T = TypeVar("T")

LINK = "uplink"  # a host's interface to the switch
LOOPBACK = "lo"

_CLONE_NEWNET = 0x40000000
_COMMAND_TIMEOUT_S = 60.0  # ip and tc wait for a lock of the kernel (RTNL)
_SYSTEM_PATHS = ("/usr/sbin", "/sbin")  # not in everybody's PATH
# Enough that a queue never overflows: a lost packet would be sent, and counted, twice.
_QUEUE_BYTES = 64 << 20
# tbf drops what is larger than its bucket: a loopback packet has 64 KiB and its headers.
BUCKET_BYTES = 128 << 10
_HEADER_BYTES = 14  # Ethernet's, which an mtu does not count


class NetworkError(RuntimeError):
    """This machine refused to make a network; the message says which step, and why."""


class Counters(NamedTuple):
    """Bytes and packets of an interface since it was made, headers included."""

    rx_bytes: int
    rx_packets: int
    tx_bytes: int
    tx_packets: int

    def since(self, earlier: Counters) -> Counters:
        """What was counted between `earlier` and now."""
        return Counters(*(a - b for a, b in zip(self, earlier, strict=True)))


@dataclass(frozen=True)
class Host:
    """A network namespace that acts as a host.

    Attributes:
        namespace: path by which a process enters it, valid while the network lasts.
        address: IPv4 address of its link.
    """

    namespace: str
    address: str

    def call(self, do: Callable[[], T]) -> T:
        """What `do()` returns in a thread of this process that is inside the host.

        Processes started there, and sockets made there, are the host's.
        """
        return _call_in(self.namespace, do)


def enter(namespace: str) -> None:
    """Move the calling thread, and threads and processes it starts later, into a namespace.

    Raises:
        OSError: the namespace is gone, or the kernel does not allow it.
    """
    descriptor = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # os.setns is in Python from 3.12 on.
        _checked(ctypes.CDLL(None, use_errno=True).setns, descriptor, _CLONE_NEWNET)
    finally:
        os.close(descriptor)


def counters(interface: str) -> Counters:
    """Counters of `interface` (LINK or LOOPBACK) of the host that the calling thread is in."""
    # Not /proc/net: that is the namespace of the process's first thread.
    for line in Path("/proc/thread-self/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == interface:
            rx_bytes, rx_packets, *_, tx_bytes, tx_packets = map(int, numbers.split()[:10])
            return Counters(rx_bytes, rx_packets, tx_bytes, tx_packets)
    raise ValueError(f"there is no interface {interface!r} here; a host has {LINK} and {LOOPBACK}")


@contextmanager
def network(
    num_hosts: int,
    *,
    link_mbit: float,
    local_mbit: float | None = None,
    mtu: int = 9000,
    bucket_bytes: int = BUCKET_BYTES,
) -> Iterator[tuple[Host, ...]]:
    """Hosts on one switch, for as long as the context lasts.

    Args:
        num_hosts: 1..250.
        link_mbit: rate of each host's link in either direction, 10^6 bit/s, Ethernet headers
            included.
        local_mbit: rate of each host's loopback, all its ranks together; None: as fast as it goes.
        mtu: largest IP packet of the links, bytes. A packet counted is a packet of this size at
            most: segments are not put together for the journey.
        bucket_bytes: what a link that was idle carries at once before it keeps its rate. Smaller
            than BUCKET_BYTES where messages are short and links often idle.

    Raises:
        ValueError: a size or a rate that cannot be.
        NetworkError: the machine cannot do it.
    """
    if not 1 <= num_hosts <= 250:
        raise ValueError(f"num_hosts must be 1..250, got {num_hosts}")
    if not 576 <= mtu <= 65535:
        raise ValueError(f"mtu must be 576..65535 bytes, got {mtu}")
    if bucket_bytes < mtu + _HEADER_BYTES:
        raise ValueError(
            f"bucket_bytes={bucket_bytes} must hold a packet of mtu={mtu} and its header of "
            f"{_HEADER_BYTES} bytes"
        )
    for name, rate in (("link_mbit", link_mbit), ("local_mbit", local_mbit)):
        if rate is not None and not rate > 0:
            raise ValueError(f"{name} must be above 0 Mbit/s, got {rate!r}")
    link = _shape(link_mbit, bucket_bytes)
    try:
        with ExitStack() as held:
            switch, *spaces = (_new_namespace(held) for _ in range(num_hosts + 1))
            hosts = tuple(Host(n, f"10.0.0.{i + 1}") for i, n in enumerate(spaces))
            _call_in(switch, lambda: _set_up_switch(hosts, link, mtu))
            for host in hosts:
                host.call(lambda host=host: _set_up_host(host, link, local_mbit, mtu))
            made = held.pop_all()
    except OSError as error:
        raise NetworkError(
            f"making network namespaces: {error}; that takes root, in a container a privileged one"
        ) from error
    with made:
        yield hosts


def why_not() -> str | None:
    """Why this machine cannot have a `network`, or None where it can; it is tried."""
    if sys.platform != "linux":
        return "network namespaces need Linux"
    try:
        with network(2, link_mbit=100, local_mbit=320):
            return None
    except NetworkError as error:
        return str(error)


def _new_namespace(held: ExitStack) -> str:
    """A new namespace, held by a descriptor of this process: the path that leads to it."""

    def make() -> int:
        _checked(ctypes.CDLL(None, use_errno=True).unshare, _CLONE_NEWNET)
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    descriptor = _in_thread(make)
    held.callback(os.close, descriptor)
    return f"/proc/{os.getpid()}/fd/{descriptor}"


def _set_up_switch(hosts: Sequence[Host], shape: str, mtu: int) -> None:
    _write_settings()
    ports = [f"port{i}" for i in range(len(hosts))]
    made = [
        f"link add name {port} mtu {mtu} type veth "
        f"peer name {LINK} mtu {mtu} netns {host.namespace}"
        for port, host in zip(ports, hosts, strict=True)
    ]
    joined = [f"link set {port} master bridge up gso_max_segs 1" for port in ports]
    _batch("ip", ["link add name bridge type bridge", *made, *joined, "link set bridge up"])
    _batch("tc", [f"qdisc add dev {port} {shape}" for port in ports])


def _set_up_host(host: Host, shape: str, local_mbit: float | None, mtu: int) -> None:
    _write_settings()
    _batch(
        "ip",
        [
            f"link set {LOOPBACK} up",
            f"address add {host.address}/24 dev {LINK}",
            f"link set {LINK} mtu {mtu} gso_max_segs 1 up",
        ],
    )
    shapes = {LINK: shape}
    if local_mbit is not None:
        shapes[LOOPBACK] = _shape(local_mbit, BUCKET_BYTES)
    _batch("tc", [f"qdisc add dev {name} {shape}" for name, shape in shapes.items()])


def _write_settings() -> None:
    settings = Path("/proc/sys/net")
    # No neighbour discovery between the counted packets.
    for which in ("default", "all"):
        path = settings / f"ipv6/conf/{which}/disable_ipv6"
        if path.exists():
            path.write_text("1")
    # Nothing is lost here, so the plainest control fills a link; others probe, or slow down when a
    # queue builds up, and a link that was idle would start slowly again.
    (settings / "ipv4/tcp_congestion_control").write_text("reno")
    (settings / "ipv4/tcp_slow_start_after_idle").write_text("0")


def _shape(mbit: float, bucket_bytes: int) -> str:
    rate = round(mbit * 1e6)
    return f"root tbf rate {rate}bit burst {bucket_bytes} limit {_QUEUE_BYTES}"


def _batch(command: str, lines: Sequence[str]) -> None:
    """Run `ip` or `tc` with these command lines, in the calling thread's namespace."""
    places = [os.environ.get("PATH", os.defpath), *_SYSTEM_PATHS]
    program = shutil.which(command, path=os.pathsep.join(places))
    if program is None:
        raise NetworkError(f"{command} was not found; Debian has it in the package iproute2")
    try:
        ran = subprocess.run(
            [program, "-batch", "-"],
            input="\n".join(lines) + "\n",
            capture_output=True,
            text=True,
            timeout=_COMMAND_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise NetworkError(f"{command} took longer than {_COMMAND_TIMEOUT_S:g} s") from error
    if ran.returncode:
        raise NetworkError(f"{command}: {' '.join(ran.stderr.split())} (of: {'; '.join(lines)})")


def _call_in(namespace: str, do: Callable[[], T]) -> T:
    def entered() -> T:
        enter(namespace)
        return do()

    return _in_thread(entered)


def _in_thread(do: Callable[[], T]) -> T:
    """What `do()` returns in a thread of its own, whose namespace ends with it."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(do())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _checked(call: Callable[..., int], *arguments: int) -> None:
    if call(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
