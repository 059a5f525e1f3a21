"""How the nodes of a job find each other, by files in the folder of the job's start.

Each node says that it is there; the head, the first one in the order, sees that all are and agree,
and writes where they meet, or what is wrong, which it alone then tells. Files and no name service,
because the nodes share the run's folder in any case, while their names may not resolve.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...comm.topology import Machine
from ..settings import ConfigError

_FIRST_POLL_S, _MOST_POLL_S = 0.1, 2.0  # a thousand nodes ask one file system
_SHOWN = 8
_MEETING, _PORT = "meeting", "port"


class NotThereError(RuntimeError):
    """Nodes have not come to the roll call: no mistake of a person's.

    Attributes:
        nodes: their names.
    """

    def __init__(self, nodes: Sequence[str], text: str) -> None:
        super().__init__(text)
        self.nodes = tuple(nodes)


@dataclass(frozen=True)
class Present:
    """What a node says of itself.

    Attributes:
        host, boot: its machine's, see `comm.topology.Machine`.
        order: the checksum of the order of nodes that it has found.
        token: of this start, see `token_of`.
    """

    host: str
    boot: str
    order: str
    token: str

    @property
    def machine(self) -> Machine:
        """The machine that the node is on."""
        return Machine(self.host, self.boot)


@dataclass(frozen=True)
class Meeting:
    """What the head tells all nodes.

    Attributes:
        token: of this start; a meeting of another one is passed over.
        address: where the ranks meet.
        preflight_port: where those of preflight do; for training see `call_port`.
        status: 0, or that with which all nodes end at once.
    """

    token: str
    address: str = ""
    preflight_port: int = 0
    status: int = 0


def token_of(environ: Mapping[str, str]) -> str:
    """What all nodes of one start know and those of no other do.

    A folder may hold what an earlier start left, of this job or, as numbers come again, another's.
    """
    names = ["SLURM_JOB_ID_HET_GROUP_0", "SLURM_RESTART_COUNT", "SLURM_STEP_ID"]
    if not environ.get("SLURM_HET_SIZE"):  # its components have these of their own
        names += ["SLURM_JOB_ID", "SLURM_SRUN_COMM_PORT"]
    text = "\n".join(environ.get(name, "") for name in names)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def find_folder(folder: Path, *, make: bool, timeout_s: float) -> None:
    """Wait for the folder of the job's start, which another one makes; or make it.

    A node that does not share it must not make one of its own, where it would wait for nobody.

    Args:
        folder: of this start.
        make: whether this node is to make it.
        timeout_s: limit of the wait, seconds.

    Raises:
        NotThereError: it is not there within the limit.
    """
    if make:
        folder.mkdir(parents=True, exist_ok=True)
    for _ in _waits(timeout_s):
        if folder.is_dir():
            return
        _names(folder.parent)  # listing makes network file systems look again
    raise NotThereError(
        (), f"{folder} is not there: this node does not see the run's folder; see to its mounts"
    )


def say_present(folder: Path, node: str, present: Present) -> None:
    """Tell the head that this node is there."""
    _write(folder / "nodes" / f"{node}.json", asdict(present))


def await_nodes(
    folder: Path, nodes: Sequence[str], token: str, *, timeout_s: float
) -> dict[str, Present]:
    """On the head: what every node says of itself, by node in the order of `nodes`.

    Raises:
        NotThereError: some have not come within the limit.
    """
    found: dict[str, Present] = {}
    wanted = frozenset(nodes)
    for _ in _waits(timeout_s):
        for node in (_names(folder / "nodes") & wanted) - found.keys():
            present = Present(**_read(folder / "nodes" / f"{node}.json"))
            if present.token == token:
                found[node] = present
        if len(found) == len(wanted):
            return {node: found[node] for node in nodes}
    missing = [node for node in nodes if node not in found]
    shown = ", ".join(missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
    raise NotThereError(
        missing,
        f"{shown}: not there within {timeout_s:g} s, {len(found)} of {len(nodes)} nodes are; see "
        f"that {folder} is the same folder on all of them, and what they say above",
    )


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
    _write(folder / f"{_MEETING}.json", asdict(meeting))


def await_meeting(folder: Path, head: str, token: str, *, timeout_s: float) -> Meeting:
    """On the other nodes: what the head tells.

    Raises:
        NotThereError: nothing within the limit; names the head.
    """
    return Meeting(**_await(folder, _MEETING, head, token, timeout_s))


def call_port(folder: Path, token: str, port: int) -> None:
    """On the head: tell all nodes the port of the training."""
    _write(folder / f"{_PORT}.json", {"token": token, "port": port})


def await_port(folder: Path, head: str, token: str, *, timeout_s: float) -> int:
    """On the other nodes: the port of the training.

    Raises:
        NotThereError: nothing within the limit; names the head.
    """
    return int(_await(folder, _PORT, head, token, timeout_s)["port"])


def _await(folder: Path, name: str, head: str, token: str, timeout_s: float) -> dict[str, Any]:
    """What the head has left under this name in this start."""
    for _ in _waits(timeout_s):
        if name in _names(folder):
            told = _read(folder / f"{name}.json")
            if told["token"] == token:
                return told
    raise NotThereError(
        [head],
        f"node {head}, the head, has told nothing within {timeout_s:g} s; see what it says, and "
        f"that {folder} is the same folder on all nodes",
    )


def leave_status(folder: Path, node: str, status: int) -> None:
    """Leave this node's exit status for the job's script."""
    _write_text(folder / "status" / node, f"{status}\n")


def await_statuses(
    folder: Path, count: int, token: str, *, is_head: bool, timeout_s: float
) -> None:
    """Wait until so many nodes have left theirs, or the limit is over.

    A node that ends with another status than 0 makes Slurm end the rest at once, also where they
    are about to end alike. The head alone counts; the others look for its word.
    """
    over = f"over-{token}"
    for _ in _waits(timeout_s):
        if is_head and len(_names(folder / "status")) >= count:
            _write_text(folder / over, "")
            return
        if not is_head and over in _names(folder):
            return


def _waits(timeout_s: float) -> Iterator[None]:
    """Goes on until the limit is over, more and more slowly."""
    end, pause_s = time.monotonic() + timeout_s, _FIRST_POLL_S
    while True:
        yield
        left_s = end - time.monotonic()
        if left_s <= 0:
            return
        time.sleep(min(pause_s, left_s))
        pause_s = min(1.3 * pause_s, _MOST_POLL_S)


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
    path.parent.mkdir(exist_ok=True)  # one level: the folder above is `find_folder`'s
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)  # at once: others may be reading
