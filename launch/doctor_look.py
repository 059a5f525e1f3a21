"""What `counterflow doctor` looks for: what is wrong with nodes, ranks and a configuration."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..comm.topology import GpuFacts, ProcessPlace, Topology
from .doctor_options import DoctorOptions
from .preflight.finding import Finding, decided, load_findings, status_of
from .preflight.host_memory import memory_of_machine
from .preflight.nodes import node_name
from .preflight.run import config_findings, node_findings
from .preflight.together import Gather, look_together

if TYPE_CHECKING:
    from .config import Config
    from .doctor_ranks import Ranks
    from .preflight.baseline import Baseline
    from .preflight.measured import Measured
    from .preflight.memory import MemoryEstimate

T = TypeVar("T")


@dataclass(frozen=True)
class Looked:
    """What was found.

    Attributes:
        findings: of all nodes.
        measured: bandwidths, if they were asked for.
        estimate: of a run's memory, if a configuration was given.
    """

    findings: tuple[Finding, ...] = ()
    measured: Measured | None = None
    estimate: MemoryEstimate | None = None


def with_preflight(options: DoctorOptions, config: Config) -> DoctorOptions:
    """The options, what the configuration's [preflight] says in place of what was not given."""
    section = config.preflight
    share = section.least_share if options.least_share is None else options.least_share
    if not options.preflight:
        return replace(options, least_share=share)
    baseline = options.baseline or (Path(section.baseline) if section.baseline else None)
    return replace(options, bandwidth=section.bandwidth, baseline=baseline, least_share=share)


