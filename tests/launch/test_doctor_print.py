"""What `counterflow doctor` prints of the facts, as tables and as JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

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
from counterflow.launch.doctor_facts import Facts, Host, Library
from counterflow.launch.doctor_print import as_json, print_facts, sections

KEYS = {"host", "python", "torch", "place", "gpus", "nics", "libraries", "environment", "topology"}


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
    if rich:
        assert not [line for line in out.splitlines() if line != line.rstrip()]


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
