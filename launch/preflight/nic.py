"""Network cards of a node against each other: a link that is down, or slower than its siblings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...comm.topology import NearestNics, Nic
from .finding import Finding, Verdict

CHECK = "nic"


def nic_findings(nics: Sequence[Nic], nearest: Sequence[NearestNics], node: str) -> list[Finding]:
    """What is wrong with the cards that GPUs use, which are those nearest to one.

    A card that is on no GPU's PCIe switch may be of another kind (for storage, say) or not in use,
    even if none is nearer: of these RDMA ports that are slower than others are told as warnings.

    Args:
        nics: of the node.
        nearest: of each GPU, its nearest ones; empty where there are no GPUs.
        node: its name.
    """
    near = {name for one in nearest for name in one.names}
    # Only a switch of its own makes a card a GPU's; farther ones may be for something else.
    own = {name for one in nearest if one.nearness == "switch" for name in one.names}
    found: list[Finding] = []
    rdma = [nic for nic in nics if nic.kind == "rdma"]
    for gpu, (names, _) in enumerate(nearest):
        ports = [nic for nic in rdma if nic.name in names]
        if ports and not any(nic.state == "active" for nic in ports):
            told = ", ".join(f"{nic.name} is {nic.state}" for nic in ports)
            message = f"{told}, and GPU {gpu} has no other port as near; look at cable and switch"
            found.append(Finding(CHECK, "bad", message, node, kind="down"))
    others = {nic.name for nic in rdma} - near
    ranked: list[tuple[set[str], Verdict]] = [
        (own, "bad"),
        (near - own, "warning"),
        (others, "warning"),
    ]
    for names, verdict in ranked:
        ports = [nic for nic in rdma if nic.name in names]
        fastest = max((nic.speed_gbps or 0 for nic in ports), default=0)
        for nic in ports:
            if nic.speed_gbps is not None and nic.speed_gbps < fastest:
                message = (
                    f"{nic.name} runs at {nic.speed_gbps:g} Gbit/s, its siblings at {fastest:g}; "
                    "look at cable, port and switch"
                )
                found.append(Finding(CHECK, verdict, message, node, kind="slow"))
    return found


def interface_findings(nics: Sequence[Nic], environ: Mapping[str, str], node: str) -> list[Finding]:
    """Whether the interface that gloo is told to use is there, and up.

    A name that is wrong everywhere is the job's mistake; one that is missing or down on few nodes
    is theirs.

    Args:
        nics: of the node.
        environ: GLOO_SOCKET_IFNAME: names, with commas between.
        node: its name.
    """
    told = environ.get("GLOO_SOCKET_IFNAME", "")
    states = {nic.name: nic.state for nic in nics if nic.kind == "net"}
    found: list[Finding] = []
    for name in filter(None, (part.strip() for part in told.split(","))):
        if name == "lo":
            continue
        if name not in states:
            has = ", ".join(sorted(states)) or "none but loopback"
            problem = f"names {name}, which is not there; there is {has}"
        elif states[name] == "down":
            problem = f"names {name}, which is down"
        else:
            continue
        message = f"GLOO_SOCKET_IFNAME={told} {problem}; name one that all nodes have"
        kind = f"interface {name}"
        found.append(Finding("environment", "bad", message, node, kind=kind, configured=True))
    return found
