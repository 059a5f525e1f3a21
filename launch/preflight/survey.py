"""Bandwidth of every node, of neighbouring nodes and of all, and which node is at fault.

The measuring is a collective of the world; the judging is a function of what was measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist

from ...comm.collectives import gather
from ...comm.topology import Topology
from . import neighbours
from .bandwidth import time_collectives
from .baseline import Baseline
from .finding import Finding
from .measured import COLLECTIVES, Collective, Line, Measured, Timing, Where, key
from .neighbours import Pair

CHECK = "bandwidth"
_FEWEST = 3  # nodes or pairs of which a median says what is usual


def survey(
    topology: Topology,
    names: Sequence[str],
    device: torch.device,
    kind: str,
    sizes: Sequence[int],
    *,
    baseline: Baseline | None = None,
    source: str = "",
    least_share: float = 0.8,
    timeout_s: float = 300.0,
) -> Measured:
    """Measure; a collective of the world, the same result on all ranks.

    In every node at once, then each node with the next, then suspects once more, then all. Once in
    a world: see `_Probe`.

    Args:
        topology: of the ranks.
        names: of the nodes, by index.
        device: of this rank; "cuda" measures NCCL.
        kind: what the devices are, for the baseline.
        sizes: bytes of messages; neighbours measure the largest alone.
        baseline: to judge by which pairs measure again; None: by the median pair.
        source: what the baseline is called in errors.
        least_share: of it, below which a pair is slow.
        timeout_s: limit of every wait, seconds.

    Raises:
        CommError: a rank is gone or does not answer within the limit.
        BaselineError: the baseline is of other machines; told before anything between nodes runs.
    """
    probe = _Probe(topology, names, device, timeout_s)
    per_node = max(len(topology.ranks_of(node)) for node in range(topology.num_nodes))
    backend = "nccl" if device.type == "cuda" else "gloo"
    inside = probe.round(
        "node", [(node,) for node in range(topology.num_nodes)], sizes, COLLECTIVES
    )
    found = Measured(kind, backend, per_node, tuple(names), tuple(inside))
    if baseline is not None:
        baseline.require_fit(found, source)
    between = [
        line
        for pairs in neighbours.rounds_of_pairs(topology.num_nodes)
        for line in probe.round("pair", pairs, sizes[-1:], ("all_to_all",))
    ]
    found = replace(found, lines=(*inside, *between))
    slow = _slow_pairs(found, baseline, least_share)
    again = [
        line
        for pairs in neighbours.rounds_of_second_look(topology.num_nodes, slow)
        for line in probe.round("pair", pairs, sizes[-1:], ("all_to_all",))
    ]
    every: list[Line] = []
    if topology.num_nodes > 1:
        every = probe.round("all", [tuple(range(topology.num_nodes))], sizes, COLLECTIVES)
    return replace(found, lines=(*found.lines, *every), again=tuple(again))


class _Probe:
    """Measures groups of nodes side by side, each group's nodes in no other."""

    def __init__(
        self, topology: Topology, names: Sequence[str], device: torch.device, timeout_s: float
    ) -> None:
        self._topology, self._names, self._device = topology, names, device
        self._limit = timedelta(seconds=timeout_s)
        self._rank = dist.get_rank()
        # The world itself may know gloo alone: a node without a driver can join that as well.
        self._backend = "nccl" if device.type == "cuda" else "gloo"
        self._whole: dist.ProcessGroup | None = None
        self._measured: set[tuple[int, ...]] = set()

    def round(
        self,
        where: Where,
        groups: Sequence[tuple[int, ...]],
        sizes: Sequence[int],
        collectives: Sequence[Collective],
    ) -> list[Line]:
        """The rows of all groups, on every rank; groups of one rank have none."""
        mine: list[Line] = []
        for group in groups:
            ranks = sorted(rank for node in group for rank in self._topology.ranks_of(node))
            if self._rank not in ranks or len(ranks) < 2:
                continue
            timings = self._time(ranks, sizes, collectives)
            if self._rank == ranks[0]:
                nodes = () if where == "all" else [self._names[node] for node in group]
                mine = [Line.of(where, nodes, timing) for timing in timings]
        # Waits for all, too: the next round's groups must not run beside this one's.
        told = gather(mine, dist.group.WORLD, "the bandwidths of all ranks")
        return [line for lines in told for line in lines]

    def _time(
        self, ranks: Sequence[int], sizes: Sequence[int], collectives: Sequence[Collective]
    ) -> list[Timing]:
        name = tuple(ranks)
        if len(name) == dist.get_world_size():
            return time_collectives(self._world(), self._device, sizes, collectives)
        # Made by its members alone: of a thousand nodes nobody waits for all groups. They agree on
        # its name by its ranks and by the number of groups that they have, so it goes at once, and
        # no two rounds measure the same ranks: the store would still have the first's addresses.
        assert name not in self._measured
        self._measured.add(name)
        group = dist.new_group(
            list(ranks),
            timeout=self._limit,
            backend=self._backend,
            use_local_synchronization=True,
        )
        assert isinstance(group, dist.ProcessGroup)
        timings = time_collectives(group, self._device, sizes, collectives)
        dist.destroy_process_group(group)  # not after an error: a peer may be gone
        return timings

    def _world(self) -> dist.ProcessGroup:
        """All ranks, by the backend that is measured."""
        if self._whole is None:
            made = dist.group.WORLD
            if self._backend == "nccl":
                made = dist.new_group(timeout=self._limit, backend="nccl")
            assert isinstance(made, dist.ProcessGroup)
            self._whole = made
        return self._whole


