"""What the doctor found, as a JSON object and as tables for a terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

from ..comm.topology import Gpu, NearestNics, Nic, ProcessPlace, Topology
from ..comm.topology.pci import Nearness
from .doctor_facts import Facts, Library
from .doctor_look import Looked
from .preflight.finding import Finding, grouped, lines
from .tables import print_table

if TYPE_CHECKING:
    from .preflight.measured import Line, Measured
    from .preflight.memory import MemoryEstimate

_HOW_NEAR: dict[Nearness, str] = {
    "switch": "same PCI switch",
    "bridges": "same PCI root port",
    "host bridge": "same host bridge",
    "numa": "same NUMA node",
    "far": "other NUMA node",
    "unknown": "",
}


# Blanks at the end of a line, which rich pads with, before what sets colours back.
_TRAILING = re.compile(r" +((?:\x1b\[[0-9;]*m)*)$", re.MULTILINE)


class Section(NamedTuple):
    """One table: a title, the names of the columns, rows of as many texts, sentences below."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def as_json(facts: Facts) -> dict[str, Any]:
    """The facts for json.dumps; keys stay."""
    gpus = facts.gpus
    return {
        "host": asdict(facts.host),
        "python": facts.python,
        "torch": facts.torch,
        "place": asdict(facts.place) if facts.place else None,
        "driver": {"version": gpus.driver, "cuda": gpus.cuda, "reason": gpus.reason or None},
        "gpus": list(map(_gpu_as_json, gpus.gpus, facts.nearest)),
        "nics": [_nic_as_json(nic) for nic in facts.nics],
        "libraries": {
            library.name: {"version": library.version, "reason": library.reason}
            for library in facts.libraries
        },
        "environment": dict(facts.environment),
        "topology": _topology_as_json(facts.topology),
        **_looked_as_json(facts.looked),
    }


def sections(facts: Facts) -> list[Section]:
    """The tables in the order of their printing."""
    host = facts.host
    found = [
        Section(
            "This machine",
            ("what", "is"),
            [
                ("host", host.name),
                ("processor", f"{host.cpu}, {host.cores} cores for this process"),
                ("memory", f"{host.memory_gib:g} GiB"),
                ("python", facts.python),
                *((library.name, _version(library)) for library in facts.libraries),
                ("place", _place(facts.place)),
            ],
        ),
        _gpu_section(facts),
        Section(
            "Network",
            ("name", "kind", "state", "Gbit/s", "PCI", "NUMA node"),
            [_nic_row(nic) for nic in facts.nics],
        ),
        Section(
            "Environment",
            ("variable", "value"),
            [(n, "not set" if v is None else v) for n, v in facts.environment.items()],
        ),
    ]
    looked = facts.looked
    found.append(_topology_section(facts.topology))
    if looked.measured is not None:
        found.append(_bandwidth_section(looked.measured))
    if looked.estimate is not None:
        found.append(_memory_section(looked.estimate))
    return [*found, _findings_section(looked.findings)]


