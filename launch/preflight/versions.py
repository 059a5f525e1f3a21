"""What all ranks must have alike: versions, the time of day, and one folder of the run.

Pure functions of what every rank tells of itself; `together` gathers that.
"""

from __future__ import annotations

import platform
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence

from .finding import Finding, Verdict

# Further apart, the lines of several hosts' logs and the steps of their traces are out of order.
_MOST_SECONDS_APART = 1.0
# Of what may differ by a name: the rest must be the same.
_MAY_DIFFER = ("driver", "Linux")


def find_versions(driver: str) -> dict[str, str]:
    """What this rank runs with, by name. Imports torch.

    Args:
        driver: of NVIDIA, "" if there is none.
    """
    import torch

    from counterflow import __version__  # the root package is no room

    try:
        nccl = ".".join(map(str, torch.cuda.nccl.version()))  # pyright: ignore
    except Exception:  # a torch without it
        nccl = "none"
    return {
        "counterflow": __version__,
        "Python": platform.python_version(),
        "torch": str(torch.__version__),
        "CUDA": torch.version.cuda or "none",
        "NCCL": nccl,
        "driver": driver or "none",
        "Linux": platform.release(),
    }


def version_findings(versions: Sequence[Mapping[str, str]], nodes: Sequence[str]) -> list[Finding]:
    """Nodes whose versions are not those that most ranks have.

    Args:
        versions: of each rank, by name.
        nodes: the name of each rank's node.
    """
    found: dict[Finding, None] = {}
    for name in versions[0]:
        told = [version.get(name, "none") for version in versions]
        # Of as many the first: rank 0's, if it is among them.
        usual = Counter(told).most_common(1)[0][0]
        verdict: Verdict = "warning" if name in _MAY_DIFFER else "bad"
        for version, node in zip(told, nodes, strict=True):
            if version != usual:
                message = f"{name} is {version}, on most ranks {usual}; install the same everywhere"
                found[Finding("versions", verdict, message, node, kind=name)] = None
    return list(found)


def clock_findings(seconds: Sequence[float], nodes: Sequence[str]) -> list[Finding]:
    """Nodes whose clock is not that of the others, within a second.

    Args:
        seconds: each rank's time of day, read when all had come together.
        nodes: the name of each rank's node.
    """
    middle = statistics.median(seconds)
    found: dict[str, Finding] = {}
    for time, node in zip(seconds, nodes, strict=True):
        apart = time - middle
        if abs(apart) > _MOST_SECONDS_APART:
            message = (
                f"the clock is {abs(apart):.0f} s {'ahead of' if apart > 0 else 'behind'} the "
                "others'; start chrony or ntpd"
            )
            found.setdefault(node, Finding("clock", "warning", message, node))
    return list(found.values())


def folder_findings(sees: Sequence[bool], nodes: Sequence[str], folder: str) -> list[Finding]:
    """Nodes that do not see what rank 0 has written to the run's folder.

    If most of the other nodes do not, the folder is not shared, which is the job's mistake.

    Args:
        sees: of each rank, whether it sees the file.
        nodes: the name of each rank's node.
        folder: of the run.
    """
    blind = list(dict.fromkeys(n for saw, n in zip(sees, nodes, strict=True) if not saw))
    others = {node for node in nodes if node != nodes[0]}
    if not blind:
        return []
    if 2 * len(blind) > len(others):
        message = (
            f"{len(blind)} of {len(others)} other nodes do not see what rank 0 writes to {folder}; "
            "set run.folder to one on a file system that all nodes share"
        )
        return [Finding("folder", "bad", message)]
    message = f"does not see what rank 0 writes to {folder}; see whether it is mounted"
    return [Finding("folder", "bad", message, node) for node in blind]
