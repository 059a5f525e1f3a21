"""How the nodes of a job find each other, by files in the folder of the job's start.

Each node says that it is there; the head, the first one in the order, sees that all are and agree,
and writes where they meet, or what is wrong, which it alone then tells. Files and no name service,
because the nodes share the run's folder in any case, while their names may not resolve.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...comm.topology import Machine
from ..settings import ConfigError

_POLL_S = 0.1
_SHOWN = 8
_MEETING = "meeting.json"


@dataclass(frozen=True)
class Present:
    """What a node says of itself.

    Attributes:
        host, boot: its machine's, see `comm.topology.Machine`.
        order: the checksum of the order of nodes that it has found.
    """

    host: str
    boot: str
    order: str

    @property
    def machine(self) -> Machine:
        """The machine that the node is on."""
        return Machine(self.host, self.boot)


@dataclass(frozen=True)
class Meeting:
    """What the head tells all nodes.

    Attributes:
        address, port: where the ranks meet.
        preflight_port: where those of preflight do, before them.
        status: 0, or that with which all nodes end at once.
    """

    address: str = ""
    port: int = 0
    preflight_port: int = 0
    status: int = 0


def say_present(folder: Path, node: str, present: Present) -> None:
    """Tell the head that this node is there."""
    _write(folder / "nodes" / f"{node}.json", asdict(present))


def await_nodes(folder: Path, nodes: Sequence[str], *, timeout_s: float) -> dict[str, Present]:
    """On the head: what every node says of itself.

    Raises:
        ConfigError: some have not come within the limit; names them.
    """
    end = time.monotonic() + timeout_s
    while missing := sorted(set(nodes) - _names(folder / "nodes")):
        if time.monotonic() > end:
            shown = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
            raise ConfigError(
                f"{shown}: not there within {timeout_s:g} s, {len(nodes) - len(missing)} of "
                f"{len(nodes)} nodes are; see that {folder} is the same folder on all of them, and "
                "what they say above"
            )
        time.sleep(_POLL_S)
    return {node: Present(**_read(folder / "nodes" / f"{node}.json")) for node in nodes}


def require_one_order(found: Mapping[str, Present]) -> None:
    """Raise ConfigError unless all nodes have found the same order."""
    by_order: dict[str, list[str]] = {}
    for node, present in found.items():
        by_order.setdefault(present.order, []).append(node)
    if len(by_order) > 1:
        odd = min(by_order.values(), key=len)
        raise ConfigError(
            f"{', '.join(odd[:_SHOWN])}: another order of the nodes than on the rest; the folder "
            "of the run, or counterflow itself, is not the same there"
        )


def call_meeting(folder: Path, meeting: Meeting) -> None:
    """On the head: tell all nodes where they meet, or that they are to end."""
    _write(folder / _MEETING, asdict(meeting))


def await_meeting(folder: Path, head: str, *, timeout_s: float) -> Meeting:
    """On the other nodes: what the head tells.

    Raises:
        ConfigError: nothing within the limit.
    """
    end = time.monotonic() + timeout_s
    while _MEETING.removesuffix(".json") not in _names(folder):
        if time.monotonic() > end:
            raise ConfigError(
                f"node {head}, the head, has told nothing within {timeout_s:g} s; see what it "
                f"says, and that {folder} is the same folder on all nodes"
            )
        time.sleep(_POLL_S)
    return Meeting(**_read(folder / _MEETING))


def leave_status(folder: Path, node: str, status: int) -> None:
    """Leave this node's exit status for the job's script."""
    _write_text(folder / "status" / node, f"{status}\n")


def await_statuses(folder: Path, count: int, *, timeout_s: float) -> None:
    """Wait until so many nodes have left theirs, or the limit is over.

    A node that ends with another status than 0 makes Slurm end the rest at once, also where they
    are about to end alike.
    """
    end = time.monotonic() + timeout_s
    while time.monotonic() < end and len(_names(folder / "status")) < count:
        time.sleep(_POLL_S)


def _names(folder: Path) -> set[str]:
    """Names in a folder, without `.json`. Listing makes network file systems look again."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return set()
    return {name.removesuffix(".json") for name in names if not name.startswith(".")}


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, values: Mapping[str, object]) -> None:
    _write_text(path, json.dumps(values) + "\n")


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)  # at once: others may be reading
