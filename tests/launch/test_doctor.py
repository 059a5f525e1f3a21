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
    Machine,
    NearestNics,
    Nic,
    PciPlace,
    ProcessPlace,
    Seat,
    Topology,
)
from counterflow.launch import doctor
from counterflow.launch.cli import main
from counterflow.launch.doctor_facts import (
    Facts,
    Host,
    Library,
    ask_library,
    variables_that_matter,
)
from counterflow.launch.doctor_print import as_json, print_facts, sections
from counterflow.launch.doctor_ranks import first_host, meeting_of_step
from counterflow.launch.torchrun import free_port
from tests import cases_topology as cases
from tests.ranks import RankPool

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
    port = str(free_port(0))
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
    port = str(free_port(0))  # a test may not rely on the port that follows from the job's number
    environs = [srun_step(rank) | {"MASTER_PORT": port} for rank in (0, 1)]
    found = ranks.run(cases.met, world=2, environs=environs, limit_s=60.0)
    assert found[0] == found[1]
    assert (found[0].nodes, found[0].local_ranks, found[0].notes) == ((0, 0), (0, 1), ())
    assert [seat.place.source for seat in found[0].seats] == ["slurm", "slurm"]
    assert [seat.device for seat in found[0].seats] == ["device 0", "device 1"]