def bandwidth_findings(
    measured: Measured, baseline: Baseline | None, least_share: float
) -> list[Finding]:
    """Which nodes are too slow, by the largest messages.

    Without a baseline a node is held against the median of all, if there are three or more. What
    most nodes have, in themselves or with their neighbours, is no node's fault and a warning.

    Args:
        measured: what `survey` found.
        baseline: what is expected; it fits.
        least_share: of what is expected, below which a node is bad.
    """
    expected = _expected(measured, baseline)
    whole: list[Finding] = []
    found = _slow_inside(measured, expected, least_share)
    if _most(len(found), measured.num_nodes):
        example = next(iter(found.values())).message
        message = (
            f"{len(found)} of {measured.num_nodes} nodes are slow in themselves: see to the "
            f"environment, the driver and the baseline; {example}"
        )
        whole.append(Finding(CHECK, "warning", message))
        found = {}
    slow = _slow_pairs(measured, baseline, least_share)
    second = {
        _pair(measured, line): line.busbw < expected(line) * least_share for line in measured.again
    }
    at_fault = neighbours.slow_nodes(measured.num_nodes, slow, second)
    outside = _most(len(at_fault), measured.num_nodes)
    if outside:
        message = (
            f"{len(at_fault)} of {measured.num_nodes} nodes are slow with their neighbours: see to "
            "the switches, and other traffic"
        )
        whole.append(Finding(CHECK, "warning", message))
        at_fault = ()
    for node in at_fault:
        found.setdefault(node, _slow_with_both(measured, node, expected))
    for pair in neighbours.unexplained(slow, [*found]) if not outside else ():
        names = " and ".join(measured.nodes[node] for node in pair)
        message = f"slow between {names}; one of the two, or what is between them"
        whole.append(Finding(CHECK, "warning", message))
    for line in _largest(measured.lines):
        if line.where == "all" and baseline and line.busbw < expected(line) * least_share:
            message = f"{_name(line)} over all nodes: {_reached(line, expected(line))}"
            whole.append(Finding(CHECK, "warning", message))
    return [*found.values(), *whole]


def _most(count: int, num_nodes: int) -> bool:
    """Whether that many nodes are too many to blame each."""
    return num_nodes > 1 and 2 * count > num_nodes


def _slow_inside(
    measured: Measured, expected: Callable[[Line], float], least_share: float
) -> dict[int, Finding]:
    """By node."""
    found: dict[int, Finding] = {}
    for line in _largest(measured.lines):
        if line.where == "node" and line.busbw < expected(line) * least_share:
            node = measured.nodes.index(line.nodes[0])
            message = f"{_name(line)} within the node: {_reached(line, expected(line))}"
            found.setdefault(node, Finding(CHECK, "bad", message, line.nodes[0], kind="inside"))
    return found


def _slow_with_both(measured: Measured, node: int, expected: Callable[[Line], float]) -> Finding:
    name = measured.nodes[node]
    lines = [line for line in (*measured.lines, *measured.again) if line.where == "pair"]
    mine = [line for line in lines if name in line.nodes]
    best = max(mine, key=lambda line: line.busbw)
    message = f"{_name(best)} with each of its neighbours: at most {_reached(best, expected(best))}"
    return Finding(CHECK, "bad", message, name, kind="neighbours")


def _expected(measured: Measured, baseline: Baseline | None) -> Callable[[Line], float]:
    """GB/s that a row should reach: the baseline's, or the median; 0 where nobody knows."""
    typical = measured.typical()
    count = Counter(map(key, measured.lines))

    def expected(line: Line) -> float:
        told = None if baseline is None else baseline.expected(line, measured.num_nodes)
        if told is None:
            told = typical[key(line)] if count[key(line)] >= _FEWEST else 0.0
        return told

    return expected


def _slow_pairs(measured: Measured, baseline: Baseline | None, least_share: float) -> set[Pair]:
    expected = _expected(measured, baseline)
    return {
        _pair(measured, line)
        for line in _largest(measured.lines)
        if line.where == "pair" and line.busbw < expected(line) * least_share
    }


def _pair(measured: Measured, line: Line) -> Pair:
    first, second = sorted(measured.nodes.index(name) for name in line.nodes)
    return first, second


def _largest(lines: Sequence[Line]) -> list[Line]:
    """Of every place and collective the rows of the largest messages."""
    most: dict[tuple[str, str], int] = {}
    for line in lines:
        group = line.where, line.collective
        most[group] = max(most.get(group, 0), line.num_bytes)
    return [line for line in lines if line.num_bytes == most[line.where, line.collective]]


def _name(line: Line) -> str:
    return f"{line.collective.replace('_', '-')} of {line.num_bytes} bytes"


def _reached(line: Line, expected: float) -> str:
    return (
        f"{line.busbw:.3g} GB/s, {line.busbw / expected:.0%} of the {expected:.3g} GB/s that are "
        "expected"
    )
