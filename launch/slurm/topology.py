"""The network's switches as `scontrol show topology` prints them, as a forest.

Both of Slurm's forms are read: a tree of switches (topology/tree) and blocks of nodes
(topology/block, since Slurm 23.11; aggregated blocks since 24.05). Who lies under whom follows from
the nodes alone, so that both are read alike and nothing hangs on fields that differ by version.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .hostlist import natural, parse_hostlist

_NAMES = ("SwitchName", "BlockName", "AggregatedBlock")


@dataclass(frozen=True)
class Switch:
    """A switch or a block.

    Attributes:
        name: as Slurm knows it.
        nodes: that hang on this one and on none below it, by natural order of their names.
        switches: the ones below, by natural order of their first nodes.
    """

    name: str
    nodes: tuple[str, ...] = ()
    switches: tuple[Switch, ...] = ()

    @property
    def all_nodes(self) -> tuple[str, ...]:
        """Every node under this switch."""
        below = (node for switch in self.switches for node in switch.all_nodes)
        return (*self.nodes, *below)


def parse_topology(text: str) -> tuple[Switch, ...]:
    """The topmost switches of `scontrol show topology`'s output.

    Lines that name no switch or block, such as the message that no topology is configured, and
    switches without nodes are passed over; an empty result means that nothing is known.

    Raises:
        ValueError: a line's nodes are no hostlist.
    """
    found: dict[str, frozenset[str]] = {}
    for line in text.splitlines():
        fields = dict(re.findall(r"(\w+)=(\S*)", line))
        name = next((fields[key] for key in _NAMES if fields.get(key)), None)
        nodes = fields.get("Nodes", "")
        if name is None or nodes in ("", "(null)"):
            continue
        found[name] = frozenset(parse_hostlist(nodes, f"the nodes of {name}"))
    return forest(found)


def forest(groups: Mapping[str, Iterable[str]]) -> tuple[Switch, ...]:
    """Switches out of the nodes that lie under each.

    Of two switches with the same nodes the first one lies below; one that shares some nodes with
    another but neither holds it nor lies in it (a network that is no tree) is left out, the
    smaller being kept.
    """
    sets = {name: frozenset(nodes) for name, nodes in groups.items()}
    kept: list[str] = []
    for name in sorted(sets, key=lambda name: len(sets[name])):  # stable: the first of equals first
        nodes = sets[name]
        if nodes and all(sets[k] <= nodes or not sets[k] & nodes for k in kept):
            kept.append(name)
    below: dict[str, list[Switch]] = {name: [] for name in kept}
    roots: list[Switch] = []
    for index, name in enumerate(kept):
        children = sorted(below[name], key=_first_node)
        covered = {node for child in children for node in child.all_nodes}
        own = tuple(sorted(sets[name] - covered, key=natural))
        switch = Switch(name, own, tuple(children))
        parent = next((k for k in kept[index + 1 :] if sets[name] <= sets[k]), None)
        (roots if parent is None else below[parent]).append(switch)
    return tuple(sorted(roots, key=_first_node))


def lowest_switches(switches: Sequence[Switch]) -> dict[str, str]:
    """The name of the switch that each node hangs on."""
    found: dict[str, str] = {}
    for switch in switches:
        found |= dict.fromkeys(switch.nodes, switch.name)
        found |= lowest_switches(switch.switches)
    return found


def _first_node(switch: Switch) -> tuple[tuple[str, int], ...]:
    return min(map(natural, switch.all_nodes))
