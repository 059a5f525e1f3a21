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
from .finding import Finding, bad_nodes, decided, lines, or_ok, save_findings, status_of
from .gpu import gpu_findings
from .host_memory import memory_of_machine
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
        health = _health(environ, gpus_wanted)
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
    launched: bool = False,
) -> list[Finding]:
    """Whether a run's checkpoints fit its disk, and its ranks the memory.

    Args:
        config: of the run.
        device: "cuda" or "cpu".
        memory_bytes: of a GPU, or without GPUs of the machine; 0 if unknown.
        ranks: of the run on this machine.
        node: its name, "" where the memory is only told.
        estimate: of the memory, where it is known already.
        launched: the launcher has made the run's folder.

    Raises:
        ValueError: parts of the configuration do not fit each other.
    """
    from ..check import step_schedules
    from .disk import disk_findings
    from .memory import estimate_memory, memory_findings
    from .sizes import checkpoint_bytes

    schedule = step_schedules(config)[config.schedule.microbatches]
    estimate = estimate or estimate_memory(config, schedule, device=device)
    memory = memory_findings(
        estimate,
        memory_bytes=memory_bytes,
        ranks=ranks,
        node=node,
        host_bytes=memory_of_machine() if device == "cuda" and node else 0,
    )
    disk = disk_findings(config, checkpoint_bytes(config, schedule), node=node, launched=launched)
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
    health = _health(environ, gpus_wanted)
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
            launched=True,
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
    head: bool = True,
) -> int:
    """All of preflight on one of a job's nodes: alone first, then with the others.

    What makes a node or the job unfit is printed, and unfit nodes' names are added to the file that
    COUNTERFLOW_BAD_NODES names. Several nodes decide together, also those that found themselves
    unfit: what most of them have is no node's fault (see `finding.decided`), and all that are unfit
    are named at once. Rank 0 then tells for all. Where they do not meet (preflight.together=false,
    or it failed), each node decides by what it found itself, and tells that; what is the whole
    job's is told by the head alone.

    Args:
        config: of the run.
        config_path: the file that it can be read from on every node.
        nproc: ranks that each node gets.
        gpus_wanted: GPUs that they need on a node, 0 for a run on CPUs.
        environ: that they get.
        num_nodes: of the job; each calls this.
        start: runs a command of this program as ranks that meet those of the other nodes.
        head: whether this node is the first.

    Returns:
        DONE, BAD_NODE, or MISTAKE where no other node would do; or how `start` ended.
    """
    section = config.preflight
    if not section.enabled:
        return DONE
    findings = preflight(config, nproc=nproc, gpus_wanted=gpus_wanted, environ=environ)
    node = node_name(environ)
    meets = section.bandwidth or (section.together and num_nodes > 1)
    if start is None or not meets:
        return _alone(findings, node, environ, num_nodes=num_nodes, head=head)
    with tempfile.TemporaryDirectory(prefix="counterflow-preflight-") as folder:
        told, found = Path(folder) / "status", Path(folder) / "findings.json"
        save_findings(found, findings)
        command = ["doctor", "--preflight", "--config", str(config_path)]
        command += ["--gpus-wanted", str(gpus_wanted), "--status-to", str(told)]
        command += ["--timeout-s", f"{config.run.timeout_s:g}", "--findings-from", str(found)]
        ended = start(command, nproc=nproc if section.bandwidth else 1)
        if not ended and told.exists():
            return int(told.read_text(encoding="ascii"))
    # It may be what this node found that has kept it from meeting the others.
    if status := _alone(findings, node, environ, num_nodes=num_nodes, head=head, only_bad=True):
        return status
    return ended


def _alone(
    findings: Sequence[Finding],
    node: str,
    environ: Mapping[str, str],
    *,
    num_nodes: int,
    head: bool,
    only_bad: bool = False,
) -> int:
    """Decide by what one node found, and tell it; the exit status."""
    mine = decided(findings, [node])
    if num_nodes > 1 or only_bad:
        # Warnings would come from every node, and the job's faults too.
        told = [f for f in findings if f.verdict == "bad" and (f.node or head)]
        tell(decided(told, [node]), environ)
        if told and num_nodes > 1:
            print(f"preflight: {node} decided by itself, without the other nodes", file=sys.stderr)
    else:
        tell(mine, environ)
    return status_of(mine)


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


def _health(environ: Mapping[str, str], gpus_wanted: int | None) -> GpusHealth:
    """Of the GPUs that the ranks may use: the machine may have others, and other jobs."""
    return GpusHealth() if gpus_wanted == 0 else find_health(environ.get("CUDA_VISIBLE_DEVICES"))


def memory_of_rank(health: GpusHealth) -> int:
    """Bytes of the smallest GPU, 0 if unknown."""
    return min((gpu.memory_bytes for gpu in health.gpus if gpu.memory_bytes), default=0)


def _nearest(health: GpusHealth, nics: Sequence[Nic]) -> list[NearestNics]:
    return [
        nearest_nics(pci_place(_PCI / gpu.pci) if gpu.pci else None, nics) for gpu in health.gpus
    ]