def look(
    options: DoctorOptions,
    config: Config | None,
    place: ProcessPlace,
    ranks: Ranks,
    gpus: GpuFacts,
    environ: Mapping[str, str],
) -> Looked:
    """Look at this node, and with the other ranks at what they must have alike; a collective.

    Before a run bandwidths are only measured where nothing is bad already: a GPU that is ill would
    keep all others waiting.

    Args:
        options: the command's.
        config: of a run, if one was given.
        place: this process's.
        ranks: all of them.
        gpus: of this machine.
        environ: of this process.

    Returns:
        The same on every rank, but for the estimate, which rank 0 has.

    Raises:
        ValueError: a configuration that does not fit together, or a baseline of other machines.
        CommError: other ranks did not answer.
    """
    topology = ranks.topology
    names = node_names(topology, ranks.gather(node_name(environ), "tell their nodes' names"))
    node = names[topology.nodes[place.rank]]
    on_node = topology.ranks_of(topology.nodes[place.rank])
    of_run = len(on_node)
    if options.preflight and config is not None:
        of_run = max(of_run, -(-config.mesh.world_size // topology.num_nodes))
    findings: list[Finding] = []
    if place.rank == on_node[0] and options.findings_from is not None:
        told = load_findings(options.findings_from)
        findings = [f if not f.node else replace(f, node=node) for f in told]
    elif place.rank == on_node[0]:
        findings = node_findings(environ, node=node, ranks=of_run, gpus_wanted=options.gpus_wanted)
    estimate = None
    if config is not None and place.rank == 0 and not options.preflight:
        estimate, more = _look_at_run(options, config, gpus, of_run, node)
        findings += more
    if place.world_size > 1:
        from .preflight.versions import find_versions

        findings = look_together(
            ranks.gather,
            rank=place.rank,
            node=node,
            versions=find_versions(gpus.driver or ""),
            findings=findings,
            folder=None if config is None else config.run.path,
        )
    else:
        findings = decided(findings, [node])
    measured = None
    if options.bandwidth and not (options.preflight and status_of(findings)):
        measured, more = _measure(options, config, place, ranks, names)
        findings += more
    return Looked(tuple(findings), measured, estimate)


def node_names(topology: Topology, told: Sequence[str]) -> list[str]:
    """A name for each node, by index: what its ranks call it; numbered where that is not enough."""
    names = [told[topology.ranks_of(node)[0]] for node in range(topology.num_nodes)]
    return [
        f"{name}.{index}" if names.count(name) > 1 else name for index, name in enumerate(names)
    ]


def _look_at_run(
    options: DoctorOptions, config: Config, gpus: GpuFacts, ranks: int, node: str
) -> tuple[MemoryEstimate, list[Finding]]:
    """A run's memory, and what does not fit here."""
    from .check import step_schedules
    from .preflight.memory import GIB, estimate_memory

    on_gpu = options.gpu_memory_gib is not None or (bool(gpus.gpus) and config.run.device != "cpu")
    device = "cuda" if on_gpu else "cpu"
    memory = memory_of_machine()
    if options.gpu_memory_gib is not None:
        memory = round(options.gpu_memory_gib * GIB)
    elif on_gpu:
        memory = min(gpu.memory_bytes for gpu in gpus.gpus)
    schedule = step_schedules(config)[config.schedule.microbatches]
    estimate = estimate_memory(config, schedule, device=device)
    # Alone, nobody knows how many ranks this machine will have: as many as the run starts here.
    here = ranks if ranks > 1 else config.run.nproc or config.mesh.world_size
    where = "" if options.gpu_memory_gib is not None else node
    found = config_findings(
        config, device=device, memory_bytes=memory, ranks=here, node=where, estimate=estimate
    )
    # One rank looks for all, so what it finds is the run's.
    return estimate, [replace(finding, node="") for finding in found]


def _measure(
    options: DoctorOptions,
    config: Config | None,
    place: ProcessPlace,
    ranks: Ranks,
    names: Sequence[str],
) -> tuple[Measured, list[Finding]]:
    """Bandwidths of all nodes; rank 0 reads and writes the files."""
    import torch

    from .doctor_facts import find_host
    from .preflight.bandwidth import CPU_SIZES, GPU_SIZES
    from .preflight.baseline import save_baseline
    from .preflight.survey import bandwidth_findings, survey

    if place.world_size == 1:
        raise ValueError(
            "--bandwidth takes several ranks; start it as torchrun --nproc-per-node 8 -m "
            "counterflow doctor --bandwidth, or with srun or mpirun"
        )
    device = _shared_device(place, config, ranks.gather)
    baseline = _shared_baseline(options.baseline, place.rank, ranks.gather)
    where, kind, sizes = torch.device("cpu"), find_host().cpu, CPU_SIZES
    if device == "cuda":
        where, sizes = torch.device("cuda", place.local_rank or 0), GPU_SIZES
        torch.cuda.set_device(where)
        kind = torch.cuda.get_device_name(where)
    kind = ranks.gather(kind, "tell their devices")[0]  # other kinds are told as findings
    share = 0.8 if options.least_share is None else options.least_share
    measured = survey(
        ranks.topology,
        names,
        where,
        kind,
        sizes,
        baseline=baseline,
        source=str(options.baseline),
        least_share=share,
        timeout_s=options.timeout_s,
    )
    if options.save_baseline is not None and place.rank == 0:
        save_baseline(options.save_baseline, measured)
    return measured, bandwidth_findings(measured, baseline, share)


def _shared_device(place: ProcessPlace, config: Config | None, gather: Gather) -> str:
    """Where all ranks measure bandwidth: "cuda" or "cpu".

    Raises:
        ValueError: on every rank, where one lacks the device or they have different ones.
    """
    from .torchrun import choose_device

    wanted = "auto" if config is None else config.run.device
    problem, device = "", ""
    try:
        device = choose_device(wanted, place.local_world_size or 1)
    except ValueError as error:
        problem = f"rank {place.rank}: {error}"
    told = gather((device, problem), "tell where they measure")
    if problems := [problem for _, problem in told if problem]:
        raise ValueError(problems[0])
    devices = [device for device, _ in told]
    if len(set(devices)) > 1:
        odd = next(rank for rank, one in enumerate(devices) if one != devices[0])
        raise ValueError(
            f"rank 0 would measure bandwidth on {devices[0]}, rank {odd} on {devices[odd]}; see to "
            "the GPUs of both, or set run.device"
        )
    return devices[0]


def _shared_baseline(path: Path | None, rank: int, gather: Gather) -> Baseline | None:
    """The baseline that rank 0 reads, on all ranks; what is wrong with it is raised on all."""
    from .preflight.baseline import BaselineError, load_baseline

    told: Baseline | str | None = None
    if path is not None and rank == 0:
        try:
            told = load_baseline(path)
        except BaselineError as error:
            told = str(error)
    found = gather(told, "tell the baseline")[0]
    if isinstance(found, str):
        raise BaselineError(found)
    return found


def leave_status(path: Path, status: int) -> None:
    """Tell an exit status by a file, whole or not at all; ranks of a node all write the same."""
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(str(status), encoding="ascii")
    part.replace(path)
