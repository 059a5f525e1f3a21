"""Nodes by MPI: real processes under mpiexec, and what is said where mpi4py does not fit."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from counterflow.comm.topology import ProcessPlace, place_of_process
from counterflow.comm.topology.mpi import load_mpi, place_in_mpi

pytestmark = pytest.mark.alone

_TELL = """
import dataclasses, json, sys
from counterflow.comm.topology import place_of_process
from counterflow.comm.topology.mpi import gather_in_mpi, load_mpi
place = place_of_process(timeout_s=60)
told = gather_in_mpi(
    load_mpi(place.rank, 4), dataclasses.asdict(place), "tell their places", timeout_s=60
)
if place.rank == 0:
    print(json.dumps(told))
"""

_LATE = """
import os, time
from mpi4py import MPI
from counterflow.comm.errors import CommError
from counterflow.comm.topology import place_of_process
if MPI.COMM_WORLD.rank:
    time.sleep(600)  # there, but never with the others; ended by mpiexec
try:
    place_of_process(timeout_s=0.5)
except CommError as error:
    print(error, error.peers, flush=True)
os._exit(3)
"""


@pytest.fixture
def mpiexec() -> str:
    """The mpiexec beside this Python, or else on the path."""
    reason = "mpi4py is not installed"
    pytest.importorskip("mpi4py", reason=reason)
    beside = Path(sys.executable).with_name("mpiexec")
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    if found is None:
        pytest.skip("there is no mpiexec (pip install mpich)")
    return found


def under_mpi(
    mpiexec: str, code: str, count: int, **environ: str
) -> subprocess.CompletedProcess[str]:
    # A stand-in for several nodes is MPICH's own: its variable divides one machine's processes.
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return subprocess.run(
        [mpiexec, "-n", str(count), sys.executable, "-c", code],
        env=dict(os.environ) | root | environ,
        capture_output=True,
        text=True,
        timeout=240,
    )


def places(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_processes_that_share_memory_are_one_node(mpiexec: str) -> None:
    told = places(under_mpi(mpiexec, _TELL, 4))
    assert [(p["rank"], p["node"], p["local_rank"]) for p in told] == [
        (0, 0, 0),
        (1, 0, 1),
        (2, 0, 2),
        (3, 0, 3),
    ]
    assert {(p["world_size"], p["local_world_size"], p["source"]) for p in told} == {(4, 4, "mpi")}


def test_nodes_are_numbered_by_their_lowest_rank_also_where_ranks_alternate(mpiexec: str) -> None:
    version = subprocess.run([mpiexec, "--version"], capture_output=True, text=True).stdout
    if "HYDRA" not in version:
        pytest.skip("only MPICH can pretend that one machine is several nodes")
    told = places(under_mpi(mpiexec, _TELL, 4, MPIR_CVAR_ODD_EVEN_CLIQUES="1"))
    assert [(p["node"], p["local_rank"], p["local_world_size"]) for p in told] == [
        (0, 0, 2),
        (1, 0, 2),
        (0, 1, 2),
        (1, 1, 2),
    ]


def test_nodes_have_numbers_without_gaps() -> None:
    # A fake of MPI, for what MPICH cannot pretend: two nodes of two consecutive ranks.
    shared = SimpleNamespace(rank=1, size=2, bcast=lambda _, root: 2, Free=lambda: None)
    world = SimpleNamespace(
        rank=3,
        size=4,
        Ibarrier=lambda: SimpleNamespace(Test=lambda: True),
        Split_type=lambda _, key: shared,
        allgather=lambda _: [0, 0, 2, 2],
    )
    fake = SimpleNamespace(COMM_WORLD=world, COMM_TYPE_SHARED=1)
    place = place_in_mpi(fake, timeout_s=1.0)
    assert place == ProcessPlace(3, 4, 1, 1, 2, "mpi")


def test_a_process_that_does_not_answer_is_waited_for_within_the_limit(mpiexec: str) -> None:
    done = under_mpi(mpiexec, _LATE, 2)
    assert done.stdout.strip() == (
        "rank 0: waiting for all 2 processes that MPI started to tell which of them share a node: "
        "no answer within 0.5 s; each of them must make the same calls (1,)"
    )


def test_an_mpi4py_of_another_mpi_than_the_mpirun_is_named() -> None:
    pytest.importorskip("mpi4py", reason="mpi4py is not installed")
    # As mpi4py finds it under a foreign mpirun: variables of one, and a world of its own.
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("PMI", "OMPI", "SLURM"))}
    environ |= {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
    code = (
        "import dataclasses, json; from counterflow.comm.topology import place_of_process;"
        "print(json.dumps(dataclasses.asdict(place_of_process())))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["rank"], told["world_size"], told["node"], told["source"]) == (1, 2, None, "mpi")
    assert told["problem"].startswith(
        "MPI started this process as rank 1 of 2, but in mpi4py it is rank 0 of 1: mpi4py is bound "
        "to another MPI ("
    )


def test_a_missing_mpi4py_is_named_where_mpi_started_several_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", None)
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    missing = r"as one of 4, but mpi4py.* \(ModuleNotFoundError: .*inst"
    with pytest.raises(ValueError, match=missing):
        load_mpi(1, 4)
    place = place_of_process({"PMI_RANK": "1", "PMI_SIZE": "4"})
    assert (place.rank, place.world_size, place.node, place.source) == (1, 4, None, "mpi")
    assert re.search(missing, place.problem)
