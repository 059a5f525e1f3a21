"""`counterflow node`: what srun starts on each node of a job, and what starts that node's ranks.

Every node finds the same order of all nodes from the same facts; see `roll_call` for how they meet.
A mistake that all nodes find is told by one of them.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..guards import require
from ..life.status import DONE, FAILED, MISTAKE, STOPPED
from ..settings import ConfigError, option
from .address import (
    addresses_of,
    derived_port,
    head_address,
    interface_towards,
    open_port,
)
from .hostlist import nodes_of_job
from .options import Request, flags, parse, wants_help
from .order import digest, order_nodes
from .placement import ORDER
from .roll_call import (
    Meeting,
    Present,
    await_meeting,
    await_nodes,
    await_statuses,
    call_meeting,
    leave_status,
    require_one_order,
    say_present,
)
from .topology import Switch, lowest_switches, parse_topology

if TYPE_CHECKING:
    from ..config import Config

USAGE = "counterflow node [options] -- train [CONFIG.toml] [--dotted.key VALUE ...]"
_LAST_S = 60.0  # nodes that end well wait so long for the others
_QUIET_S = 5.0


@dataclass(frozen=True)
class NodeConfig:
    """What `counterflow node` is told."""

    folder: str = option(
        "", "folder of this start of the job, shared by all nodes; else by the run and the job"
    )
    ranks_per_node: int = option(0, "ranks of each node; 0: the mesh's, shared out evenly")
    interface: str = option("", "network interface over which ranks meet, and gloo and NCCL send")

    def __post_init__(self) -> None:
        require("ranks_per_node", self.ranks_per_node, self.ranks_per_node >= 0, "0 or more")


@dataclass(frozen=True)
class Site:
    """This node among those of its job.

    Attributes:
        folder: of this start of the job.
        node: this one's name.
        order: all of them.
        per_node: ranks of each.
        switches: the topmost ones, empty where nothing is known.
    """

    folder: Path
    node: str
    order: tuple[str, ...]
    per_node: int
    switches: tuple[Switch, ...]

    @property
    def node_rank(self) -> int:
        """This node's place in the order."""
        return self.order.index(self.node)

    @property
    def head(self) -> str:
        """The node at which all meet."""
        return self.order[0]


def run(arguments: Sequence[str]) -> int:
    """The command; the exit status is returned."""
    if wants_help(arguments):
        print(_help())
        return DONE
    from ..life.stop import hold

    hold()  # until the ranks' launcher listens; Slurm may ask to stop at any time
    try:
        request = parse(arguments, NodeConfig(), {}, USAGE)
        config = _load(request.train)
        site = find_site(request.config, config)
    except (ValueError, OSError) as error:
        return _tell_once(error)
    try:
        status = _start(site, config, request)
    except (ValueError, OSError) as error:
        status = _fail(error)
    except Exception:
        leave_status(site.folder, site.node, FAILED)
        raise
    return _leave(site, status)