def print_facts(facts: Facts) -> None:
    """Print the tables: by rich, which breaks long texts, or plainly where it is missing."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for title, head, rows, notes in sections(facts):
            print_table(title, head, rows, names=len(head))
            print(*(f"note: {note}\n" for note in notes), sep="")
        return
    console = Console(highlight=False, markup=False)
    for title, head, rows, notes in sections(facts):
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for name in head:
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(title, style="bold")
        if rows:
            with console.capture() as capture:
                console.print(table)
            print(_TRAILING.sub(r"\1", capture.get()), end="")
        for note in notes:
            console.print(f"note: {note}")
        console.print()


def _version(library: Library) -> str:
    return library.version or library.reason or ""


def _place(place: ProcessPlace | None) -> str:
    if place is None:
        return "unknown, as the environment is wrong"

    def known(value: int | None) -> str:
        return "?" if value is None else str(value)

    if place.source == "alone":
        return "one process, started without torchrun, mpirun or srun"
    return (
        f"rank {place.rank} of {place.world_size}, node {known(place.node)}, in-node index "
        f"{known(place.local_rank)} of {known(place.local_world_size)}, by {place.source}"
    )


def _gpu_section(facts: Facts) -> Section:
    gpus = facts.gpus
    if gpus.reason:
        return Section(f"GPUs: {gpus.reason}", (), ())
    title = f"GPUs: driver {gpus.driver}, for CUDA up to {gpus.cuda}"
    head = ("GPU", "name", "GiB", "PCI", "NVLinks", "lead to", "nearest NIC")
    rows: list[tuple[str, ...]] = []
    for gpu, (names, near) in zip(gpus.gpus, facts.nearest, strict=True):
        how = f" ({_HOW_NEAR[near]})" if _HOW_NEAR[near] else ""
        peers = [f"{peer} x{links}" for peer, links in gpu.nvlink_peers]
        rows.append(
            (
                str(gpu.index),
                gpu.name,
                f"{gpu.memory_bytes / 2**30:.0f}",
                gpu.pci,
                f"{gpu.nvlinks_active} of {gpu.nvlinks} active" if gpu.nvlinks else "none",
                ", ".join(peers) or "-",
                ", ".join(names) + how if names else "-",
            )
        )
        rows += [("", problem, "", "", "", "", "") for problem in gpu.problems]
    return Section(title, head, rows)


def _nic_row(nic: Nic) -> tuple[str, ...]:
    numa = nic.pci.numa_node if nic.pci else None
    return (
        nic.name,
        nic.kind,
        nic.state,
        "-" if nic.speed_gbps is None else f"{nic.speed_gbps:g}",
        nic.pci.address if nic.pci else "-",
        "-" if numa is None else str(numa),
    )


def _topology_section(topology: Topology | str) -> Section:
    if isinstance(topology, str):
        return Section(f"Ranks: {topology}", (), ())
    ranks, nodes = len(topology.nodes), topology.num_nodes
    counts = f"{ranks} rank{'s' * (ranks > 1)} on {nodes} node{'s' * (nodes > 1)}"
    rows = [
        (str(rank), str(node), str(local), seat.machine.host, seat.device)
        for rank, (node, local, seat) in enumerate(
            zip(topology.nodes, topology.local_ranks, topology.seats, strict=True)
        )
    ]
    head = ("rank", "node", "in-node index", "host", "device")
    return Section(f"Ranks: {counts}", head, rows, topology.notes)


def _bandwidth_section(measured: Measured) -> Section:
    """As nccl-tests prints it: a row for each size, of several nodes or pairs the slowest."""
    rows: list[tuple[str, ...]] = []
    groups: dict[tuple[str, str, int], list[Line]] = {}
    for line in measured.lines:
        groups.setdefault((line.where, line.collective, line.num_bytes), []).append(line)
    for (where, collective, num_bytes), alike in groups.items():
        slowest = min(alike, key=lambda line: line.busbw)
        rows.append(
            (
                {"node": "in a node", "pair": "between two", "all": "all nodes"}[where],
                collective.replace("_", "-"),
                str(slowest.num_ranks),
                str(num_bytes),
                f"{slowest.seconds * 1e6:.0f}",
                f"{slowest.algbw:.3g}",
                f"{slowest.busbw:.3g}",
                ", ".join(slowest.nodes) if len(alike) > 1 else "",
            )
        )
    head = ("where", "collective", "ranks", "bytes", "us", "algbw", "busbw", "slowest of several")
    return Section(f"Bandwidth by {measured.backend}, GB/s", head, rows)


def _memory_section(estimate: MemoryEstimate) -> Section:
    """A column for each part; pipeline ranks that take the same are one row."""
    ranks: dict[tuple[int, ...], list[int]] = {}
    for pp_rank, rank in enumerate(estimate.ranks):
        ranks.setdefault((*rank.parts.values(), rank.host, rank.staging), []).append(pp_rank)
    rows: list[tuple[str, ...]] = []
    for sizes, alike in ranks.items():
        *parts, host, staging = sizes
        texts = (f"{size / 2**30:.3g}" for size in (*parts, sum(parts), host, staging))
        rows.append((", ".join(map(str, alike)), *texts))
    names = list(estimate.ranks[0].parts)
    head = ("pipeline rank", *names, "sum", "average, on the host", "saving, on the host")
    where = "a GPU's memory" if estimate.device == "cuda" else "the CPU's memory"
    notes = (
        "parameters, gradients, optimizer and activations are predicted, the rest is estimated",
        "on the host: in CPU memory, the parameters' average and the copy of a checkpoint that is "
        "written while training goes on",
    )
    return Section(f"What the run takes of {where} at most, GiB", head, rows, notes)


def _findings_section(findings: Sequence[Finding]) -> Section:
    told = lines(findings)
    if told:
        return Section("Findings", (), (), told)
    checked = ", ".join(dict.fromkeys(f.check for f in findings)) or "no check was made"
    return Section(f"Findings: nothing wrong ({checked})", (), ())


def _looked_as_json(looked: Looked) -> dict[str, Any]:
    measured, estimate = looked.measured, looked.estimate
    memory = None
    if estimate is not None:
        ranks = [{**asdict(rank), "total": rank.total} for rank in estimate.ranks]
        memory = {"device": estimate.device, "worst": estimate.worst, "ranks": ranks}
    return {
        "findings": [group._asdict() for group in grouped(looked.findings)],
        "bandwidth": None if measured is None else asdict(measured),
        "memory": memory,
    }


def _gpu_as_json(gpu: Gpu, nearest: NearestNics) -> dict[str, Any]:
    return {
        **asdict(gpu),
        "nvlink_peers": dict(gpu.nvlink_peers),
        "nearest_nics": list(nearest.names),
        "nearness": nearest.nearness,
    }


def _nic_as_json(nic: Nic) -> dict[str, Any]:
    return {
        "name": nic.name,
        "kind": nic.kind,
        "state": nic.state,
        "speed_gbps": nic.speed_gbps,
        "pci": nic.pci.address if nic.pci else None,
        "numa_node": nic.pci.numa_node if nic.pci else None,
    }


def _topology_as_json(topology: Topology | str) -> dict[str, Any]:
    if isinstance(topology, str):
        return {"error": topology}
    return {
        "num_nodes": topology.num_nodes,
        "notes": list(topology.notes),
        "ranks": [
            {
                "rank": rank,
                "node": topology.nodes[rank],
                "local_rank": topology.local_ranks[rank],
                "host": seat.machine.host,
                "device": seat.device,
                "source": seat.place.source,
            }
            for rank, seat in enumerate(topology.seats)
        ],
    }
