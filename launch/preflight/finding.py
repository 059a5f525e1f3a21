"""What a check found, as values; many nodes' findings as few lines; the exit status that follows.

A finding that is bad and has a node's name makes that node unfit: it is excluded and the job
requeued. One that is bad and has none is the job's own mistake, which no other node would mend.
Which of the two it is `decided` says where the findings of all nodes are together: what most nodes
have is no node's fault.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
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
        kind: of the fault, within the check: the same on every node that has it, whatever numbers
            the message tells; "" where the message tells none.
        configured: the configuration may be as much at fault as the node, as where it names what
            is not there; on the only node of a job it is.
    """

    check: str
    verdict: Verdict
    message: str
    node: str = ""
    kind: str = ""
    configured: bool = False

    @property
    def fault(self) -> tuple[str, str]:
        """What findings of several nodes have in common."""
        return self.check, self.kind or self.message


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


def decided(findings: Sequence[Finding], nodes: Sequence[str]) -> list[Finding]:
    """Findings of a job, where a fault that most of its nodes have is the job's and no node's.

    Without that, a variable that is exported wrongly, or another job's cleaning up, would exclude
    the whole cluster, node by node. Of a job's only node the faults that may be the configuration's
    are the job's.

    Args:
        findings: of all nodes.
        nodes: their names.
    """
    names = set(nodes)
    where: dict[tuple[str, str], dict[str, None]] = {}
    for found in findings:
        if found.verdict == "bad" and found.node:
            where.setdefault(found.fault, {})[found.node] = None
    told: dict[Finding, None] = {}
    of_job: set[tuple[str, str]] = set()
    for found in findings:
        count = len(where.get(found.fault, ()))
        common = len(names) > 1 and 2 * count > len(names)
        alone = len(names) == 1 and found.configured
        if found.verdict == "bad" and (common or alone or not found.node):
            if found.fault in of_job:
                continue
            of_job.add(found.fault)
            if common:
                found = replace(found, message=_of_most(found, count, len(names)))
            found = replace(found, node="")
        told[found] = None
    return list(told)


def save_findings(path: Path, findings: Sequence[Finding]) -> None:
    """Write findings for `load_findings`."""
    path.write_text(json.dumps([asdict(found) for found in findings]), encoding="utf-8")


def load_findings(path: Path) -> list[Finding]:
    """Read what `save_findings` wrote."""
    return [Finding(**value) for value in json.loads(path.read_text(encoding="utf-8"))]


def _of_most(finding: Finding, count: int, num_nodes: int) -> str:
    return (
        f"on {count} of {num_nodes} nodes, which is no single node's fault, so none is excluded: "
        f"{finding.message} (so on {finding.node})"
    )


def _line(group: Group) -> str:
    where = f"{hostlist(group.nodes)}: " if group.nodes else ""
    return f"{group.verdict}: {group.check}: {where}{group.message}"
