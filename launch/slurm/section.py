"""What `counterflow launch` is told: one frozen dataclass for Slurm, one for this machine.

Each field is a flag (`gpus_per_node` is `--gpus-per-node`) and a key of a `--config` file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Literal

from ..guards import require, require_choice
from ..settings import option
from .hostlist import parse_hostlist

Runtime = Literal["pyxis", "apptainer"]

_TIME = re.compile(r"[0-9]+(:[0-9]{1,2}){0,2}|[0-9]+-[0-9]{1,2}(:[0-9]{1,2}){0,2}|UNLIMITED")
_MEMORY = re.compile(r"[0-9]+[KMGT]?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=.*", re.DOTALL)
_SWITCHES = re.compile(r"[0-9]+(@[0-9:-]+)?")
_INTERFACE = re.compile(r"[A-Za-z0-9_.:@-]{1,15}")  # Linux's own limit
_EXTRA = re.compile(r"--[a-z][a-z-]*(=.*)?|-[A-Za-z].*")


@dataclass(frozen=True)
class LocalConfig:
    """How `counterflow launch local` starts a run on this machine."""

    max_restarts: int = option(
        3, "times that all ranks start again, from the last checkpoint, after one was lost"
    )
    max_requeues: int = option(
        0,
        "times that a run that has failed after those (not one that was stopped) starts again, as "
        "long as it has saved a checkpoint",
    )

    def __post_init__(self) -> None:
        for name in ("max_restarts", "max_requeues"):
            require(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")


@dataclass(frozen=True)
class SlurmConfig:
    """The job that `counterflow launch slurm` submits; an empty text leaves a thing to Slurm."""

    nodes: int = option(1, "nodes of the job")
    gpus_per_node: int = option(0, "GPUs of each node, one for each of its ranks")
    ranks_per_node: int = option(0, "ranks of each node, where they compute on CPUs")
    partition: str = option("", "partition, or several with commas")
    account: str = option("", "account that is charged")
    qos: str = option("", "quality of service")
    time: str = option("", "time limit, such as 30 (minutes), 4:00:00 or 2-12:00:00")
    exclusive: bool = option(False, "let no other job onto the nodes")
    job_name: str = option("", "name of the job; else the run's")
    cpus_per_task: int = option(0, "CPUs of a node's one task, which its ranks share")
    mem: str = option("", "memory of each node, such as 480G; 0 is all")
    constraint: str = option("", "features that nodes must have")
    reservation: str = option("", "reservation to run in")
    nodelist: str = option("", "nodes that the job must have, such as node[01-04]")
    exclude: str = option("", "nodes that the job must not have")
    switches: str = option("", "most switches that the job may span, such as 1 or 1@4:00:00")
    interface: str = option(
        "", "network interface over which ranks meet, and gloo and NCCL send, such as ib0"
    )
    python: str = option(
        "",
        "Python that has counterflow on the nodes; else the one that runs this command, and "
        "python3 inside a container",
    )
    container_image: str = option("", "container that the ranks run in; else none")
    container_mounts: tuple[str, ...] = option(
        (), "folder that the container sees: FROM:TO or FROM:TO:ro (the run's folder is added)"
    )
    container_runtime: Runtime = option(  # noqa: RUF009  a Literal is immutable
        "pyxis", "what starts the container: pyxis (srun --container-image) or apptainer"
    )
    sbatch: tuple[str, ...] = option((), "further option for sbatch, such as --mail-type=END")
    env: tuple[str, ...] = option((), "environment variable of the job, KEY=VALUE")
    setup: tuple[str, ...] = option(
        (),
        "line of shell for the start of the job, such as 'module load cuda': the one text that "
        "a shell reads as it is",
    )
    max_requeues: int = option(
        10,
        "times in a row that the job queues itself again without having come further (a higher "
        "step's checkpoint); 0: it never does",
    )
    max_restarts: int = option(
        3,
        "times that all ranks start again within the job, from the last checkpoint, after one "
        "was lost",
    )
    signal_seconds: int = option(
        120, "seconds before the time limit at which the run saves a checkpoint and stops; 0: never"
    )
    roll_call_s: int = option(
        0, "seconds that nodes wait for each other at the start; 0: by the run's timeout_s"
    )
    array: tuple[str, ...] = option(
        (),
        "configuration of one task of a job array, in the place of CONFIG.toml; each its own "
        "run.name",
    )

    def __post_init__(self) -> None:
        self._require_plain_texts()
        require("nodes", self.nodes, self.nodes >= 1, "1 or more")
        for name in (
            *("gpus_per_node", "ranks_per_node", "cpus_per_task", "max_requeues", "max_restarts"),
            "roll_call_s",
        ):
            require(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        if self.gpus_per_node and self.ranks_per_node:
            raise ValueError(
                f"gpus_per_node={self.gpus_per_node} and ranks_per_node={self.ranks_per_node}: "
                "give one of them; every GPU has one rank, and ranks_per_node is for CPUs"
            )
        # sbatch's own limit: the time before the end is kept in 16 bits.
        seconds = self.signal_seconds
        require("signal_seconds", seconds, 0 <= seconds <= 65535, "0 (never) to 65535")
        self._require_form("time", _TIME, "minutes, [D-]H:MM:SS or UNLIMITED")
        self._require_form("mem", _MEMORY, "a number with K, M, G or T")
        self._require_form("switches", _SWITCHES, "a number, or N@TIME")
        require_interface(self.interface)
        for name in ("nodelist", "exclude"):
            if getattr(self, name):
                parse_hostlist(getattr(self, name), name)
        require_choice("container_runtime", self.container_runtime, Runtime)
        self._require_container()
        for line in self.sbatch:
            require("sbatch", repr(line), bool(_EXTRA.fullmatch(line)), "one option: --NAME=VALUE")
        for pair in self.env:
            require("env", repr(pair), bool(_VARIABLE.fullmatch(pair)), "KEY=VALUE")

    @property
    def per_node(self) -> int:
        """Ranks of each node."""
        return self.gpus_per_node or self.ranks_per_node

    def require_world_size(self, world_size: int) -> None:
        """Raise ValueError unless the job has exactly the `world_size` ranks of a mesh."""
        if not self.per_node:
            raise ValueError(
                "how many ranks a node has is not told; give --gpus-per-node, or --ranks-per-node "
                "where they compute on CPUs"
            )
        if self.nodes * self.per_node == world_size:
            return
        fitting = world_size // self.per_node
        nodes = f"--nodes {fitting}" if fitting * self.per_node == world_size else "other numbers"
        raise ValueError(
            f"--nodes {self.nodes} with {self.per_node} ranks each are "
            f"{self.nodes * self.per_node} ranks, but the mesh has {world_size}; give {nodes}, or "
            "change mesh.pp or mesh.dp"
        )

    def _require_plain_texts(self) -> None:
        """A line break would end a comment, an #SBATCH line or a line of setup."""
        for field in fields(self):
            value = getattr(self, field.name)
            for text in value if isinstance(value, tuple) else (value,):
                if isinstance(text, str) and not is_plain(text):
                    raise ValueError(
                        f"{field.name} must be one line without control characters, got {text!r}"
                    )

    def _require_form(self, name: str, form: re.Pattern[str], wanted: str) -> None:
        text = getattr(self, name)
        require(name, repr(text), not text or bool(form.fullmatch(text)), wanted)

    def _require_container(self) -> None:
        if self.container_mounts and not self.container_image:
            raise ValueError(
                f"container_mounts={','.join(self.container_mounts)!r} without container_image: "
                "give the image, or leave the mounts out"
            )
        for mount in self.container_mounts:
            good = "," not in mount and 2 <= len(mount.split(":")) <= 3 and all(mount.split(":"))
            require("container_mounts", repr(mount), good, "FROM:TO or FROM:TO:ro, without a comma")


def require_interface(name: str) -> None:
    """Raise ValueError unless `name` can be that of a network interface, or is empty."""
    fine = not name or bool(_INTERFACE.fullmatch(name))
    require("interface", repr(name), fine, "the name of a network interface, at most 15 characters")


def is_plain(text: str) -> bool:
    """Whether a text is one line that a terminal and a script show as it is."""
    return all(
        c >= " " and c != "\x7f" and not 0x80 <= ord(c) <= 0x9F and not "\ud800" <= c <= "\udfff"
        for c in text
    )
