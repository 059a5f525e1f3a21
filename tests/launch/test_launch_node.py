"""`counterflow node`: where a node is among the others, how they meet, and the order verified."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from counterflow.comm.topology import Machine
from counterflow.launch.config import Config, load
from counterflow.launch.settings import ConfigError
from counterflow.launch.slurm import address, node
from counterflow.launch.slurm.order import digest
from counterflow.launch.slurm.placement import ORDER, Told, placement_lines, require_order, told_by
from counterflow.launch.slurm.roll_call import (
    Meeting,
    NotThereError,
    Present,
    await_meeting,
    await_nodes,
    await_statuses,
    call_meeting,
    find_folder,
    leave_status,
    require_one_order,
    say_present,
    token_of,
)
from counterflow.launch.slurm.site import NodeConfig, Site, find_site
from counterflow.launch.slurm.started import place_variables
from counterflow.parallel.mesh import MeshShape

pytestmark = pytest.mark.alone

STUB = Path(__file__).with_name("stub")
NAMES = ("n1", "n2", "n10")


def step(node: str = "n2", **changes: str) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[1,10,2]",
        "SLURMD_NODENAME": node,
        "SLURM_STEP_NUM_TASKS": "3",
        "SLURM_STEP_ID": "0",
        **changes,
    }


def config_of(ranks: int, ep: int = 1) -> Config:
    return load(None, [("mesh.pp", "1"), ("mesh.dp", str(ranks)), ("mesh.ep", str(ep))])


def test_a_node_finds_its_place_in_the_order_of_the_network(tmp_path: Path) -> None:
    told = NodeConfig(folder=str(tmp_path), ranks_per_node=2)
    site = find_site(told, config_of(6), step())
    assert (site.order, site.node_rank, site.head) == (NAMES, 1, "n1")
    text = "SwitchName=s1 Nodes=n[1,10]\nSwitchName=s2 Nodes=n2\nSwitchName=t Nodes=n[1,2,10]\n"
    (tmp_path / "topology").write_text(text)
    assert find_site(told, config_of(6), step()).order == ("n1", "n10", "n2")


def test_in_a_script_of_ones_own_folder_and_ranks_follow_from_run_and_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    site = find_site(NodeConfig(), config_of(6), step(SLURM_RESTART_COUNT="1"))
    assert site.folder == Path("runs/small/slurm/7/step-0-start-1").absolute()
    assert site.per_node == 2


@pytest.mark.parametrize(
    ("environ", "ranks", "what"),
    [
        (step("other"), 6, "SLURMD_NODENAME='other' is none of the job's nodes"),
        (step(SLURM_STEP_NUM_TASKS="6"), 6, "is started once a node"),
        (step(SLURM_JOB_NODELIST="n[1-"), 6, "SLURM_JOB_NODELIST 'n"),
        (step(), 4, "3 nodes with 1 ranks each, but mesh pp=1 x dp=4 needs 4"),
        (step(SLURM_JOB_ID="7/../.."), 6, "are not all numbers"),
        ({}, 6, "has no SLURM_JOB_NODELIST"),
    ],
)
def test_an_environment_that_does_not_fit_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environ: Mapping[str, str],
    ranks: int,
    what: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=what):
        find_site(NodeConfig(), config_of(ranks), environ)


def test_a_mistake_that_all_nodes_find_is_told_by_the_first_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "counterflow", "node", "--", "train", "--train.stepz", "1"]
    environ = {**os.environ, **step("n1", SLURM_PROCID="0")}
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("counterflow: error: node n1: --train.stepz: unknown key")
    assert done.stderr.count("\n") == 1


def test_a_mistake_is_on_file_before_slurm_can_end_the_node(tmp_path: Path) -> None:
    (tmp_path / "start").mkdir()
    options = ["--folder=start", "--", "train", "--train.stepz", "1"]
    command = [sys.executable, "-m", "counterflow", "node", *options]
    environ = {**os.environ, **step("n2", SLURM_PROCID="1")}
    with subprocess.Popen(command, env=environ, cwd=tmp_path, stderr=subprocess.PIPE) as process:
        status = tmp_path / "start" / "status" / "n2"
        end = time.monotonic() + 60
        while not status.exists() and time.monotonic() < end and process.poll() is None:
            time.sleep(0.02)
        still_quiet = process.poll() is None
        process.kill()
    assert status.read_text() == "2\n"
    assert still_quiet


def test_a_group_that_fills_its_last_node_in_part_counts_as_its_nodes(tmp_path: Path) -> None:
    text = "SwitchName=s1 Nodes=n[1,10]\nSwitchName=s2 Nodes=n2\nSwitchName=t Nodes=n[1,2,10]\n"
    (tmp_path / "topology").write_text(text)
    config = load(None, [("mesh.pp", "1"), ("mesh.dp", "12"), ("mesh.ep", "6")])
    told = NodeConfig(folder=str(tmp_path), ranks_per_node=4)
    assert find_site(told, config, step()).order == ("n1", "n10", "n2")


def test_a_persons_own_interface_variable_counts(tmp_path: Path) -> None:
    environ = {"NCCL_SOCKET_IFNAME": "=ib1"}
    site = Site(tmp_path, "n1", NAMES, 2, (), "now")
    set_environment = node._set_environment  # pyright: ignore[reportPrivateUsage]
    set_environment(site, Meeting("now", "127.0.0.1"), "ib0", environ)
    assert environ["NCCL_SOCKET_IFNAME"] == "=ib1"
    assert environ["GLOO_SOCKET_IFNAME"] == "ib0"


def test_a_port_that_was_lost_after_it_was_chosen_is_no_mistake(tmp_path: Path) -> None:
    site = Site(tmp_path, "n1", NAMES, 2, (), "now")
    lost_port = node._lost_port  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(address.PortTakenError), lost_port(site, config_of(6)):
        raise ConfigError("run.port=20001 cannot be used: Address already in use")
    given = load(None, [("run.port", "20001")])
    with pytest.raises(ConfigError) as caught, lost_port(site, given):
        raise ConfigError("run.port=20001 cannot be used: Address already in use")
    assert not isinstance(caught.value, address.PortTakenError)


def test_all_nodes_learn_where_they_meet_from_the_head(tmp_path: Path) -> None:
    def meet(name: str) -> Meeting:
        say_present(tmp_path, name, Present("host", "boot", "order", "now"))
        if name == "n1":
            found = await_nodes(tmp_path, NAMES, "now", timeout_s=10)
            require_one_order(found)
            assert found["n2"].machine == Machine("host", "boot")
            call_meeting(tmp_path, Meeting("now", "10.0.0.1", 20001))
        return await_meeting(tmp_path, "n1", "now", timeout_s=10)

    with ThreadPoolExecutor() as pool:
        assert set(pool.map(meet, reversed(NAMES))) == {Meeting("now", "10.0.0.1", 20001)}


def test_what_an_earlier_start_left_in_the_folder_is_passed_over(tmp_path: Path) -> None:
    call_meeting(tmp_path, Meeting("before", "10.0.0.9"))
    say_present(tmp_path, "n1", Present("host", "boot", "order", "before"))
    with pytest.raises(NotThereError):
        await_meeting(tmp_path, "n1", "now", timeout_s=0.1)
    with pytest.raises(NotThereError, match="n1: not there"):
        await_nodes(tmp_path, ["n1"], "now", timeout_s=0.1)
    starts = [step(), step(SLURM_RESTART_COUNT="1"), step(SLURM_SRUN_COMM_PORT="4711")]
    assert len({token_of(environ) for environ in starts}) == 3
    assert token_of(step("n1")) == token_of(step("n10"))


def test_a_node_that_does_not_see_the_jobs_folder_makes_none_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "not mounted" / "slurm" / "7"
    with pytest.raises(NotThereError, match="this node does not see the run's folder"):
        find_folder(folder, make=False, timeout_s=0.1)
    with pytest.raises(FileNotFoundError):
        say_present(folder, "n1", Present("host", "boot", "order", "now"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("missing", "status", "named"), [(["n2"], 76, "n2\n"), (["n2", "n10"], 1, "")]
)
def test_a_few_missing_nodes_are_done_without_and_many_are_no_fault_of_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: list[str], status: int, named: str
) -> None:
    bad = tmp_path / "bad"
    bad.write_text("")
    monkeypatch.setenv("COUNTERFLOW_BAD_NODES", str(bad))
    site = Site(tmp_path, "n1", NAMES, 2, (), "now")
    error = NotThereError(missing, "not there")
    assert node._name_missing(site, error) == status  # pyright: ignore[reportPrivateUsage]
    assert bad.read_text() == named


def test_nodes_that_do_not_come_are_named_by_the_head_and_no_wait_is_for_ever(
    tmp_path: Path,
) -> None:
    say_present(tmp_path, "n2", Present("host", "boot", "order", "now"))
    with pytest.raises(NotThereError, match=r"^n1, n10: not there within 0.2 s, 1 of 3 nodes are"):
        await_nodes(tmp_path, NAMES, "now", timeout_s=0.2)
    with pytest.raises(NotThereError, match=r"node n1, the head, has told nothing within 0.2 s"):
        await_meeting(tmp_path, "n1", "now", timeout_s=0.2)
    leave_status(tmp_path, "n1", 75)
    await_statuses(tmp_path, 2, "now", is_head=True, timeout_s=0.2)
    await_statuses(tmp_path, 2, "now", is_head=False, timeout_s=0.2)
    assert (tmp_path / "status" / "n1").read_text() == "75\n"


def test_a_node_with_another_order_is_named() -> None:
    same, other = Present("h", "b", "1", "now"), Present("h", "b", "2", "now")
    with pytest.raises(ConfigError, match=r"^n2: another order of the nodes than on the rest"):
        require_one_order({"n1": same, "n2": other, "n3": same})


def test_the_heads_address_is_one_that_others_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"n1": ["127.0.1.1"], "good": ["10.0.0.5", "fd00::5"], "n2": ["10.0.0.2"]}
    monkeypatch.setattr(address, "addresses_of", lambda name: known.get(name, []))
    monkeypatch.setattr(address, "source_address", {"10.0.0.2": "10.0.0.9"}.get)
    head = address.head_address
    assert head(["good"], ["n2"], interface="", one_machine=False) == "10.0.0.5"
    assert head(["n1", "good"], ["n2"], interface="", one_machine=False) == "10.0.0.5"
    assert head(["n1"], ["n2"], interface="", one_machine=False) == "10.0.0.9"
    assert head(["nowhere"], ["n3"], interface="", one_machine=True) == "127.0.0.1"
    assert head(["good"], [], interface="lo", one_machine=False) == "127.0.0.1"
    with pytest.raises(ConfigError, match=r"n1 resolves to 127.0.1.1, the node itself.*interface"):
        head(["n1"], ["n3"], interface="", one_machine=False)
    with pytest.raises(ConfigError, match="n9 does not resolve"):
        head(["n9"], ["n3"], interface="", one_machine=False)
    with pytest.raises(ConfigError, match="--interface ib77: no IPv4 address"):
        head(["good"], [], interface="ib77", one_machine=False)


def test_neighbouring_jobs_and_starts_want_different_ports() -> None:
    starts = [
        {"SLURM_JOB_ID": str(job), "SLURM_RESTART_COUNT": str(count)}
        for job in range(1000, 1200)
        for count in range(5)
    ]
    ports = [address.derived_port(environ) for environ in starts]
    assert len(set(ports)) == len(ports)
    assert all(20000 <= port < 32000 for port in ports)


def test_a_port_in_use_is_passed_over_unless_it_was_asked_for() -> None:
    with socket.socket() as taken:
        port = next(p for p in range(20000, 32000) if _bound(taken, p))
        taken.listen(1)
        other = address.open_port(0, port)
        assert other != port
        assert address.open_port(0, port, besides=other) not in (port, other)
        with pytest.raises(ConfigError, match=rf"run.port={port} is in use on the job's head"):
            address.open_port(port, port)
    assert address.open_port(port, 20000) == port


def _bound(probe: socket.socket, port: int) -> bool:
    try:
        probe.bind(("", port))
    except OSError:
        return False
    return True


def told(rank: int, nodes: tuple[str, ...] = NAMES, node: str | None = None) -> Told:
    expected = nodes[rank // 2]
    return Told(rank, node or expected, expected, digest(nodes), "order.json")


def test_ranks_that_are_where_the_order_says_pass() -> None:
    require_order([told(rank) for rank in range(6)])
    require_order([None] * 4)


@pytest.mark.parametrize(
    ("rank", "odd", "what"),
    [
        (3, told(3, node="n10"), "rank 3 is on node n10, but the order .* has it on n2"),
        (4, told(4, ("n2", "n1", "n10")), "rank 4 on node n10 has another order"),
        (0, None, "rank 0 was not started by `counterflow node`"),
        (5, "no file", "rank 5: no file"),
    ],
)
def test_a_rank_elsewhere_or_with_another_order_is_named(
    rank: int, odd: Told | str | None, what: str
) -> None:
    ranks: list[Told | str | None] = [told(r) for r in range(6)]
    ranks[rank] = odd
    with pytest.raises(ConfigError, match=what):
        require_order(ranks)


def test_a_rank_tells_its_node_and_what_the_order_says(tmp_path: Path) -> None:
    path = tmp_path / "order.json"
    order = [{"node": node, "switch": "s"} for node in NAMES]
    path.write_text(json.dumps({"per_node": 2, "order": order}))
    environ = {ORDER: str(path), "RANK": "3", "SLURMD_NODENAME": "n2"}
    assert told_by(environ) == replace(told(3), path=str(path))
    first = told_by({**environ, "RANK": "0", "SLURMD_NODENAME": "n1"})
    assert isinstance(first, Told)
    assert (first.nodes, first.switches) == (NAMES, ("s", "s", "s"))
    assert len(pickle.dumps(first)) < 400  # as many as ranks come together, on every one of them
    assert told_by({}) is None
    assert "cannot be used" in str(told_by({**environ, "RANK": "9"}))
    assert "No such file" in str(told_by({**environ, ORDER: str(tmp_path / "x")}))


def test_the_placement_counts_groups_within_nodes_and_under_switches() -> None:
    lines = placement_lines(MeshShape(1, 8, 4), ("a1", "a2", "b1", "b2"), ("s1", "s1", "s2", "s3"))
    assert lines == [
        "node  host  switch  ranks  expert groups",
        "0     a1    s1      0-1    0",
        "1     a2    s1      2-3    0",
        "2     b1    s2      4-5    1",
        "3     b2    s3      6-7    1",
        "expert groups of 4 ranks: 0 of 2 within one node, 1 under one switch",
    ]
    inside = placement_lines(MeshShape(2, 4, 2), ("a", "b"), ("", ""))
    assert inside[1:] == [
        "0     a     -       0-3    0-1",
        "1     b     -       4-7    2-3",
        "expert groups of 2 ranks: 4 of 4 within one node",
    ]


def srun(rank: int, **changes: str) -> dict[str, str]:
    return {
        "SLURM_PROCID": str(rank),
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_NODEID": str(rank % 2),
        "SLURM_LOCALID": str(rank // 2),
        "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
        "SLURM_STEP_NODELIST": "localhost,b",
        "SLURM_JOB_ID": "3",
        "SLURM_STEP_ID": "1",
        **changes,
    }


def test_a_rank_of_srun_gets_torchruns_variables() -> None:
    found = place_variables(srun(2))
    assert found == {
        "RANK": "2",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "20056",
    }
    alone = srun(2, SLURM_STEP_TASKS_PER_NODE="4", SLURM_NODEID="0", SLURM_STEP_NODELIST="x")
    assert place_variables(alone)["MASTER_ADDR"] == "127.0.0.1"


def test_a_batch_script_or_a_lone_process_is_no_rank() -> None:
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "3", "SLURM_NODEID": "0"}
    assert place_variables(batch) == {}
    assert place_variables({}) == {}
    assert place_variables({"RANK": "0", "WORLD_SIZE": "2"}) == {}
    assert place_variables(srun(0, SLURM_STEP_NUM_TASKS="1", SLURM_STEP_TASKS_PER_NODE="1")) == {}


def test_a_host_that_does_not_resolve_is_told_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"rank 0: the host no-such-host.invalid, where.*resolve"):
        place_variables(srun(0, SLURM_STEP_NODELIST="no-such-host.invalid,b"))


_MPIRUN = Path(sys.executable).with_name("mpirun")


@pytest.mark.skipif(not _MPIRUN.exists() and not shutil.which("mpirun"), reason="no mpirun")
def test_mpirun_starts_ranks_directly(tmp_path: Path) -> None:
    pytest.importorskip("mpi4py")
    mpirun = str(_MPIRUN) if _MPIRUN.exists() else "mpirun"
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "PMI", "OMPI"))}
    environ |= {"STUB": "return", "PYTHONPATH": str(STUB), "OMP_NUM_THREADS": "1"}
    sizes = ["--run.device", "cpu", "--mesh.dp", "1", "--mesh.ep", "1"]
    done = subprocess.run(
        [mpirun, "-n", "2", sys.executable, "-m", "counterflow", "train", *sizes],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    ranks = [(tmp_path / "runs" / "small" / f"rank{rank}").read_text() for rank in range(2)]
    assert len({text.split()[0] for text in ranks}) == 2  # two processes, none started by torchrun


def test_a_site_has_its_nodes_in_order() -> None:
    site = Site(Path("f"), "n10", NAMES, 2, (), "now")
    assert (site.node_rank, site.head) == (2, "n1")
