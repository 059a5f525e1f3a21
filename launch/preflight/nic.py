"""Network cards of a node against each other: a link that is down, or slower than its siblings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...comm.topology import NearestNics, Nic
from .finding import Finding

CHECK = "nic"


def nic_findings(nics: Sequence[Nic], nearest: Sequence[NearestNics], node: str) -> list[Finding]:
    """What is wrong with the cards that GPUs use, which are those nearest to one.

    Cards near no GPU may be of another kind (for storage, say) or not in use: of these only RDMA
    ports that are slower than others are told, as warnings.

    Args:
        nics: of the node.
        nearest: of each GPU, its nearest ones; empty where there are no GPUs.
        node: its name.
    """
    near = {name for one in nearest for name in one.names}
    found: list[Finding] = []
    rdma = [nic for nic in nics if nic.kind == "rdma"]
    used = [nic for nic in rdma if nic.name in near]
    for gpu, (names, _) in enumerate(nearest):
        ports = [nic for nic in used if nic.name in names]
        if ports and not any(nic.state == "active" for nic in ports):
            told = ", ".join(f"{nic.name} is {nic.state}" for nic in ports)
            message = f"{told}, and GPU {gpu} has no other port as near; look at cable and switch"
            found.append(Finding(CHECK, "bad", message, node))
    for ports, verdict in ((used, "bad"), ([n for n in rdma if n not in used], "warning")):
        fastest = max((nic.speed_gbps or 0 for nic in ports), default=0)
        for nic in ports:
            if nic.speed_gbps is not None and nic.speed_gbps < fastest:
                message = (
                    f"{nic.name} runs at {nic.speed_gbps:g} Gbit/s, its siblings at {fastest:g}; "
                    "look at cable, port and switch"
                )
                found.append(
                    Finding(CHECK, "bad" if verdict == "bad" else "warning", message, node)
                )
    return found


def interface_findings(nics: Sequence[Nic], environ: Mapping[str, str], node: str) -> list[Finding]:
    """Whether the interface that gloo is told to use is there, and up.

    A name that is wrong is most often wrong everywhere, so it is the job's mistake, not a node's.

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
            problem = f"names {name}, which {node} does not have; there is {has}"
        elif states[name] == "down":
            problem = f"names {name}, which is down on {node}"
        else:
            continue
        message = f"GLOO_SOCKET_IFNAME={told} {problem}; name one that all nodes have"
        found.append(Finding("environment", "bad", message))
    return found
