"""`counterflow doctor`: this machine, and where the ranks of a launch are; real processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from counterflow.comm.errors import CommError
from counterflow.comm.topology import (
    Gpu,
    GpuFacts,
    NearestNics,
    ProcessPlace,
    Topology,
)
from counterflow.launch import doctor, doctor_facts
from counterflow.launch.cli import main
from counterflow.launch.doctor_facts import (
    Library,
    ask_library,
    find_facts,
    variables_that_matter,
)
from counterflow.launch.doctor_ranks import first_host, meeting_of_step
from tests import cases_topology as cases
from tests.ranks import RankPool, free_port

KEYS = {"host", "python", "torch", "place", "gpus", "nics", "libraries", "environment", "topology"}
DOCTOR = ("-m", "counterflow", "doctor")
_TOLD = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_",
    "GROUP_",
    "MASTER_",
    "SLURM",
    "PMI",
    "OMPI",
    "TORCHELASTIC",
)


def start(
    command: Sequence[str], environ: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start a command without what a launcher around the tests may have set."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(_TOLD)}
    own |= {"OMP_NUM_THREADS": "1", **(environ or {})}
    return subprocess.Popen(
        command, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ends(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit status, stdout and stderr of each, all within 120 s."""
    try:
        said = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, out, err) for p, (out, err) in zip(processes, said, strict=True)]


def ranks_of(report: dict[str, Any]) -> list[tuple[int, int, int, str]]:
    host = report["host"]["name"]
    assert all(rank["host"] == host for rank in report["topology"]["ranks"])
    return [
        (r["rank"], r["node"], r["local_rank"], r["source"]) for r in report["topology"]["ranks"]
    ]


def test_one_process_describes_its_machine_without_importing_torch_itself() -> None:
    code = (
        "import sys; from counterflow.launch.cli import main; status = main(['doctor', '--json']);"
        "assert 'torch' not in sys.modules; sys.exit(status)"
    )
    [(status, out, err)] = ends([start([sys.executable, "-c", code])])
    assert status == 0, err
    report = json.loads(out)
    assert set(report) >= KEYS
    assert report["python"] == ".".join(map(str, sys.version_info[:3]))
    import torch

    assert report["torch"] == report["libraries"]["torch"]["version"] == torch.__version__
    assert report["host"]["cores"] == len(os.sched_getaffinity(0))
    assert report["environment"]["OMP_NUM_THREADS"] == "1"
    assert report["environment"]["GLOO_SOCKET_IFNAME"] is None
    assert report["place"]["source"] == "alone"
    assert ranks_of(report) == [(0, 0, 0, "alone")]
    for library in report["libraries"].values():
        assert (library["version"] is None) != (library["reason"] is None)


def test_under_torchrun_rank_0_tells_every_ranks_node_and_the_others_print_nothing() -> None:
    port = str(free_port())
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2"]
    command += ["--master-addr=127.0.0.1", f"--master-port={port}"]
    done = ends([start([*command, f"--node-rank={n}", *DOCTOR, "--json"]) for n in (0, 1)])
    assert [status for status, _, _ in done] == [0, 0], done
    assert done[1][1] == ""
    report = json.loads(done[0][1])
    source = "torchrun"
    assert ranks_of(report) == [
        (0, 0, 0, source),
        (1, 0, 1, source),
        (2, 1, 0, source),
        (3, 1, 1, source),
    ]
    assert report["place"]["local_world_size"] == 2
    (note,) = report["topology"]["notes"]
    assert "nodes 0, 1 are all on host" in note


def test_under_mpiexec_rank_0_tells_every_ranks_node_and_the_others_print_nothing() -> None:
    pytest.importorskip("mpi4py", reason="mpi4py is not installed")
    beside = Path(sys.executable).with_name("mpiexec")
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    if mpiexec is None:
        pytest.skip("there is no mpiexec (pip install mpich)")
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    command = [mpiexec, "-n", "2", sys.executable, *DOCTOR, "--json"]
    [(status, out, err)] = ends([start(command, root)])
    assert status == 0, err
    assert ranks_of(json.loads(out)) == [(0, 0, 0, "mpi"), (1, 0, 1, "mpi")]


