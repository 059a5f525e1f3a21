"""Where a node of a job is among the others: its environment, the network, and the job's folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..guards import require
from ..settings import ConfigError, option
from .hostlist import nodes_of_job
from .order import order_nodes
from .roll_call import find_folder, token_of
from .section import require_interface
from .topology import Switch, parse_topology

if TYPE_CHECKING:
    from ..config import Config

AFTER_S = 30.0  # that a node waits longer than the head, which so tells first


@dataclass(frozen=True)
class NodeConfig:
    """What `counterflow node` is told."""

    folder: str = option(
        "", "folder of this start of the job, shared by all nodes; else by the run and the job"
    )
    ranks_per_node: int = option(0, "ranks of each node; 0: the mesh's, shared out evenly")
    interface: str = option("", "network interface over which ranks meet, and gloo and NCCL send")
    roll_call_s: int = option(
        0,
        "seconds that nodes wait for each other at the start; 0: three times run.timeout_s, at "
        "least a quarter of an hour",
    )

    def __post_init__(self) -> None:
        for name in ("ranks_per_node", "roll_call_s"):
            require(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        require_interface(self.interface)

    def limit_s(self, config: Config) -> float:
        """How long nodes wait for each other at the start, seconds."""
        return self.roll_call_s or max(900.0, 3 * config.run.timeout_s)


@dataclass(frozen=True)
class Site:
    """This node among those of its job.

    Attributes:
        folder: of this start of the job.
        node: this one's name.
        order: all of them.
        per_node: ranks of each.
        switches: the topmost ones, empty where nothing is known.
        token: of this start, see `roll_call.token_of`.
    """

    folder: Path
    node: str
    order: tuple[str, ...]
    per_node: int
    switches: tuple[Switch, ...]
    token: str

    @property
    def node_rank(self) -> int:
        """This node's place in the order."""
        return self.order.index(self.node)

    @property
    def head(self) -> str:
        """The node at which all meet."""
        return self.order[0]


def find_site(told: NodeConfig, config: Config, environ: Mapping[str, str] = os.environ) -> Site:
    """This node among those of its job, by its environment and the job's files.

    The job's script has made the folder of these; in a script of one's own the step's first process
    makes it.

    Raises:
        ValueError: they tell nothing, or do not fit the mesh.
        NotThereError: the folder is not to be seen from here.
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
    makes = not told.folder and environ.get("SLURM_PROCID", "0") == "0"
    find_folder(folder, make=makes, timeout_s=told.limit_s(config) + AFTER_S)
    switches = _switches(folder)
    group_nodes = -(-mesh.ep // per_node)  # that a group needs, the last one perhaps in part
    order = order_nodes(nodes, switches, group_nodes=group_nodes)
    return Site(folder.absolute(), node, order, per_node, switches, token_of(environ))


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
