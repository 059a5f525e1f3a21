"""`counterflow launch slurm`: what is submitted, and how its ranks start."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from . import runs
from .cluster import SWITCHES, Cluster
from .runs import Job

pytestmark = pytest.mark.timeout(900)  # every wait has a limit of its own

# For a shell that reads them: a redirection, two commands, three substitutions, a glob, quotes.
FOLDER = "a b; touch x $(touch y) `touch z` > w"
NAME = 'it\'s a "run" & #1 %j $HOME * ~'
NODES = 4


@dataclass(frozen=True)
class Finished:
    """A job that ran to its end, and what was seen of it.

    Attributes:
        job: itself.
        cwd: where it was submitted.
        dry_run: what a dry run had printed before.
        nodes: by rank, the node that Slurm had started its process on.
    """

    job: Job
    cwd: Path
    dry_run: str
    nodes: dict[int, str]


@pytest.fixture(scope="module")
def finished(shared_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Four ranks on four nodes, in two expert groups, in a folder with a name out of hell.

    As in a container, the step has none of Slurm's commands.
    """
    cwd = tmp_path_factory.mktemp("submit") / FOLDER
    python = tmp_path_factory.mktemp("bin") / "python"
    python.write_text(f'#!/bin/sh\nPATH=/nowhere exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    config = runs.write_tiny(cwd)
    options = ["--nodes", str(NODES), "--ranks-per-node", "1", "--time", "10"]
    options += ["--python", str(python)]
    train = [config.name, "--mesh.dp", str(NODES), "--run.folder", "r u n s", "--run.name", NAME]
    train += ["--preflight.together", "true"]
    environ = {"SOURCE_DATE_EPOCH": "1750000000"}  # both scripts of one minute
    dry_run = runs.launch(shared_cluster, cwd, ["--dry-run", *options], train, environ)
    assert dry_run.returncode == 0, dry_run.stderr
    assert not shared_cluster.jobs()
    assert not (cwd / "r u n s").exists()
    done = runs.launch(shared_cluster, cwd, options, train, environ)
    assert done.returncode == 0, done.stderr
    job = runs.of_run(shared_cluster, runs.job_id(done.stdout), cwd / "r u n s" / NAME)
    with job.training(NODES) as ranks:
        assert all(process.environ["PATH"] == "/nowhere" for process in ranks.values())
        nodes = {rank: process.node for rank, process in ranks.items()}
    job.wait("COMPLETED")
    return Finished(job, cwd, dry_run.stdout, nodes)


def test_a_submitted_run_ends_with_its_result_and_a_log_of_each_rank(finished: Finished) -> None:
    folder = finished.job.folder
    assert runs.result(folder)["world_size"] == NODES
    assert runs.result(folder)["steps"] == runs.STEPS
    assert sorted(path.name for path in (folder / "logs").iterdir()) == [
        f"rank{rank:05}.log" for rank in range(NODES)
    ]
    assert f"step {runs.STEPS}/{runs.STEPS}" in (folder / "logs" / "rank00000.log").read_text()
    assert f"step {runs.STEPS}/{runs.STEPS}" in finished.job.output()


def test_the_dry_run_prints_the_very_script_that_is_submitted(finished: Finished) -> None:
    assert finished.job.slurm.script(finished.job.id) == finished.dry_run
    stamp = "\n".join(finished.dry_run.splitlines()[:3])
    assert "counterflow launch slurm --nodes 4" in stamp
    assert "2025-06-15" in stamp


def test_nothing_in_the_name_of_a_folder_or_run_is_executed(finished: Finished) -> None:
    assert sorted(os.listdir(finished.cwd)) == ["corpus.txt", "r u n s", "tiny.toml"]
    assert os.listdir(finished.cwd.parent) == [FOLDER]
    assert os.listdir(finished.cwd / "r u n s") == [NAME]


def test_expert_groups_are_under_one_switch_and_the_placement_says_so(finished: Finished) -> None:
    groups = [{finished.nodes[rank] for rank in group} for group in ((0, 1), (2, 3))]
    assert sorted(groups, key=min) == [set(nodes) for nodes in SWITCHES.values()]
    lines = [line.split() for line in finished.job.output().splitlines()]
    switch = {node: name for name, nodes in SWITCHES.items() for node in nodes}
    for rank, node in finished.nodes.items():
        assert [str(rank), node, switch[node], str(rank), str(rank // 2)] in lines
    told = "expert groups of 2 ranks: 0 of 2 within one node, 2 under one switch"
    assert told in finished.job.output()


def test_of_bad_configurations_of_an_array_each_is_named_and_nothing_is_submitted(
    slurm: Cluster, tmp_path: Path
) -> None:
    good = runs.write_tiny(tmp_path)
    bad = {"odd.toml": ("ep = 2", "ep = 3"), "typo.toml": ("steps", "stepz")}
    for name, (old, new) in bad.items():
        (tmp_path / name).write_text(good.read_text().replace(old, new))
    (tmp_path / "rank.toml").write_text(good.read_text().replace("dp = 2", "dp = 4"))
    files = [good.name, *bad, "rank.toml", "missing.toml"]
    options = ["--nodes", "2", "--ranks-per-node", "1"]
    done = runs.launch(slurm, tmp_path, [*options, *(f"--array={file}" for file in files)], [])
    assert done.returncode == 2
    assert not slurm.jobs()
    assert not (tmp_path / "runs").exists()
    told = done.stderr.splitlines()
    assert "4 of 5 configurations" in told[0]
    for file, line in zip(files[1:], told[1:], strict=True):
        assert line.strip().startswith(file)


def test_without_sbatch_one_line_says_what_to_do(slurm: Cluster, tmp_path: Path) -> None:
    config = runs.write_tiny(tmp_path)
    options = ["--nodes", "2", "--ranks-per-node", "1"]
    done = runs.launch(slurm, tmp_path, options, [config.name], {"PATH": "/nowhere"})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("counterflow: error: sbatch is not on PATH")
    assert done.stderr.count("\n") == 1


def test_what_sbatch_refuses_is_told_in_its_own_words(slurm: Cluster, tmp_path: Path) -> None:
    config = runs.write_tiny(tmp_path)
    options = ["--nodes", "2", "--ranks-per-node", "1", "--partition", "none such"]
    done = runs.launch(slurm, tmp_path, options, [config.name])
    assert done.returncode == 2
    assert "invalid partition specified: none such" in done.stderr
    assert done.stderr.count("\n") == 1