def srun_step(rank: int) -> dict[str, str]:
    """What srun sets in a step of two tasks on one node."""
    return {
        "SLURM_PROCID": str(rank),
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_NODEID": "0",
        "SLURM_LOCALID": str(rank),
        "SLURM_JOB_ID": "71",
        "SLURM_STEP_ID": "3",
        "SLURM_STEP_NODELIST": "localhost",
    }


def test_processes_that_srun_started_meet_without_being_told_where(ranks: RankPool) -> None:
    port = str(free_port())  # a test may not rely on the port that follows from the job's number
    environs = [srun_step(rank) | {"MASTER_PORT": port} for rank in (0, 1)]
    found = ranks.run(cases.met, world=2, environs=environs, limit_s=60.0)
    assert found[0] == found[1]
    assert (found[0].nodes, found[0].local_ranks, found[0].notes) == ((0, 0), (0, 1), ())
    assert [seat.place.source for seat in found[0].seats] == ["slurm", "slurm"]
    assert [seat.device for seat in found[0].seats] == ["device 0", "device 1"]


@pytest.mark.alone
def test_a_rank_that_does_not_come_is_named_within_the_limit(ranks: RankPool) -> None:
    environ = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environ |= {"MASTER_PORT": str(free_port()), "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    [said] = ranks.run(cases.met, world=1, environs=[environ], limit_s=0.5)
    assert said.startswith("rank 0: waiting for the other rank to join at 127.0.0.1:")
    assert "no answer within 0.5 s from rank 1" in said


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (CommError("nobody came"), "nobody came"),
        (OSError("libcudart.so: no such file"), "OSError: libcudart.so: no such file"),  # of torch
    ],
)
def test_where_ranks_do_not_come_the_facts_are_printed_and_the_process_ends_at_once(
    error: Exception,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def nobody(*_: object, **__: object) -> Topology:
        raise error

    monkeypatch.setattr(doctor, "met", nobody)
    monkeypatch.setattr(doctor_facts, "find_libraries", lambda: (Library("torch", "0", None),))
    monkeypatch.setattr(os, "_exit", sys.exit)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(SystemExit) as ended:
            main(["doctor", "--json"])
        assert ended.value.code == 1
        said = capsys.readouterr()
        assert said.err == f"counterflow: error: {reason}\n"
        if rank == "0":
            assert json.loads(said.out)["topology"] == {"error": reason}
        else:
            assert said.out == ""


def test_a_wrong_limit_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--timeout-s", "0"]) == 2
    said = capsys.readouterr()
    reason = "--timeout-s 0 is no time to wait; give seconds"
    assert (said.out, said.err) == ("", f"counterflow: error: {reason}\n")


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "no MASTER_ADDR, MASTER_PORT; start"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK='2' is not a whole number from 0 to 1"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x' is not a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE='two' is not a whole number"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "mpi4py, which tells which of them share a node"),
        (
            {
                "SLURM_PROCID": "0",
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_NODEID": "0",
                "SLURM_STEP_TASKS_PER_NODE": "junk",
            },
            "SLURM_STEP_TASKS_PER_NODE='junk' is no list of tasks",
        ),
    ],
)
def test_where_the_environment_is_wrong_the_facts_are_printed_with_the_reason(
    told: dict[str, str],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in [name for name in os.environ if name.startswith(_TOLD)]:
        monkeypatch.delenv(name)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(doctor_facts, "find_libraries", lambda: (Library("torch", "0", None),))
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", None)

    def said(*arguments: str) -> tuple[str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["doctor", *arguments])
        assert ended.value.code == 1
        return capsys.readouterr()

    out, err = said("--json")
    report = json.loads(out)
    assert reason in report["topology"]["error"]
    assert report["host"]["cores"] > 0
    assert reason in err
    out, err = said()
    assert "This machine" in out
    assert reason in " ".join(out.split())


def test_the_cards_nearest_to_a_gpu_are_found_by_its_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge = tmp_path / "sys/devices/pci0000:16/0000:16:01.0"
    for device in ("0000:1b:00.0", "0000:1c:00.0"):
        (bridge / device).mkdir(parents=True)
    (tmp_path / "sys/bus/pci/devices").mkdir(parents=True)
    (tmp_path / "sys/bus/pci/devices/0000:1b:00.0").symlink_to(bridge / "0000:1b:00.0")
    card = tmp_path / "sys/class/net/eth0"
    card.mkdir(parents=True)
    (card / "type").write_text("1")
    (card / "device").symlink_to(bridge / "0000:1c:00.0")
    monkeypatch.setattr(doctor_facts, "find_libraries", tuple)
    gpus = GpuFacts((Gpu(0, "H800", "GPU-a", 0, "0000:1b:00.0", 0, 0, ()),))
    facts = find_facts(None, gpus, "none", {}, tmp_path)
    assert facts.nearest == (NearestNics(("eth0",), "switch"),)


def test_ranks_of_a_step_meet_on_its_first_node_at_a_port_of_the_step() -> None:
    place = ProcessPlace(1, 2, 0, 1, 2, "slurm")
    told = srun_step(1) | {"SLURM_STEP_NODELIST": "rack[2-3]n[07,09],x1"}
    meeting = meeting_of_step(place, told)
    assert (meeting.master_addr, meeting.rank, meeting.world_size) == ("rack2n07", 1, 2)
    assert 20000 <= meeting.master_port < 32000
    other = meeting_of_step(place, told | {"SLURM_STEP_ID": "4"})
    assert other.master_port != meeting.master_port
    given = meeting_of_step(place, told | {"MASTER_ADDR": "head", "MASTER_PORT": "9"})
    assert (given.master_addr, given.master_port) == ("head", 9)
    assert meeting_of_step(replace(place, node=1), told) == meeting  # the first node has rank 0
    with pytest.raises(ValueError, match=r"rank 0 is on node 1 of .*export MASTER_ADDR"):
        meeting_of_step(replace(place, rank=0, node=1), told)
    with pytest.raises(ValueError, match="names no host where the ranks could meet"):
        meeting_of_step(place, {})


@pytest.mark.parametrize(
    ("hostlist", "first"),
    [("n1", "n1"), ("n[01-03,7]", "n01"), ("a,b[1-2]", "a"), ("r[1-2]n[3,5]x,q", "r1n3x")],
)
def test_the_first_host_of_a_slurm_list_is_found(hostlist: str, first: str) -> None:
    assert first_host(hostlist) == first


def test_a_library_that_cannot_be_used_says_why_in_a_few_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies = {
        "cf_well": "print('welcome!'); __version__ = '1.2'",
        "cf_broken": "import os; raise ImportError('libnone.so: cannot open shared object file')",
        "cf_crash": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
        "cf_slow": "import time; time.sleep(60)",
        "cf_exit": "import os; os._exit(7)",
        "cf_late": "import atexit; __version__ = '3'; atexit.register(print, 'bye')",
        "cf_torn": "__version__ = '4'; print('no end of line', end='')",
        "cf_silent": "import os; os._exit(0)",
        "cf_quiet": "import os, sys; sys.stdout = open(os.devnull, 'w')",
    }
    for name, body in bodies.items():
        (tmp_path / f"{name}.py").write_text(body + "\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)

    def ask(name: str, limit_s: float = 30.0) -> object:
        code = f"import {name} as m; found = [getattr(m, '__version__', None)]"
        return ask_library(name, code, limit_s=limit_s)

    assert ask("cf_well") == ["1.2"]
    assert ask("cf_broken") == "ImportError: libnone.so: cannot open shared object file"
    assert ask("cf_crash") == "its import is ended by SIGSEGV"
    assert ask("cf_slow", 1.0) == "its import does not end within 1 s"
    assert ask("cf_exit") == "its import ends with exit status 7"
    assert ask("cf_absent") == "not installed"
    assert (ask("cf_late"), ask("cf_torn")) == (["3"], ["4"])
    assert ask("cf_silent") == ask("cf_quiet") == "it does not let Python say what it is"


def test_variables_that_matter_are_shown_and_no_others() -> None:
    shown = variables_that_matter(
        {"NCCL_DEBUG": "INFO", "HOME": "/", "TORCH_NCCL_TRACE": "1", "OMP_NUM_THREADS": "4"}
        | {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    )
    assert shown == {
        "CUDA_DEVICE_MAX_CONNECTIONS": None,
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "GLOO_SOCKET_IFNAME": None,
        "NCCL_DEBUG": "INFO",
        "OMP_NUM_THREADS": "4",
        "TORCH_NCCL_TRACE": "1",
    }
