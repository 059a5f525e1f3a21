"""What a check found, as values; many nodes' findings as few lines; the exit status that follows.

A finding that is bad and has a node's name makes that node unfit: it is excluded and the job
requeued. One that is bad and has none is the job's own mistake, which no other node would mend.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from ..life.status import BAD_NODE, DONE, MISTAKE
from .nodes import hostlist

Verdict = Literal["ok", "warning", "bad"]

_WORST_FIRST: tuple[Verdict, ...] = ("bad", "warning", "ok")
# Findings that differ from node to node cannot be grouped; this many of them are shown.
_MOST_LINES = 20


@dataclass(frozen=True)
class Finding:
    """One thing that a check found.

    Attributes:
        check: which, such as "gpu".
        verdict: "bad" makes the node unfit, or without a node the job; "warning" is printed.
        message: what, where on the node, and what to do; without the node's name, so that the same
            finding on many nodes is the same message.
        node: its name, "" for what concerns the whole job.
    """

    check: str
    verdict: Verdict
    message: str
    node: str = ""


class Group(NamedTuple):
    """The same finding on several nodes; `nodes` is empty for one of the whole job."""

    check: str
    verdict: Verdict
    message: str
    nodes: tuple[str, ...]


def on_node(findings: Iterable[Finding], node: str) -> list[Finding]:
    """The same findings, of this node."""
    return [replace(finding, node=node) for finding in findings]


def or_ok(check: str, findings: Sequence[Finding], node: str = "") -> list[Finding]:
    """`findings`, or if there are none the one that says so."""
    return list(findings) or [Finding(check, "ok", "nothing wrong", node)]


def grouped(findings: Iterable[Finding]) -> list[Group]:
    """The findings without repetition, the worst first, each with all of its nodes."""
    nodes: dict[tuple[str, Verdict, str], dict[str, None]] = {}
    for found in findings:
        names = nodes.setdefault((found.check, found.verdict, found.message), {})
        if found.node:
            names[found.node] = None
    groups = [Group(*key, tuple(names)) for key, names in nodes.items()]
    return sorted(groups, key=lambda group: _WORST_FIRST.index(group.verdict))


def lines(findings: Iterable[Finding]) -> list[str]:
    """What is worth a person's eyes: a line for each bad finding and warning, not for each node."""
    told = [group for group in grouped(findings) if group.verdict != "ok"]
    shown = [_line(group) for group in told[:_MOST_LINES]]
    rest = told[_MOST_LINES:]
    if rest:
        where = hostlist(name for group in rest for name in group.nodes)
        shown.append(
            f"{len(rest)} more findings{f' on {where}' if where else ''}; counterflow doctor "
            "--json has all"
        )
    return shown


def bad_nodes(findings: Iterable[Finding]) -> tuple[str, ...]:
    """The names of the nodes that are unfit, each once."""
    return tuple(dict.fromkeys(f.node for f in findings if f.verdict == "bad" and f.node))


def status_of(findings: Iterable[Finding]) -> int:
    """The exit status: a mistake of the job's comes first, because other nodes do not mend it."""
    bad = [finding for finding in findings if finding.verdict == "bad"]
    if any(not finding.node for finding in bad):
        return MISTAKE
    return BAD_NODE if bad else DONE


def not_of_every_node(findings: Sequence[Finding], nodes: Sequence[str]) -> list[Finding]:
    """Findings of a job, where one that every node has is the job's and no node's.

    Without that, a variable that is exported wrongly would exclude the whole cluster, node by node.

    Args:
        findings: of all nodes.
        nodes: their names; of one node alone nothing can be told.
    """
    names = set(nodes)
    if len(names) < 2:
        return list(findings)
    common = {
        group[:3]
        for group in grouped(findings)
        if group.verdict == "bad" and set(group.nodes) >= names
    }
    found = [
        replace(f, node="") if (f.check, f.verdict, f.message) in common else f for f in findings
    ]
    return list(dict.fromkeys(found))


def _line(group: Group) -> str:
    where = f"{hostlist(group.nodes)}: " if group.nodes else ""
    return f"{group.verdict}: {group.check}: {where}{group.message}"
