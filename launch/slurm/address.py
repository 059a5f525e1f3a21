"""Where the ranks of a job meet: an address of its head that all nodes reach, and a port."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from collections.abc import Mapping, Sequence

from ..settings import ConfigError

# Below the ports that Linux gives to outgoing connections (from 32768).
FIRST_PORT, NUM_PORTS = 20000, 12000
_TRIES = 16
_SIOCGIFADDR = 0x8915  # linux/sockios.h


def head_address(
    names: Sequence[str], others: Sequence[str], *, interface: str, one_machine: bool
) -> str:
    """On the head, the address at which the other nodes reach it.

    Args:
        names: of the head itself, the likeliest first.
        others: names of other nodes.
        interface: the one to take, "" to find out.
        one_machine: whether all nodes are this machine.

    Raises:
        ConfigError: there is none; says what to do.
    """
    if interface:
        return interface_address(interface)
    resolved = [address for name in names for address in addresses_of(name)]
    good = [address for address in resolved if not ipaddress.ip_address(address).is_loopback]
    if good:
        return good[0]
    if one_machine:
        return "127.0.0.1"
    for name in others[:4]:
        for address in addresses_of(name):
            source = source_address(address)
            if source and not ipaddress.ip_address(source).is_loopback:
                return source
    what = f"resolves to {resolved[0]}, the node itself" if resolved else "does not resolve"
    raise ConfigError(
        f"{names[0]} {what}, so the other nodes cannot reach this head of the job; give the "
        "network interface to meet over with --interface (here are "
        f"{', '.join(interfaces()) or 'none'}), or correct the nodes' names"
    )


def addresses_of(name: str) -> list[str]:
    """The addresses that a name resolves to, IPv4 first."""
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    ordered = sorted(found, key=lambda entry: entry[0] != socket.AF_INET)
    return list(dict.fromkeys(str(entry[4][0]).partition("%")[0] for entry in ordered))


def source_address(target: str) -> str:
    """This machine's address on the way to another one's, "" if there is no way. Sends nothing."""
    family = socket.AF_INET6 if ":" in target else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((target, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def interfaces() -> list[str]:
    """Names of this machine's network interfaces but the loopback."""
    return [name for _, name in socket.if_nameindex() if name != "lo"]


def interface_address(name: str) -> str:
    """The IPv4 address of a network interface.

    Raises:
        ConfigError: there is no such interface here, or it has none.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        asked = struct.pack("256s", name.encode())
        try:
            answer = fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, asked)
        except OSError as error:
            raise ConfigError(
                f"--interface {name}: no IPv4 address to be had on {socket.gethostname()} "
                f"({error.strerror}); it has {', '.join(interfaces()) or 'only the loopback'}"
            ) from None
    return socket.inet_ntoa(answer[20:24])


def interface_towards(address: str) -> str:
    """The interface over which this machine reaches an address, "" if that is not to be told."""
    source = source_address(address)
    for _, name in socket.if_nameindex():
        try:
            if interface_address(name) == source:
                return name
        except ConfigError:
            continue
    return ""


def derived_port(environ: Mapping[str, str]) -> int:
    """A port by the numbers of job, step and start, so that neighbours seldom want the same one.

    A job that was queued again may find what its earlier start has not taken down yet.
    """
    names = {"SLURM_JOB_ID": 17, "SLURM_STEP_ID": 5, "SLURM_RESTART_COUNT": 1}
    texts = {name: environ.get(name, "") for name in names}
    number = sum(
        factor * int(texts[name]) for name, factor in names.items() if texts[name].isdecimal()
    )
    return FIRST_PORT + number % NUM_PORTS


class PortTakenError(ConfigError):
    """Nobody asked for this port, and others have it."""


def open_port(wanted: int, derived: int, *, besides: int = 0) -> int:
    """On the head, the port to meet at: the one that is wanted, else a free one near `derived`.

    Args:
        wanted: 0 for any.
        derived: see `derived_port`.
        besides: one that is taken already.

    Raises:
        ConfigError: it is in use.
        PortTakenError: all of those near `derived` are.
    """
    if wanted:
        if _is_free(wanted):
            return wanted
        raise ConfigError(
            f"run.port={wanted} is in use on the job's head {socket.gethostname()}; choose another "
            "port, or 0 for one by the job's number"
        )
    for step in range(_TRIES):
        port = FIRST_PORT + (derived - FIRST_PORT + step) % NUM_PORTS
        if port != besides and _is_free(port):
            return port
    raise PortTakenError(
        f"ports {derived} to {derived + _TRIES - 1} are all in use on the job's head "
        f"{socket.gethostname()}; give a free one with --run.port"
    )


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As the rendezvous does it: a port that a run has just left is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen(1)
        except OSError:
            return False
    return True