def test_a_rank_that_does_not_come_is_named_within_the_limit(ranks: RankPool) -> None:
    environ = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environ |= {"MASTER_PORT": str(free_port(0)), "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    [said] = ranks.run(cases.met, world=1, environs=[environ], limit_s=0.5)
    assert said.startswith("rank 0: waiting for the other rank to join at 127.0.0.1:")
    assert "no answer within 0.5 s from rank 1" in said


def test_where_ranks_do_not_come_the_facts_are_printed_and_the_process_ends_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nobody(*_: object, **__: object) -> Topology:
        raise CommError("nobody came")

    def facts(place: object, gpus: object, topology: Topology | str, environ: object) -> Facts:
        return replace(made_up_facts(), topology=topology)

    monkeypatch.setattr(doctor, "topology_of_ranks", nobody)
    monkeypatch.setattr(doctor, "find_facts", facts)
    monkeypatch.setattr(os, "_exit", sys.exit)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(SystemExit) as ended:
            main(["doctor", "--json"])
        assert ended.value.code == 1
        said = capsys.readouterr()
        assert said.err == "counterflow: error: nobody came\n"
        if rank == "0":
            assert json.loads(said.out)["topology"] == {"error": "nobody came"}
        else:
            assert said.out == ""


def test_a_wrong_environment_or_limit_is_one_line() -> None:
    wrong = [
        start([sys.executable, *DOCTOR], {"RANK": "2", "WORLD_SIZE": "2"}),
        start([sys.executable, *DOCTOR, "--timeout-s", "0"]),
    ]
    said = ["the environment's RANK='2' is not", "--timeout-s 0 is no time to wait; give seconds"]
    for (status, out, err), reason in zip(ends(wrong), said, strict=True):
        assert (status, out) == (2, "")
        assert err.startswith(f"counterflow: error: {reason}")
        assert err.count("\n") == 1


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
    }
    for name, body in bodies.items():
        (tmp_path / f"{name}.py").write_text(body + "\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)

    def ask(name: str, limit_s: float = 30.0) -> object:
        code = f"import json, {name} as m; print(json.dumps([m.__version__]))"
        return ask_library(name, code, limit_s=limit_s)

    assert ask("cf_well") == ["1.2"]
    assert ask("cf_broken") == "ImportError: libnone.so: cannot open shared object file"
    assert ask("cf_crash") == "its import is ended by SIGSEGV"
    assert ask("cf_slow", 1.0) == "its import does not end within 1 s"
    assert ask("cf_exit") == "its import ends with exit status 7"
    assert ask("cf_absent") == "not installed"


def test_variables_that_matter_are_shown_and_no_others() -> None:
    shown = variables_that_matter(
        {"NCCL_DEBUG": "INFO", "HOME": "/", "TORCH_NCCL_TRACE": "1", "OMP_NUM_THREADS": "4"}
    )
    assert shown == {
        "CUDA_DEVICE_MAX_CONNECTIONS": None,
        "GLOO_SOCKET_IFNAME": None,
        "NCCL_DEBUG": "INFO",
        "OMP_NUM_THREADS": "4",
        "TORCH_NCCL_TRACE": "1",
    }


def made_up_facts() -> Facts:
    """A node of a cluster, invented: two GPUs, of which one has lost a link."""
    peers = (("switch 0000:04:00.0", 18),)
    gpu = Gpu(0, "H800", "GPU-a", 80 * 2**30, "0000:1b:00.0", 18, 18, peers)
    ill = replace(gpu, index=1, pci="0000:43:00.0", nvlinks_active=17, problems=("NVLink 3: lost",))
    nic = Nic("mlx5_0", "rdma", "active", 400.0, PciPlace(("pci0000:16", "0000:17:00.0"), 0))
    place = ProcessPlace(0, 2, 0, 0, None, "slurm")
    seats = [Seat(replace(place, rank=r), Machine("node1"), f"GPU {r}: H800") for r in (0, 1)]
    return Facts(
        host=Host("node1", "a processor", 96, 2015.5),
        python="3.11.7",
        place=place,
        gpus=GpuFacts((gpu, ill), "570.86.15", "12.8"),
        nics=(nic, Nic("veth0", "net", "down", None, None)),
        nearest=(NearestNics(("mlx5_0",), "switch"), NearestNics(("mlx5_0",), "far")),
        libraries=(Library("torch", "2.13.0", None), Library("deep_ep", None, "not installed")),
        environment={"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": None},
        topology=replace(Topology.of(seats), notes=("something is odd",)),
    )


def test_tables_show_links_cards_libraries_and_ranks() -> None:
    tables = {section.title: list(section.rows) for section in sections(made_up_facts())}
    gpus = tables["GPUs: driver 570.86.15, for CUDA up to 12.8"]
    assert gpus[0][4:] == (
        "18 of 18 active",
        "switch 0000:04:00.0 x18",
        "mlx5_0 (same PCI switch)",
    )
    assert gpus[1][4] == "17 of 18 active"
    assert gpus[1][6] == "mlx5_0 (other NUMA node)"
    assert gpus[2][1] == "NVLink 3: lost"
    assert tables["Network"] == [
        ("mlx5_0", "rdma", "active", "400", "0000:17:00.0", "0"),
        ("veth0", "net", "down", "-", "-", "-"),
    ]
    machine = {what: text for what, text in tables["This machine"]}  # noqa: C416
    assert (machine["torch"], machine["deep_ep"]) == ("2.13.0", "not installed")
    assert machine["place"] == "rank 0 of 2, node 0, in-node index 0 of ?, by slurm"
    assert tables["Environment"] == [("NCCL_DEBUG", "INFO"), ("OMP_NUM_THREADS", "not set")]
    assert tables["Ranks: 2 ranks on 1 node"][1] == ("1", "0", "1", "node1", "GPU 1: H800")
    for section in sections(made_up_facts()):
        assert all(len(row) == len(section.head) for row in section.rows)


@pytest.mark.parametrize("rich", [True, False])
def test_tables_are_printed_with_rich_and_without(
    rich: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    print_facts(made_up_facts())
    out = capsys.readouterr().out
    for section in sections(made_up_facts()):
        assert section.title in out
        assert all(text in out for row in [section.head, *section.rows] for text in row)
        assert all(f"note: {note}" in out for note in section.notes)


def test_in_a_narrow_terminal_texts_are_broken_and_not_cut(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    long = replace(made_up_facts(), environment={"NCCL_DEBUG": "x" * 80})
    print_facts(long)
    out = capsys.readouterr().out
    assert out.count("x") >= 80
    assert "\u2026" not in out
    assert max(map(len, out.splitlines())) <= 30


def test_json_has_links_cards_and_why_a_topology_is_missing() -> None:
    report = json.loads(json.dumps(as_json(made_up_facts())))
    assert set(report) >= KEYS
    first, second = report["gpus"]
    assert first["nvlink_peers"] == {"switch 0000:04:00.0": 18}
    assert (first["nearest_nics"], first["nearness"]) == (["mlx5_0"], "switch")
    assert second["problems"] == ["NVLink 3: lost"]
    assert report["driver"] == {"version": "570.86.15", "cuda": "12.8", "reason": None}
    assert report["nics"][0]["speed_gbps"] == 400
    missing = replace(
        made_up_facts(), topology="no answer", gpus=GpuFacts(reason="none"), nearest=()
    )
    assert as_json(missing)["topology"] == {"error": "no answer"}
    titles = [section.title for section in sections(missing)]
    assert {"GPUs: none", "Ranks: no answer"} <= set(titles)
