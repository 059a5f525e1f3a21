"""From facts of nodes to findings, from findings to lines, bad nodes and an exit status."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterflow.comm.topology import NearestNics, Nic, PciPlace
from counterflow.comm.topology.health import GpusHealth, health_by_nvml
from counterflow.launch.life.status import BAD_NODE, DONE, MISTAKE
from counterflow.launch.preflight.command import command_findings
from counterflow.launch.preflight.environment import (
    RULES,
    Circumstances,
    environment_findings,
)
from counterflow.launch.preflight.finding import (
    Finding,
    bad_nodes,
    decided,
    grouped,
    lines,
    load_findings,
    save_findings,
    status_of,
)
from counterflow.launch.preflight.gpu import gpu_findings
from counterflow.launch.preflight.nic import interface_findings, nic_findings
from counterflow.launch.preflight.nodes import BAD_NODES, hostlist, node_name, note_bad_nodes
from counterflow.launch.preflight.versions import (
    clock_findings,
    folder_findings,
    version_findings,
)
from counterflow.launch.slurm.hostlist import parse_hostlist
from tests.fake_nvml import LOST, FakeHealthNvml


def of_gpu(ill: Mapping[str, Any], *, wanted: int | None = 2) -> list[tuple[str, str]]:
    """Verdict and message for a node whose second GPU is `ill`."""
    health = health_by_nvml(FakeHealthNvml([{}, ill]))
    found = gpu_findings(health, wanted=wanted, node="n1")
    assert all((f.check, f.node) == ("gpu", "n1") for f in found)
    return [(f.verdict, f.message) for f in found]


@pytest.mark.parametrize(
    ("ill", "verdict", "message"),
    [
        ({"ecc": (1, 1)}, "bad", "GPU 1 has 1 uncorrected ECC errors since its last reset"),
        ({"ecc": (0, 3)}, "warning", "GPU 1 had 3 uncorrected ECC errors before"),
        ({"rows": (0, 1, 1, 0)}, "bad", "GPU 1 has memory rows that wait"),
        ({"rows": (0, 1, 0, 1)}, "bad", "GPU 1 has a memory row that could not be remapped"),
        ({"pages": [1, 2]}, "warning", "GPU 1 has 2 memory pages retired"),
        ({"pages": list(range(60))}, "bad", "GPU 1 has 60 memory pages retired"),
        ({"pages_pending": 1}, "bad", "GPU 1 has memory pages that wait"),
        ({"slowdowns": 8}, "bad", "GPU 1 is slowed down at 40 °C: hardware slowdown"),
        ({"slowdowns": 128}, "bad", "power brake"),
        ({"slowdowns": 32}, "warning", "software thermal slowdown"),
        ({"celsius": 86}, "warning", "GPU 1 has 86 °C, and is slowed down at 90 °C"),
        ({"slowdowns": 4}, "warning", "GPU 1 is held at 345 of 1980 MHz by its power limit"),
        ({"slowdowns": 2}, "warning", "GPU 1 is held at 345 of 1980 MHz by a setting"),
        ({"slowdowns": 0}, "warning", "GPU 1 runs at 345 of 1980 MHz for no reason"),
        ({"mig": [1, 1]}, "bad", "GPU 1 is divided (MIG)"),
        ({"persistence": 0}, "warning", "GPU 1 has no persistence mode"),
        (
            {"links": {0: (1, {}), 1: (1, {}), 2: (0, {}), 3: (1, {})}},
            "bad",
            "GPU 1 has NVLink 2 down: 3 links active where other GPUs of the node have 4",
        ),
        ({"links": dict.fromkeys(range(3), (1, {}))}, "bad", "GPU 1 has 3 links active"),
        (
            {"links": {i: (1, {1: 1} if i == 3 else {}) for i in range(4)}},
            "warning",
            "GPU 1 NVLink 3 has had errors: recovery 1",
        ),
        ({"processes": [(7, 3 << 30)]}, "bad", "in use by other processes (7), 3.0 GiB"),
        ({"processes": [(7, None)]}, "warning", "in use by other processes (7), 0.5 GiB"),
        ({"handle": LOST}, "bad", "GPU 1 does not answer NVML (device): GPU is lost"),
        ({"name": "Other"}, "warning", "GPUs of several kinds: Fake H800, Other"),
    ],
)
def test_each_ill_of_a_gpu_is_one_finding_that_names_it(
    ill: Mapping[str, Any], verdict: str, message: str
) -> None:
    [(found, said)] = of_gpu(ill)
    assert found == verdict
    assert message in said


def test_gpus_that_are_well_idle_or_of_no_use_have_no_findings() -> None:
    assert of_gpu({}) == []
    few_errors = {i: (1, {0: 3, 2: 999}) for i in range(4)}
    assert of_gpu({"links": few_errors, "clock": 1980, "slowdowns": 0}) == []
    assert of_gpu({"handle": LOST}, wanted=0) == []


def test_missing_gpus_are_bad_and_a_missing_library_is_not() -> None:
    assert of_gpu({}, wanted=8)[0] == ("bad", "2 GPUs where 8 are wanted; see dmesg for Xid")
    no_library = GpusHealth(reason="pynvml is not installed", no_library=True)
    no_driver = GpusHealth(reason="no NVIDIA driver answers: none", no_driver=True)
    broken = GpusHealth(reason="no NVIDIA driver answers: version mismatch")
    told = {
        (wanted, health.reason): [f.verdict for f in gpu_findings(health, wanted=wanted, node="")]
        for wanted in (None, 8)
        for health in (no_library, no_driver, broken)
    }
    assert told == {
        (None, no_library.reason): [],
        (None, no_driver.reason): [],
        (None, broken.reason): ["bad"],
        (8, no_library.reason): ["warning"],
        (8, no_driver.reason): ["bad"],
        (8, broken.reason): ["bad"],
    }


def test_a_card_of_a_gpu_that_is_down_or_slow_is_bad_and_any_other_is_not() -> None:
    place = PciPlace(("pci0000:16", "0000:17:00.0"), 0)
    cards = [Nic(f"mlx5_{i}", "rdma", "active", 400.0, place) for i in range(4)]
    near = [NearestNics((f"mlx5_{i}",), "switch") for i in range(2)]
    assert nic_findings(cards, near, "n1") == []
    down = [cards[0], replace(cards[1], state="down", speed_gbps=None), *cards[2:]]
    [found] = nic_findings(down, near, "n1")
    assert (found.verdict, found.node) == ("bad", "n1")
    assert found.message.startswith("mlx5_1 is down, and GPU 1 has no other port as near")
    slow = [cards[0], replace(cards[1], speed_gbps=200.0), *cards[2:]]
    [found] = nic_findings(slow, near, "n1")
    assert found.message.startswith("mlx5_1 runs at 200 Gbit/s, its siblings at 400")
    other = [*cards[:3], replace(cards[3], speed_gbps=100.0)]
    assert [f.verdict for f in nic_findings(other, near, "n1")] == ["warning"]
    storage = [*cards[:2], replace(cards[2], speed_gbps=200.0)]
    equally_near = [NearestNics(("mlx5_0", "mlx5_1", "mlx5_2"), "numa")]
    [found] = nic_findings(storage, equally_near, "n1")
    assert (found.verdict, "mlx5_2 runs at 200" in found.message) == ("warning", True)
    assert nic_findings(storage, [equally_near[0]._replace(nearness="switch")], "n1") == [
        replace(found, verdict="bad")
    ]
    second_port = [cards[0], replace(cards[1], state="down", speed_gbps=None)]
    assert nic_findings(second_port, [NearestNics(("mlx5_0", "mlx5_1"), "switch")], "n1") == []


def test_gloos_interface_must_be_there() -> None:
    nics = [Nic("eth0", "net", "up", 100.0, None), Nic("ib0", "net", "down", None, None)]
    assert interface_findings(nics, {"GLOO_SOCKET_IFNAME": "eth0,lo"}, "n1") == []
    [found] = interface_findings(nics, {"GLOO_SOCKET_IFNAME": "eth1"}, "n1")
    assert "names eth1, which is not there; there is eth0, ib0" in found.message
    [down] = interface_findings(nics, {"GLOO_SOCKET_IFNAME": "ib0"}, "n1")
    assert "ib0, which is down" in down.message
    for one in (found, down):
        assert status_of(decided([one], ["n1"])) == MISTAKE  # where there is no other node
        assert status_of(decided([one], ["n1", "n2"])) == BAD_NODE
        everywhere = [one, replace(one, node="n2")]
        assert status_of(decided(everywhere, ["n1", "n2"])) == MISTAKE


def test_each_variable_that_hurts_is_told_with_its_remedy() -> None:
    on = Circumstances(ranks=8, cores=96, gpus=True)
    hurting = {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "CUDA_LAUNCH_BLOCKING": "1",
        "NCCL_P2P_DISABLE": "1",
        "NCCL_IB_DISABLE": "1",
        "NCCL_SHM_DISABLE": "1",
        "NCCL_DEBUG": "TRACE",
        "NCCL_NVLS_ENABLE": "0",
        "NCCL_ALGO": "Ring",
        "NCCL_PROTO": "Simple",
        "NCCL_BLOCKING_WAIT": "1",
        "TORCH_NCCL_BLOCKING_WAIT": "1",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
        "TORCH_DISTRIBUTED_DEBUG": "DETAIL",
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "NVIDIA_TF32_OVERRIDE": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":0:0",
        "OMP_NUM_THREADS": "96",
    }
    assert hurting.keys() == {rule.name for rule in RULES}
    found = environment_findings(hurting, on, "n1")
    assert [f.message.partition(":")[0] for f in found if "WORKSPACE" not in f.message] == [
        f"{rule.name}={hurting[rule.name]}" for rule in RULES if "WORKSPACE" not in rule.name
    ]
    harmless = {
        "CUDA_DEVICE_MAX_CONNECTIONS": "8",
        "NCCL_DEBUG": "WARN",
        "NCCL_P2P_DISABLE": "0",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
        "OMP_NUM_THREADS": "12",
    }
    assert environment_findings(harmless, on, "n1") == []
    on_cpus = replace(on, gpus=False)
    assert len(environment_findings(hurting, on_cpus, "n1")) == 1
    [unset] = environment_findings({}, on_cpus, "n1")
    assert unset.message.startswith("OMP_NUM_THREADS is not set: ")
    assert environment_findings({}, replace(on_cpus, ranks=1), "n1") == []


def test_the_same_finding_on_a_thousand_nodes_is_one_line() -> None:
    same = [Finding("gpu", "warning", "is warm", f"node{i:04}") for i in range(1000)]
    odd = Finding("nic", "bad", "is down", "node0007")
    fine = Finding("disk", "ok", "nothing wrong", "node0001")
    assert lines([*same, odd, fine]) == [
        "bad: nic: node0007: is down",
        "warning: gpu: node[0000-0999]: is warm",
    ]
    all_different = [Finding("gpu", "bad", f"pid {i}", f"n{i}") for i in range(1000)]
    told = lines(all_different)
    assert len(told) == 21
    assert told[-1].startswith("980 more findings on n[20-99],n[100-999]")
    assert len(grouped(all_different)) == 1000


@settings(deadline=None)
@given(st.sets(st.from_regex(r"[a-z]{1,3}[0-9]{0,3}", fullmatch=True), max_size=30))
def test_a_hostlist_is_what_slurms_parser_reads_back(names: set[str]) -> None:
    assert not names or set(parse_hostlist(hostlist(names))) == names
    assert len(hostlist(names).split(",")) <= len(",".join(names).split(",")) or not names


def test_the_exit_status_tells_a_bad_node_from_a_mistake() -> None:
    warning, bad = Finding("gpu", "warning", "a", "n1"), Finding("gpu", "bad", "b", "n1")
    mistake = Finding("memory", "bad", "c")
    assert status_of([]) == status_of([warning]) == DONE
    assert status_of([warning, bad]) == BAD_NODE
    assert status_of([bad, mistake]) == MISTAKE
    assert bad_nodes([warning, bad, mistake, replace(bad, message="d")]) == ("n1",)


NODES = ["a", "b", "c", "d"]


def in_use(*nodes: str) -> list[Finding]:
    """The same fault on each, with other numbers."""
    ill = {node: {"processes": [(77 + i, (3 + i) << 30)]} for i, node in enumerate(nodes)}
    found: list[Finding] = []
    for node in nodes:
        health = health_by_nvml(FakeHealthNvml([{}, ill[node]]))
        found += gpu_findings(health, wanted=2, node=node)
    return found


@pytest.mark.parametrize(
    ("ill", "status"),
    [("a", BAD_NODE), ("bc", BAD_NODE), ("bcd", MISTAKE), ("abcd", MISTAKE)],
)
def test_what_most_nodes_have_is_no_nodes_fault_whatever_its_numbers(ill: str, status: int) -> None:
    hot = Finding("gpu", "warning", "is warm", "a", kind="heat")
    found = decided([hot, *in_use(*ill)], NODES)
    assert status_of(found) == status
    assert bad_nodes(found) == (tuple(ill) if status == BAD_NODE else ())
    assert hot in found
    if status == MISTAKE:
        [told] = [f for f in found if f.verdict == "bad"]
        assert told.message.startswith(f"on {len(ill)} of 4 nodes, which is no single node's fault")
        assert f"in use by other processes (77), 3.0 GiB; end them (so on {ill[0]})" in told.message


def test_two_nodes_that_are_bad_in_their_own_ways_are_both_named() -> None:
    lost = Finding("nic", "bad", "mlx5_1 is down", "d", kind="down")
    found = decided([*in_use("b"), lost], NODES)
    assert (status_of(found), bad_nodes(found)) == (BAD_NODE, ("b", "d"))


def test_of_a_jobs_only_node_the_nodes_own_faults_are_still_the_nodes() -> None:
    assert status_of(decided(in_use("a"), ["a", "a"])) == BAD_NODE
    few = gpu_findings(health_by_nvml(FakeHealthNvml([{}, {}]), "0"), wanted=2, node="a")
    assert "CUDA_VISIBLE_DEVICES names 1" in few[0].message
    assert status_of(decided(few, ["a"])) == MISTAKE  # the job asked for one
    lost = gpu_findings(health_by_nvml(FakeHealthNvml([{}]), "0,1"), wanted=2, node="a")
    assert status_of(decided(lost, ["a"])) == BAD_NODE


def test_the_same_mistake_that_each_node_found_is_told_once(tmp_path: Path) -> None:
    found = [Finding("disk", "bad", f"has {free} bytes free", kind="room") for free in (1, 2)]
    save_findings(tmp_path / "found", found)
    assert load_findings(tmp_path / "found") == found
    assert decided(found, NODES) == found[:1]


def test_bad_nodes_are_noted_once_each_by_many_at_a_time(tmp_path: Path) -> None:
    file = tmp_path / "bad nodes"
    environ = {BAD_NODES: str(file)}
    with ThreadPool(8) as pool:
        pool.map(lambda i: note_bad_nodes([f"n{i % 5}", "shared"], environ), range(20))
    told = file.read_text().splitlines()
    assert set(told) == {"shared", *(f"n{i}" for i in range(5))}
    before = file.read_text()
    for name in ("a b", "--exclusive", "x\ny", "", "$(id)"):
        with pytest.raises(ValueError, match="no name of a node"):
            note_bad_nodes(["good", name], environ)
    assert file.read_text() == before
    assert note_bad_nodes(["n9"], {}) == []
    assert node_name({"SLURMD_NODENAME": "n7"}) == "n7"
    assert node_name({}) == os.uname().nodename


def test_a_sites_own_check_makes_a_node_bad_by_its_exit_status(tmp_path: Path) -> None:
    script = tmp_path / "a check; $(touch ran)"
    script.write_text("import sys; print('fine\\n\\x1b[31mXid 79 on GPU 3  \\n'); sys.exit(4)\n")

    def found(code: str, timeout_s: float = 30.0) -> list[Finding]:
        return command_findings(code, timeout_s=timeout_s, node="n1")

    assert found("") == found("true") == []
    [one] = found(f"{sys.executable} '{script}'")
    said = f"{sys.executable} ends with exit status 4: [31mXid 79 on GPU 3"
    assert one == Finding("command", "bad", said, "n1", kind="refuses")
    assert not (tmp_path / "ran").exists()
    assert found("sh -c 'kill -9 $$'")[0].message == "sh is ended by signal 9"
    began = time.monotonic()
    [late] = found("sh -c 'sleep 60 & wait'", 0.3)
    assert (late.message, late.node) == ("sh does not end within 0.3 s", "n1")
    assert time.monotonic() - began < 20
    [missing] = found("/no/such/program --now")
    assert status_of(decided([missing], ["n1"])) == MISTAKE
    assert "/no/such/program: No such file or directory" in missing.message


def test_versions_of_a_minority_are_named() -> None:
    usual = {"torch": "2.13", "driver": "570"}
    odd = {"torch": "2.12", "driver": "565"}
    found = version_findings([usual, usual, odd, odd, usual, usual], list("aabbcc"))
    assert [(f.verdict, f.node) for f in found] == [("bad", "b"), ("warning", "b")]
    assert found[0].message.startswith("torch is 2.12, on most ranks 2.13")
    assert version_findings([usual, usual], ["a", "b"]) == []
    assert version_findings([usual, odd], ["a", "b"])[0].node == "b"  # rank 0's count where equal


def test_a_clock_a_second_off_is_told() -> None:
    assert clock_findings([100.0, 100.9, 100.1], list("abc")) == []
    [found] = clock_findings([100.0, 100.0, 160.0, 160.0, 100.0], list("aabbc"))
    assert (found.verdict, found.node) == ("warning", "b")
    assert found.message.startswith("the clock is 60 s ahead of the others'")


def test_a_folder_that_one_node_lacks_is_the_nodes_fault_and_one_that_most_lack_the_jobs() -> None:
    nodes = list("aabbccdd")
    assert folder_findings([True] * 8, nodes, "runs") == []
    [found] = folder_findings([True] * 6 + [False] * 2, nodes, "runs")
    assert (found.verdict, found.node) == ("bad", "d")
    [found] = folder_findings([True] * 2 + [False] * 6, nodes, "runs")
    assert (found.verdict, found.node) == ("bad", "")
    assert "3 of 3 other nodes do not see" in found.message
