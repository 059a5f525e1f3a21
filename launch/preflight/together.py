"""What the ranks of all nodes find out together: the same versions, clocks and folder.

A collective of all ranks, through whatever gathers values among them.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from .finding import Finding, decided
from .versions import clock_findings, folder_findings, version_findings

T = TypeVar("T")

# A network file system may show a new file only after its clients' caches have aged.
_SEEN_WITHIN_S = 10.0


class Gather(Protocol):
    """Gives every rank the values of all, by rank; `what` they are is told in errors."""

    def __call__(self, value: T, what: str) -> list[T]: ...


@dataclass(frozen=True)
class _Told:
    """What one rank tells the others.

    Attributes:
        node: the name of its node.
        versions: by name.
        seconds: the time of day at a moment that all have in common.
        sees: whether it sees what rank 0 wrote to the run's folder.
        findings: of its node, from one rank of it.
    """

    node: str
    versions: Mapping[str, str]
    seconds: float
    sees: bool
    findings: Sequence[Finding]


def look_together(
    gather: Gather,
    *,
    rank: int,
    node: str,
    versions: Mapping[str, str],
    findings: Sequence[Finding],
    folder: Path | None,
    clock: Callable[[], float] = time.time,
) -> list[Finding]:
    """Findings of all nodes and those that come of comparing them; the same on every rank.

    Nodes that have found themselves unfit take part: only here it is seen whether most have.

    Args:
        gather: among all ranks; a collective.
        rank: this one.
        node: the name of its node.
        versions: what it runs with.
        findings: what was found on its node, given by one of the node's ranks.
        folder: of the run, which all should see; None leaves that out.
        clock: the time of day, seconds.

    Raises:
        CommError: other ranks did not answer.
    """
    token, problem = _leave_token(folder) if rank == 0 and folder is not None else ("", "")
    try:
        told = gather((token, problem), "come to preflight")
        seconds = clock()
        token, problem = told[0]
        sees = not token or _sees(Path(token))
        mine = _Told(node, versions, seconds, sees, findings)
        ranks = gather(mine, "tell what they found")
    finally:
        if rank == 0 and token:
            Path(token).unlink(missing_ok=True)
    nodes = [one.node for one in ranks]
    found = [finding for one in ranks for finding in one.findings]
    found += version_findings([one.versions for one in ranks], nodes)
    found += clock_findings([one.seconds for one in ranks], nodes)
    if problem:
        message = f"{folder} cannot be written by rank 0: {problem}; set run.folder to one that can"
        found.append(Finding("folder", "bad", message))
    else:
        found += folder_findings([one.sees for one in ranks], nodes, str(folder))
    return decided(found, nodes)


def _leave_token(folder: Path) -> tuple[str, str]:
    """A new file in the folder: its path, and why there is none."""
    path = folder.absolute() / f".preflight-{secrets.token_hex(8)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name, encoding="ascii")
    except OSError as error:
        return "", error.strerror or str(error)
    return str(path), ""


def _sees(path: Path) -> bool:
    """Whether the file with this name in it appears within the limit."""
    end = time.monotonic() + _SEEN_WITHIN_S
    while True:
        try:
            os.listdir(path.parent)  # makes a client of NFS ask its server
            if path.read_text(encoding="ascii", errors="replace") == path.name:
                return True
        except OSError:
            pass
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