def find_site(told: NodeConfig, config: Config, environ: Mapping[str, str] = os.environ) -> Site:
    """This node among those of its job, by its environment and the job's files.

    Raises:
        ValueError: they tell nothing, or do not fit the mesh.
    """
    nodes = nodes_of_job(environ)
    node = environ.get("SLURMD_NODENAME", "")
    if node not in nodes:
        raise ConfigError(
            f"SLURMD_NODENAME={node!r} is none of the job's nodes ({', '.join(nodes[:8])}); start "
            "`counterflow node` with srun, in a step and not in the batch script"
        )
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "")
    if tasks != str(len(nodes)):
        raise ConfigError(
            f"SLURM_STEP_NUM_TASKS={tasks!r} processes on {len(nodes)} nodes: `counterflow node` "
            "is started once a node, by srun --ntasks-per-node=1 on all of the job's nodes"
        )
    mesh = config.mesh
    per_node = told.ranks_per_node or max(1, mesh.world_size // len(nodes))
    if per_node * len(nodes) != mesh.world_size:
        raise ConfigError(
            f"{len(nodes)} nodes with {per_node} ranks each, but mesh pp={mesh.pp} x dp={mesh.dp} "
            f"needs {mesh.world_size}; change mesh.pp or mesh.dp, or the job's nodes"
        )
    folder = Path(told.folder) if told.folder else _folder_of(config, environ)
    switches = _switches(folder)
    order = order_nodes(nodes, switches, group_nodes=max(1, mesh.ep // per_node))
    return Site(folder.absolute(), node, order, per_node, switches)


def _start(site: Site, config: Config, request: Request[NodeConfig]) -> int:
    """Meet the other nodes, and start this one's ranks; their exit status."""
    from ...comm.topology import this_machine
    from ..preflight.run import before_training
    from .resolved import gpus_wanted, resolved_path

    interface, limit_s = request.config.interface, config.run.timeout_s
    machine = this_machine()
    present = Present(machine.host, machine.boot, digest(site.order))
    say_present(site.folder, site.node, present)
    if site.node == site.head:
        try:
            meeting = _meet(site, config, interface)
        except (ValueError, OSError) as error:
            meeting = Meeting(status=_fail(error))
        call_meeting(site.folder, meeting)
    else:
        # The head waits for the last of us first.
        meeting = await_meeting(site.folder, site.head, timeout_s=2 * limit_s)
    if meeting.status:
        return meeting.status
    _set_environment(site, meeting, interface, os.environ)

    from ..life.nodes import Nodes
    from ..torchrun import choose_device, set_threads, start

    nodes = None
    if len(site.order) > 1:
        run_id = "/".join(site.folder.parts[-2:])  # job and start
        nodes = Nodes(len(site.order), site.node_rank, meeting.address, run_id)

    def start_preflight(arguments: Sequence[str], *, nproc: int) -> int:
        port = meeting.preflight_port
        return start(arguments, nproc=nproc, port=port, nodes=nodes, timeout_s=limit_s)

    status = before_training(
        config,
        resolved_path(config, site.folder),
        nproc=site.per_node,
        gpus_wanted=gpus_wanted(config, site.per_node),
        environ=os.environ,
        num_nodes=len(site.order),
        start=start_preflight,
    )
    if status != DONE:
        return status
    set_threads(choose_device(config.run.device, site.per_node), site.per_node)
    return start(
        ["train", *request.train],
        nproc=site.per_node,
        port=meeting.port,
        nodes=nodes,
        max_restarts=config.run.max_restarts,
        folder=config.run.path,
        grace_s=config.checkpoint.grace_s if config.checkpoint.enabled else 0.0,
        timeout_s=limit_s,
    )


def _meet(site: Site, config: Config, interface: str) -> Meeting:
    """On the head: see that all nodes are there and agree; where they meet."""
    from .resolved import write_resolved

    found = await_nodes(site.folder, site.order, timeout_s=config.run.timeout_s)
    require_one_order(found)
    own = found[site.node].machine
    others = [name for name in site.order if name != site.node]
    address = head_address(
        [site.node, socket.gethostname()],
        others,
        interface=interface,
        one_machine=all(not own.surely_differs(found[name].machine) for name in others),
    )
    switches = lowest_switches(site.switches)
    order = [{"node": node, "switch": switches.get(node, "")} for node in site.order]
    text = json.dumps({"per_node": site.per_node, "order": order}, indent=1)
    (site.folder / "order.json").write_text(text + "\n", encoding="utf-8")
    write_resolved(config, site.folder)
    derived = derived_port(os.environ)
    port = open_port(config.run.port, derived)
    return Meeting(address, port, open_port(0, derived, besides=port))


def _set_environment(
    site: Site, meeting: Meeting, interface: str, environ: MutableMapping[str, str]
) -> None:
    """What the ranks of this node are to find in their environment."""
    environ[ORDER] = str(site.folder / "order.json")
    if interface:
        environ["GLOO_SOCKET_IFNAME"] = environ["NCCL_SOCKET_IFNAME"] = interface
    elif meeting.address != "127.0.0.1" and "GLOO_SOCKET_IFNAME" not in environ:
        # gloo listens where its host's name leads, which in vain is the loopback on some systems.
        own = addresses_of(socket.gethostname())
        if not own or own[0].startswith("127."):
            towards = interface_towards(meeting.address)
            if towards:
                environ["GLOO_SOCKET_IFNAME"] = towards


def _load(train: Sequence[str]) -> Config:
    from ..cli import split_arguments
    from ..config import load

    return load(*split_arguments(train))


def _folder_of(config: Config, environ: Mapping[str, str]) -> Path:
    """Where a job that was not submitted by `counterflow launch` has its files."""
    # Components of a heterogeneous job have numbers of their own; the first one's is the job's.
    job = environ.get("SLURM_JOB_ID_HET_GROUP_0") or environ.get("SLURM_JOB_ID", "0")
    numbers = [job, environ.get("SLURM_STEP_ID", "0")]
    count = environ.get("SLURM_RESTART_COUNT", "0")
    if not all(text.isdecimal() for text in (*numbers, count)):
        raise ConfigError(
            f"SLURM_JOB_ID={numbers[0]!r}, SLURM_STEP_ID={numbers[1]!r} and SLURM_RESTART_COUNT="
            f"{count!r} are not all numbers; start `counterflow node` with srun"
        )
    return config.run.path / "slurm" / numbers[0] / f"step-{numbers[1]}-start-{count}"


def _switches(folder: Path) -> tuple[Switch, ...]:
    """What the job's script has noted of the network; nothing where it could not."""
    try:
        text = (folder / "topology").read_text(encoding="utf-8")
    except FileNotFoundError:
        return ()
    return parse_topology(text)


def _leave(site: Site, status: int) -> int:
    """Leave the status for the job's script; nodes that end well end together."""
    try:
        leave_status(site.folder, site.node, status)
        if status in (DONE, STOPPED):
            await_statuses(site.folder, len(site.order), timeout_s=_LAST_S)
    except OSError as error:
        _fail(error)
    return status


def _tell_once(error: Exception) -> int:
    """A mistake that every node finds is told by the first one, whose end ends the others.

    What only another node finds is told by that, a moment later.
    """
    if os.environ.get("SLURM_PROCID", "0") != "0":
        time.sleep(_QUIET_S)
    return _fail(error)


def _fail(error: Exception) -> int:
    text = str(error)
    if isinstance(error, OSError):
        text = f"{error.filename or 'the system'}: {error.strerror or error}"
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    sys.stderr.write(f"counterflow: error: node {name}: {text}\n")  # in one write
    return MISTAKE


def _help() -> str:
    return "\n".join(
        [
            f"usage: {USAGE}",
            "",
            "Starts the ranks of one node of a Slurm job. `counterflow launch slurm` starts it; in",
            "a script of your own, srun does, once a node: srun --ntasks-per-node=1 counterflow",
            "node -- train CONFIG.toml (docs/slurm.md).",
            "",
            *flags(NodeConfig(), {}),
        ]
    )
