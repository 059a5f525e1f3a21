"""What a cluster is made of: GPUs, nodes, links and the network between them.

`load_cluster` reads a description: a preset of this package, or a user's TOML file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from ..comm.cost import Links
from .cluster_file import Description, Value, describe, missing
from .network import Network


@dataclass(frozen=True)
class Gpu:
    """One GPU, or a process on CPUs.

    Attributes:
        name: such as "H800".
        num_sms: its multiprocessors; 0: it has none that are split.
        memory_bytes: of its memory; 0: unknown.
        bf16_tflops, fp8_tflops: dense peaks, 1e12 FLOP/s.
        memory_gbps: bandwidth of its memory, 1e9 bytes/s.
    """

    name: str
    num_sms: int
    memory_bytes: int
    bf16_tflops: float
    fp8_tflops: float
    memory_gbps: float


@dataclass(frozen=True)
class AllToAll:
    """What dispatch and combine were measured to reach with nothing beside them, 1e9 bytes/s.

    The bytes are DeepEP's "logical" ones, of one rank, as its tests count them: among ranks of one
    node a row for each rank that a token goes to; across nodes a row for each node that it goes to;
    in both the sender itself is among them, though to it nothing crosses a link. A row dispatched
    in FP8 is its values and a float32 scale for each 128, hidden * (1 + 4/128) bytes; a combined
    one BF16, hidden * 2. So

        time = tokens * nodes (or ranks) of a token * bytes of a row / bandwidth.

    Attributes:
        dispatch_gbps: of the first.
        combine_gbps: of the second.
    """

    dispatch_gbps: float
    combine_gbps: float

    def crossing(self, nodes: int) -> AllToAll:
        """The part of it that crosses to other nodes, where tokens choose nodes evenly.

        A token's M of N nodes are the sender's own in M of N cases, so 1 - 1/N of the rows
        cross, whatever M is. Where it is far below the network card's bandwidth, as with two nodes,
        the links inside the node were the slower ones.

        Args:
            nodes: N, from 2 up.
        """
        share = 1 - 1 / nodes
        return AllToAll(self.dispatch_gbps * share, self.combine_gbps * share)


@dataclass(frozen=True)
class Cluster:
    """A cluster.

    Attributes:
        name: of it.
        gpu: each of its GPUs.
        gpus_per_node: of a node.
        links: of each GPU, inside its node and across; across nodes the latency is that of ranks
            under different leaf switches.
        num_gpus: how many there are at most; 0: no limit.
        sources: where each number is from, by key.
        network: of switches between nodes; None: unknown.
        nics_per_node: network cards of a node.
        same_leaf_us: latency across nodes under one leaf switch, us; None: as of any other.
        all_to_all: measured dispatch and combine by number of ranks; empty: not measured.
    """

    name: str
    gpu: Gpu
    gpus_per_node: int
    links: Links
    num_gpus: int = 0
    sources: Mapping[str, str] | None = field(default=None, hash=False)
    network: Network | None = None
    nics_per_node: int = 0
    same_leaf_us: float | None = None
    all_to_all: Mapping[int, AllToAll] = field(default_factory=dict[int, AllToAll], hash=False)

    @property
    def most_gpus(self) -> int:
        """The largest job: what there is, or what the network holds; 0: no limit is known."""
        if self.num_gpus or self.network is None:
            return self.num_gpus
        return self.network.nodes(self.nics_per_node) * self.gpus_per_node

    def check_gpus(self, num_gpus: int) -> None:
        """Check that a job of so many GPUs can be had.

        Raises:
            ValueError: there are not as many; or, beyond a node, they are no whole nodes.
        """
        if num_gpus < 1:
            raise ValueError(f"a job has 1 or more GPUs, got {num_gpus}")
        if self.most_gpus and num_gpus > self.most_gpus:
            why = "has" if self.num_gpus else f"joins by its network ({self._network_text()})"
            raise ValueError(
                f"{num_gpus} GPUs are more than the {self.most_gpus} that cluster {self.name} "
                f"{why}; take fewer, or describe a larger cluster (base = ... in a TOML file)"
            )
        if num_gpus > self.gpus_per_node and num_gpus % self.gpus_per_node:
            whole = num_gpus // self.gpus_per_node * self.gpus_per_node
            raise ValueError(
                f"{num_gpus} GPUs are no whole nodes of {self.gpus_per_node}; use {whole} or "
                f"{whole + self.gpus_per_node}"
            )

    def num_nodes(self, num_gpus: int) -> int:
        """Nodes that so many GPUs take."""
        return -(-num_gpus // self.gpus_per_node)

    def shares_leaf(self, num_gpus: int) -> bool:
        """Whether so many GPUs, in nodes next to each other, reach each other by one switch.

        False where the network is not known.
        """
        if self.network is None:
            return False
        return self.num_nodes(num_gpus) <= self.network.nodes_per_leaf(self.nics_per_node)

    def links_of(self, num_gpus: int) -> Links:
        """Links of a group of so many GPUs in nodes next to each other.

        Only the latency across nodes depends on the group. One more tier of switches on the way
        is not told apart: no measurement of that is published.
        """
        if self.same_leaf_us is None or not self.shares_leaf(num_gpus):
            return self.links
        return replace(self.links, across_us=self.same_leaf_us)

    def _network_text(self) -> str:
        assert self.network is not None
        planes = f"{self.network.planes} planes, " if self.network.planes > 1 else ""
        return f"{planes}{self.network.tiers} tiers of {self.network.ports}-port switches"


def load_cluster(name_or_path: str | Path) -> Cluster:
    """A cluster by its description.

    A file's keys are those of `cluster_file.KEYS`, with `all_to_all.RANKS.dispatch_gbps` and
    `combine_gbps` for measurements, and a table `sources` with texts by the same keys, or by a
    table's name for all of it. `base = "h800"` takes over what the file does not say from a preset;
    not so measured all-to-alls, where links are not the base's.

    Args:
        name_or_path: "h100", "h200", "h800", or the path of a TOML file.

    Raises:
        ValueError: no such cluster; or keys that are missing, unknown, of the wrong kind, or
            contradict each other: file, key and what to do, of all mistakes at once.
    """
    found = describe(name_or_path)
    missing(found)
    _check_links(found)
    network = _network(found)
    _check_sizes(found, network)
    found.check()
    values = found.values
    num_gpus = values.get("num_gpus") or _int(values, "nodes") * _int(values, "gpus_per_node")
    same_leaf = values.get("across.same_leaf_us")
    return Cluster(
        name=str(values["name"]),
        gpu=Gpu(
            name=str(values["gpu.name"]),
            num_sms=_int(values, "gpu.num_sms"),
            memory_bytes=round(_float(values, "gpu.memory_gb") * 1e9),
            bf16_tflops=_float(values, "gpu.bf16_tflops"),
            fp8_tflops=_float(values, "gpu.fp8_tflops"),
            memory_gbps=_float(values, "gpu.memory_gbps"),
        ),
        gpus_per_node=_int(values, "gpus_per_node"),
        links=Links(
            str(values["name"]),
            _float(values, "inside.gbps"),
            _float(values, "across.gbps"),
            _float(values, "inside.latency_us"),
            _float(values, "across.latency_us"),
        ),
        num_gpus=int(num_gpus),
        sources=found.sources,
        network=network,
        nics_per_node=_nics(values),
        same_leaf_us=None if same_leaf is None else float(same_leaf),
        all_to_all={ranks: AllToAll(*both) for ranks, both in found.all_to_all().items()},
    )


def _check_links(found: Description) -> None:
    """Contradictions among bandwidths and latencies."""
    values = found.values
    for link in ("inside", "across"):
        reached, peak = values.get(f"{link}.gbps"), values.get(f"{link}.peak_gbps")
        if reached and peak and float(reached) > float(peak):
            found.wrong(
                f"{link}.gbps",
                f"{reached:g} reached is more than {link}.peak_gbps={peak:g}; correct one of them",
            )
    near, far = values.get("across.same_leaf_us"), values.get("across.latency_us")
    if near is not None and far is not None and float(near) > float(far):
        found.wrong(
            "across.same_leaf_us",
            f"{near:g} under one leaf switch is more than across.latency_us={far:g} under "
            "different ones; correct one of them",
        )
    peak, gbit = values.get("across.peak_gbps"), values.get("across.nic_gbit")
    per_node = values.get("gpus_per_node")
    if peak and gbit and per_node:
        of_gpus = float(peak) * float(per_node)
        of_cards = float(gbit) / 8 * _nics(values)
        if abs(of_gpus - of_cards) > 1e-6 * of_cards:
            found.wrong(
                "across.peak_gbps",
                f"{peak:g} GB/s of each of {per_node} GPUs are {of_gpus:g} of a node, but "
                f"across.nic_gbit={gbit:g} of {_nics(values)} cards are {of_cards:g}; correct one "
                "of them",
            )


def _network(found: Description) -> Network | None:
    """The network, where it is described without mistakes."""
    values = found.values
    told = {key.removeprefix("network."): v for key, v in values.items() if key[:8] == "network."}
    if not told:
        return None
    for name in ("tiers", "ports"):
        if name not in told:
            found.wrong(f"network.{name}", "missing, but [network] is there; give it too")
    if not {"tiers", "ports"} <= told.keys() or "gpus_per_node" not in values:
        return None
    planes, nics = int(told.get("planes", 1)), _nics(values)
    if nics % planes:
        found.wrong(
            "network.planes",
            f"{nics} network cards of a node cannot be shared out evenly over {planes}; set "
            "across.nics_per_node to a multiple",
        )
        return None
    try:
        network = Network(
            int(told["tiers"]), int(told["ports"]), planes, bool(told.get("rails", False))
        )
    except ValueError as error:
        found.wrong("network", str(error))
        return None
    if network.nodes_per_leaf(nics) < 1:
        found.wrong(
            "network.ports",
            f"{network.ports} are too few for the {nics // planes} cards of a node on one leaf; "
            "set network.rails = true, or correct the number",
        )
        return None
    return network


def _check_sizes(found: Description, network: Network | None) -> None:
    """Contradictions among numbers of GPUs and nodes."""
    values = found.values
    if "gpus_per_node" not in values:
        return
    per_node = _int(values, "gpus_per_node")
    nodes, gpus = _int(values, "nodes"), _int(values, "num_gpus")
    if nodes and gpus and nodes * per_node != gpus:
        found.wrong(
            "num_gpus",
            f"{gpus} is not nodes={nodes} times gpus_per_node={per_node}, {nodes * per_node}; "
            "leave out nodes or num_gpus",
        )
    elif gpus > per_node and gpus % per_node:
        found.wrong("num_gpus", f"{gpus} are no whole nodes of gpus_per_node={per_node}")
    if network is not None:
        holds = network.nodes(_nics(values)) * per_node
        if max(gpus, nodes * per_node) > holds:
            found.wrong(
                "network",
                f"{max(gpus, nodes * per_node)} GPUs are more than the {holds} that "
                f"{network.endpoints} endpoints join, {_nics(values)} cards of each node of "
                f"{per_node}; add tiers, ports or planes",
            )
    for ranks in found.all_to_all():
        if ranks > per_node and ranks % per_node:
            found.wrong(
                f"all_to_all.{ranks}", f"{ranks} ranks are no whole nodes of {per_node}; correct it"
            )


def _nics(values: Mapping[str, Value]) -> int:
    """Network cards of a node: one for each GPU where the file does not say."""
    return _int(values, "across.nics_per_node") or _int(values, "gpus_per_node")


def _int(values: Mapping[str, Value], key: str) -> int:
    return int(cast("int", values.get(key, 0)))


def _float(values: Mapping[str, Value], key: str) -> float:
    return float(cast("float", values[key]))
