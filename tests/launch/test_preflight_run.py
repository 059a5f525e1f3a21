"""Preflight on one machine, a node's part in a job's, and what `counterflow doctor` adds."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from counterflow.launch import doctor
from counterflow.launch.config import Config, RunConfig
from counterflow.launch.doctor_look import node_names
from counterflow.launch.doctor_options import DoctorOptions, add_arguments
from counterflow.launch.life.status import BAD_NODE, DONE, FAILED, MISTAKE
from counterflow.launch.preflight import run as preflight_run
from counterflow.launch.preflight.finding import Finding, load_findings
from counterflow.launch.preflight.nodes import BAD_NODES
from counterflow.launch.preflight.run import before_training, preflight
from counterflow.launch.preflight.section import PreflightConfig
from tests.cases_preflight import topology_of

ON_CPUS = {"SLURMD_NODENAME": "n7"}


def a_run(folder: Path, **section: object) -> Config:
    made = PreflightConfig(**section)  # pyright: ignore[reportArgumentType]
    config = Config(run=RunConfig(folder=str(folder)), preflight=made)
    config.run.path.mkdir(exist_ok=True)  # as the launcher does
    return config


def begun(config: Config, folder: Path, **given: object) -> int:
    environ = ON_CPUS | {BAD_NODES: str(folder / "bad")}
    arguments = {"nproc": 2, "gpus_wanted": 0, "environ": environ} | given
    return before_training(config, folder / "config.toml", **arguments)  # pyright: ignore


def test_a_machine_that_is_well_passes_with_one_finding_a_check(tmp_path: Path) -> None:
    found = preflight(a_run(tmp_path), nproc=2, gpus_wanted=0, environ=ON_CPUS)
    checks = [(f.check, f.verdict) for f in found]
    assert checks == [(c, "ok") for c in ("gpu", "nic", "environment", "memory", "disk")]
    assert begun(a_run(tmp_path), tmp_path) == DONE


def test_a_node_that_a_sites_check_refuses_is_noted_and_the_job_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = a_run(
        tmp_path, command=f"{sys.executable} -c \"print('rail 3'); raise SystemExit(1)\""
    )
    assert begun(config, tmp_path) == BAD_NODE
    assert (tmp_path / "bad").read_text() == "n7\n"
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("preflight: bad: command: n7: ")
    assert line.endswith("ends with exit status 1: rail 3")
    off = replace(config, preflight=replace(config.preflight, enabled=False))
    assert begun(off, tmp_path) == DONE


def test_what_no_other_node_would_mend_is_a_mistake_and_no_bad_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(preflight_run, "memory_of_machine", lambda: 1 << 20)
    assert begun(a_run(tmp_path), tmp_path) == MISTAKE
    assert not (tmp_path / "bad").exists()
    assert "memory: 2 ranks take about" in capsys.readouterr().err
    # Alone among several nodes: one that has little memory tells it, which the others cannot.
    apart = a_run(tmp_path, together=False)
    assert begun(apart, tmp_path, num_nodes=2, head=False) == MISTAKE
    assert "preflight: n7 decided by itself" in capsys.readouterr().err
    monkeypatch.undo()
    full = shutil.disk_usage(tmp_path)._replace(free=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    assert begun(apart, tmp_path, num_nodes=2, head=True) == MISTAKE
    assert "bad: disk: 3 checkpoints" in capsys.readouterr().err
    assert begun(apart, tmp_path, num_nodes=2, head=False) == MISTAKE
    assert capsys.readouterr().err == ""  # the folder is all nodes' in common, so the head tells


def test_a_node_that_finds_itself_bad_meets_the_others_with_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = a_run(tmp_path, command="false")
    carried: list[Finding] = []
    decides: int | None = MISTAKE

    def start(arguments: Sequence[str], *, nproc: int) -> int:
        carried[:] = load_findings(Path(arguments[arguments.index("--findings-from") + 1]))
        if decides is None:
            return FAILED
        Path(arguments[arguments.index("--status-to") + 1]).write_text(str(decides))
        return DONE

    assert begun(config, tmp_path, start=start, num_nodes=2) == MISTAKE  # as all have it
    assert [(f.check, f.node) for f in carried if f.verdict == "bad"] == [("command", "n7")]
    assert capsys.readouterr().err == ""  # rank 0 tells
    assert not (tmp_path / "bad").exists()
    decides = None  # they do not meet
    assert begun(config, tmp_path, start=start, num_nodes=2) == BAD_NODE
    told = capsys.readouterr().err
    assert "bad: command: n7: false ends with exit status 1" in told
    assert "n7 decided by itself, without the other nodes" in told
    assert (tmp_path / "bad").read_text() == "n7\n"


def test_a_node_meets_the_others_only_where_that_is_asked_for(tmp_path: Path) -> None:
    started: list[tuple[list[str], int]] = []
    status = BAD_NODE
    ends = 0

    def start(arguments: Sequence[str], *, nproc: int) -> int:
        started.append((list(arguments), nproc))
        if not ends:
            Path(arguments[arguments.index("--status-to") + 1]).write_text(str(status))
        return ends

    assert begun(a_run(tmp_path), tmp_path, start=start) == DONE
    apart = a_run(tmp_path, together=False)
    assert begun(apart, tmp_path, start=start, num_nodes=2) == DONE
    assert started == []
    assert begun(a_run(tmp_path), tmp_path, start=start, num_nodes=2) == BAD_NODE
    [(arguments, nproc)] = started
    assert (arguments[:2], nproc) == (["doctor", "--preflight"], 1)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    given = DoctorOptions.of(parser.parse_args(arguments[1:]))
    assert (given.preflight, given.gpus_wanted, given.config) == (True, 0, tmp_path / "config.toml")
    assert begun(a_run(tmp_path, bandwidth=True), tmp_path, start=start) == BAD_NODE
    assert started[-1][1] == 2  # as many ranks as the run has
    ends = FAILED
    assert begun(a_run(tmp_path), tmp_path, start=start, num_nodes=2) == FAILED


def doctored(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return doctor.run(parser.parse_args(arguments))


def test_doctor_tells_what_a_run_takes_and_refuses_what_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("counterflow.launch.doctor_facts.find_libraries", tuple)
    monkeypatch.delenv("RANK", raising=False)
    path = tmp_path / "config.toml"
    path.write_text(f'[run]\nfolder = "{tmp_path}"\n')
    monkeypatch.setattr("counterflow.launch.doctor_facts.Facts.torch", "0")
    assert doctored("--config", str(path), "--gpu-memory-gib", "80", "--json") == DONE
    report = json.loads(capsys.readouterr().out)
    ranks = report["memory"]["ranks"]
    assert [rank["stages"] for rank in ranks] == [[0, 1], [0, 1]]
    assert all(rank["total"] == sum(rank["parts"].values()) for rank in ranks)
    assert {found["verdict"] for found in report["findings"]} <= {"ok", "warning"}
    assert doctored("--config", str(path), "--gpu-memory-gib", "0.01") == MISTAKE
    out = " ".join(capsys.readouterr().out.split())
    assert "What the run takes of a GPU's memory at most, GiB" in out
    assert "bad: memory: pipeline rank 0 takes about" in out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--gpu-memory-gib", "80"), "give --config"),
        (("--preflight",), "give --config"),
        (("--baseline", "x"), "give --bandwidth too"),
        (("--least-share", "2"), "must be above 0, to 1"),
        (("--bandwidth", "--save-baseline", "/no/such/folder/x"), "there is no directory"),
    ],
)
def test_options_that_make_no_sense_are_one_line(arguments: Sequence[str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        doctored(*arguments)


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"least_share": 0.0}, "least_share must be above 0"),
        ({"baseline": "x"}, "nothing to hold against it"),
        ({"bandwidth": True, "together": False}, "set preflight.together to true"),
        ({"command": "a 'b"}, "cannot be split into words"),
        ({"command": " "}, "names no program"),
        ({"command_timeout_s": 0.0}, "command_timeout_s must be above 0"),
    ],
)
def test_a_wrong_section_is_one_line(section: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        PreflightConfig(**section)  # pyright: ignore[reportArgumentType]


def test_nodes_of_one_name_are_numbered() -> None:
    topology = topology_of(4, 2)
    assert node_names(topology, ["h", "h", "h", "h"]) == ["h.0", "h.1"]
    assert node_names(topology, ["a", "a", "b", "b"]) == ["a", "b"]
