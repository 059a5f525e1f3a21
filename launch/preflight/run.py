"""Preflight as it runs: one machine's checks, and a node's part in those of a whole job."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ...comm.topology import NearestNics, Nic, find_nics, nearest_nics, pci_place
from ...comm.topology.health import GpusHealth, find_health
from ..life.status import DONE
from .command import command_findings
from .environment import Circumstances, environment_findings
from .finding import Finding, bad_nodes, lines, or_ok, status_of
from .gpu import gpu_findings
from .nic import interface_findings, nic_findings
from .nodes import node_name, note_bad_nodes

if TYPE_CHECKING:
    from ..config import Config
    from .memory import MemoryEstimate

_log = logging.getLogger(__name__)
_PCI = Path("/sys/bus/pci/devices")


class Start(Protocol):
    """Runs `python -m counterflow ARGUMENTS` as ranks of this node's; returns the exit status."""

    def __call__(self, arguments: Sequence[str], *, nproc: int) -> int: ...


def node_findings(
    environ: Mapping[str, str],
    *,
    node: str,
    ranks: int,
    gpus_wanted: int | None,
    health: GpusHealth | None = None,
    nics: Sequence[Nic] | None = None,
    command: str = "",
    command_timeout_s: float = 60.0,
) -> list[Finding]:
    """What is wrong with this node: GPUs, network cards, environment, and the site's own check.

    Args:
        environ: that the ranks get.
        node: this one's name.
        ranks: of the run on it.
        gpus_wanted: that the run needs here, 0 for a run on CPUs; None takes those that there are.
        health, nics: of this machine; looked at now where None.
        command, command_timeout_s: preflight's keys.
    """
    if health is None:
        health = GpusHealth() if gpus_wanted == 0 else find_health()
    if nics is None:
        nics = find_nics()
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    on = Circumstances(ranks, cores, gpus=bool(health.gpus) or bool(gpus_wanted))
    return [
        *or_ok("gpu", gpu_findings(health, wanted=gpus_wanted, node=node), node),
        *or_ok("nic", nic_findings(nics, _nearest(health, nics), node), node),
        *or_ok(
            "environment",
            [
                *environment_findings(environ, on, node),
                *interface_findings(nics, environ, node),
            ],
            node,
        ),
        *command_findings(command, timeout_s=command_timeout_s, node=node),
    ]


def config_findings(
    config: Config,
    *,
    device: str,
    memory_bytes: int,
    ranks: int,
    node: str = "",
    estimate: MemoryEstimate | None = None,
) -> list[Finding]:
    """Whether a run's checkpoints fit its disk, and its ranks the memory.

    Args:
        config: of the run.
        device: "cuda" or "cpu".
        memory_bytes: of a GPU, or without GPUs of the machine; 0 if unknown.
        ranks: of the run on this machine.
        node: its name.
        estimate: of the memory, where it is known already.

    Raises:
        ValueError: parts of the configuration do not fit each other.
    """
    from ..check import step_schedules
    from .disk import disk_findings
    from .memory import estimate_memory, memory_findings
    from .sizes import checkpoint_bytes

    schedule = step_schedules(config)[config.schedule.microbatches]
    estimate = estimate or estimate_memory(config, schedule, device=device)
    memory = memory_findings(estimate, memory_bytes=memory_bytes, ranks=ranks, node=node)
    disk = disk_findings(config, checkpoint_bytes(config, schedule))
    return [*or_ok("memory", memory), *or_ok("disk", disk)]


def preflight(
    config: Config, *, nproc: int, gpus_wanted: int, environ: Mapping[str, str]
) -> list[Finding]:
    """What one machine can find out by itself, before there are ranks.

    Args:
        config: of the run.
        nproc: ranks that this machine gets.
        gpus_wanted: GPUs that they need, 0 for a run on CPUs.
        environ: that they get; the launcher sets OMP_NUM_THREADS where it is not set.

    Raises:
        ValueError: parts of the configuration do not fit each other.
    """
    node, section = node_name(environ), config.preflight
    health = find_health() if gpus_wanted else GpusHealth()
    return [
        *node_findings(
            {"OMP_NUM_THREADS": "1", **environ},
            node=node,
            ranks=nproc,
            gpus_wanted=gpus_wanted,
            health=health,
            command=section.command,
            command_timeout_s=section.command_timeout_s,
        ),
        *config_findings(
            config,
            device="cuda" if gpus_wanted else "cpu",
            memory_bytes=memory_of_rank(health) if gpus_wanted else memory_of_machine(),
            ranks=nproc,
            node=node,
        ),
    ]


def before_training(
    config: Config,
    config_path: Path,
    *,
    nproc: int,
    gpus_wanted: int,
    environ: Mapping[str, str],
    num_nodes: int = 1,
    start: Start | None = None,
) -> int:
    """All of preflight on one of a job's nodes: alone first, then with the others.

    What makes a node or the job unfit is printed, and unfit nodes' names are added to the file that
    COUNTERFLOW_BAD_NODES names. A node that finds itself unfit does not meet the others, who are
    ended with the job. Warnings are printed once: by the only node, or by rank 0 for all nodes.

    Args:
        config: of the run.
        config_path: the file that it can be read from on every node.
        nproc: ranks that each node gets.
        gpus_wanted: GPUs that they need on a node, 0 for a run on CPUs.
        environ: that they get.
        num_nodes: of the job; each calls this.
        start: runs a command of this program as ranks that meet those of the other nodes.

    Returns:
        DONE, BAD_NODE, or MISTAKE where no other node would do; or how `start` ended.
    """
    section = config.preflight
    if not section.enabled:
        return DONE
    together = start is not None and (section.bandwidth or (section.together and num_nodes > 1))
    findings = preflight(config, nproc=nproc, gpus_wanted=gpus_wanted, environ=environ)
    status = status_of(findings)
    if status or not together:
        # A mistake of the job's is found by every node; the others' warnings come together.
        shown = [f for f in findings if f.verdict == "bad"] if num_nodes > 1 else findings
        tell(shown, environ)
        return status
    assert start is not None
    with tempfile.TemporaryDirectory(prefix="counterflow-preflight-") as folder:
        told = Path(folder) / "status"
        command = ["doctor", "--preflight", "--config", str(config_path)]
        command += ["--gpus-wanted", str(gpus_wanted), "--status-to", str(told)]
        command += ["--timeout-s", f"{config.run.timeout_s:g}"]
        ended = start(command, nproc=nproc if section.bandwidth else 1)
        return int(told.read_text(encoding="ascii")) if not ended and told.exists() else ended


def tell(findings: Sequence[Finding], environ: Mapping[str, str]) -> None:
    """Print what is worth it, and note bad nodes in the job's file."""
    for line in lines(findings):
        print(f"preflight: {line}", file=sys.stderr)
    if status_of(findings) == DONE:
        return
    try:
        note_bad_nodes(bad_nodes(findings), environ)
    except (OSError, ValueError) as error:
        _log.warning("the bad nodes cannot be noted for the job: %s", error)


def memory_of_rank(health: GpusHealth) -> int:
    """Bytes of the smallest GPU, 0 if unknown."""
    return min((gpu.memory_bytes for gpu in health.gpus if gpu.memory_bytes), default=0)


def memory_of_machine() -> int:
    """Bytes of this machine's memory, 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 0


def _nearest(health: GpusHealth, nics: Sequence[Nic]) -> list[NearestNics]:
    return [
        nearest_nics(pci_place(_PCI / gpu.pci) if gpu.pci else None, nics) for gpu in health.gpus
    ]
