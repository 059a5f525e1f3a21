"""Which process this is, on which node and as which of that node's, as its launcher tells it.

Three launchers are understood: torchrun (and whoever sets its variables), MPI, and Slurm's srun.
The first that speaks is believed, in this order: torchrun may itself have been started by srun or
mpirun, and mpirun starts its daemons with srun, so that what Slurm says then is about the daemon.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Source = Literal["torchrun", "environment", "mpi", "slurm", "alone"]

# Rank and size as MPI's launchers tell them: Open MPI; MPICH, Intel MPI and others of its family.
_MPI_VARIABLES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
)
_SLURM_VARIABLES = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
_RANK_VARIABLES = (("RANK", "WORLD_SIZE"), *_MPI_VARIABLES, _SLURM_VARIABLES)
# What only mpirun sets: Open MPI's, and that of MPICH's family.
_MPIRUN_ONLY = ("OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS")


@dataclass(frozen=True)
class ProcessPlace:
    """One process among all processes of a job. None stands for what the launcher does not tell.

    Attributes:
        rank, world_size: among all processes.
        node: index of its node, by which processes of one node know each other; not necessarily in
            the order of ranks.
        local_rank, local_world_size: among the processes of its node.
        source: who told: "torchrun"; "environment" for another launcher that sets RANK and
            WORLD_SIZE; "mpi"; "slurm"; "alone" where nobody did, which is one process.
        problem: why MPI could not be asked for the node, "" where nothing was in the way.
    """

    rank: int
    world_size: int
    node: int | None
    local_rank: int | None
    local_world_size: int | None
    source: Source
    problem: str = ""


def place_of_process(
    environ: Mapping[str, str] = os.environ, *, timeout_s: float = 300.0
) -> ProcessPlace:
    """The place of this process.

    Under MPI a collective of all processes that MPI started, through mpi4py, which initialises MPI
    if that has not been done; without an mpi4py of this MPI the node stays unknown, and `problem`
    says why. Otherwise nothing but the environment is read.

    Args:
        environ: the environment.
        timeout_s: under MPI, limit of the wait for the other processes, seconds.

    Raises:
        ValueError: a variable is no number or does not fit the others.
        CommError: other processes that MPI started did not answer within the limit.
    """
    if environ.get("RANK") and environ.get("WORLD_SIZE"):
        return _told_by_torchrun(environ)
    mpi = _told_by_mpi(environ)
    slurm = _told_by_slurm(environ)
    if slurm is not None and (mpi is None or _srun_set_mpis(environ, slurm, mpi)):
        return slurm
    if mpi is None:
        return ProcessPlace(0, 1, 0, 0, 1, "alone")
    if mpi == (0, 1):
        return ProcessPlace(0, 1, 0, 0, 1, "mpi")
    from .mpi import load_mpi, place_in_mpi

    try:
        module = load_mpi(*mpi)
    except ValueError as error:
        return ProcessPlace(*mpi, None, None, None, "mpi", str(error))
    return place_in_mpi(module, timeout_s=timeout_s)


def rank_told(environ: Mapping[str, str] = os.environ) -> int | None:
    """The rank that a launcher gave to this process, if that much makes sense of its variables."""
    for rank_name, size_name in _RANK_VARIABLES:
        rank, size = environ.get(rank_name, ""), environ.get(size_name, "")
        if rank.isdecimal() and size.isdecimal() and int(rank) < int(size):
            return int(rank)
    return None


def _told_by_torchrun(environ: Mapping[str, str]) -> ProcessPlace:
    """torchrun gives GROUP_RANK, the node. Other launchers number processes node by node."""
    size = _number(environ, "WORLD_SIZE", 1)
    assert size is not None
    rank = _number(environ, "RANK", 0, size)
    assert rank is not None
    per_node = _number(environ, "LOCAL_WORLD_SIZE", 1, size + 1)
    node = _number(environ, "GROUP_RANK", 0)
    source: Source = "environment" if node is None else "torchrun"
    if node is None and per_node is not None:
        node = rank // per_node
    local = _number(environ, "LOCAL_RANK", 0, per_node)
    if local is None and source == "environment" and per_node is not None:
        local = rank % per_node
    return ProcessPlace(rank, size, node, local, per_node, source)


def _told_by_mpi(environ: Mapping[str, str]) -> tuple[int, int] | None:
    """Rank and number of processes where MPI started this one."""
    for rank_name, size_name in _MPI_VARIABLES:
        size = _number(environ, size_name, 1)
        if size is not None:
            rank = _number(environ, rank_name, 0, size)
            if rank is not None:
                return rank, size
    return None


def _srun_set_mpis(environ: Mapping[str, str], slurm: ProcessPlace, mpi: tuple[int, int]) -> bool:
    """Whether srun started the processes itself and set MPI's variables for them (--mpi=pmi2).

    All processes must find the same, because to ask MPI is a collective.
    """
    by_mpirun = any(environ.get(name) for name in _MPIRUN_ONLY)
    return not by_mpirun and mpi == (slurm.rank, slurm.world_size)


def _told_by_slurm(environ: Mapping[str, str]) -> ProcessPlace | None:
    """What srun tells the processes of a step.

    A batch script has SLURM_PROCID and SLURM_NTASKS too, but is one process; only srun's own have
    SLURM_STEP_NUM_TASKS. SLURM_NODEID keeps its meaning where --distribution=arbitrary has put the
    ranks in another order than the nodes.
    """
    rank_name, size_name = _SLURM_VARIABLES
    size = _number(environ, size_name, 1)
    rank = _number(environ, rank_name, 0)
    if size is None or rank is None:
        return None
    if rank >= size:
        raise ValueError(
            f"the environment's {rank_name}={rank} is beyond {size_name}={size}, as in a "
            "heterogeneous Slurm step, which is not understood; start through torchrun, or set "
            "RANK and WORLD_SIZE for each process"
        )
    node = _number(environ, "SLURM_NODEID", 0)
    per_node = None
    told = environ.get("SLURM_STEP_TASKS_PER_NODE")
    if told and node is not None:
        counts = tasks_per_node(told)
        if sum(counts) != size or node >= len(counts):
            raise ValueError(
                f"the environment's SLURM_STEP_TASKS_PER_NODE={told!r} does not fit "
                f"SLURM_STEP_NUM_TASKS={size} and SLURM_NODEID={node}; were they expanded in the "
                "batch script instead of in the step?"
            )
        per_node = counts[node]
    local = _number(environ, "SLURM_LOCALID", 0, per_node)
    return ProcessPlace(rank, size, node, local, per_node, "slurm")


def tasks_per_node(text: str) -> list[int]:
    """Tasks of each node as Slurm writes them: "4(x2),3" is 4, 4, 3.

    Raises:
        ValueError: written otherwise.
    """
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"([0-9]+)(?:\(x([0-9]+)\))?", part.strip())
        if found is None:
            raise ValueError(
                f"SLURM_STEP_TASKS_PER_NODE={text!r} is no list of tasks per node as Slurm writes "
                "it, such as '4(x2),3'"
            )
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def _number(
    environ: Mapping[str, str], name: str, least: int, below: int | None = None
) -> int | None:
    """A variable's whole number, None where it is not set.

    Raises:
        ValueError: it is none, or out of its range.
    """
    text = environ.get(name)
    if text is None or text == "":
        return None
    good = text.isascii() and text.isdigit() and int(text) >= least
    if not good or (below is not None and int(text) >= below):
        upto = "up" if below is None else f"to {below - 1}"
        raise ValueError(
            f"the environment's {name}={text!r} is not a whole number from {least} {upto}; "
            "start through torchrun, mpirun or srun, or correct it"
        )
    return int(text)
