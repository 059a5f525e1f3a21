"""Whatever happens to a job, its run goes on, and ends as if nothing had happened."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from . import runs
from .cluster import WAIT_S, Cluster

pytestmark = pytest.mark.timeout(900)  # every wait has a limit of its own

SIGNAL_S = 150  # before the end of a job's time
# Slurm looks every half a minute, and sends the signal up to that much earlier.
SLACK_S = 30


@pytest.fixture(scope="module")
def uninterrupted(
    shared_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """The curve of the tiny training when `counterflow launch local` runs it in one go."""
    folder = tmp_path_factory.mktemp("local")
    config = runs.write_tiny(folder)
    command = [*runs.COUNTERFLOW, "launch", "local", "--", "train", config.name]
    environ = {"OMP_NUM_THREADS": "1"}
    done = shared_cluster.run(*command, cwd=folder, environ=environ, timeout_s=WAIT_S)
    assert done.returncode == 0, done.stderr
    return runs.curve(folder / "runs" / "tiny")


def test_when_its_time_is_up_a_run_saves_and_goes_on_as_long_as_it_comes_further(
    slurm: Cluster, tmp_path: Path, uninterrupted: list[dict[str, Any]]
) -> None:
    options = ["--time", "20", "--signal-seconds", str(SIGNAL_S)]
    job = runs.submit(slurm, tmp_path, options)
    with job.training() as ranks:
        slurm.set_time_limit(job.id, left_s=SIGNAL_S + SLACK_S)
        job.wait_for_signal(ranks)
    job.wait_for_requeue(1)
    saved = max(runs.checkpoints(job.folder))
    assert saved % runs.EVERY != 0  # where it stood, not where one was due
    slurm.set_time_limit(job.id, left_s=20 * 60)
    slurm.release(job.id)
    with job.training(after=saved) as ranks:
        slurm.ask("scancel", "--signal=USR1", str(job.id))
        job.wait_for_signal(ranks)
    job.wait_for_requeue(2)
    assert (job.folder / "slurm" / str(job.id) / "requeues").read_text().startswith("0 ")
    slurm.ask("scancel", str(job.id))
    again = runs.submit(slurm, tmp_path, ["--time", "20"])
    again.wait("COMPLETED")
    assert runs.curve(job.folder) == uninterrupted


def test_a_run_that_is_preempted_saves_makes_room_and_goes_on(
    slurm: Cluster, tmp_path: Path, uninterrupted: list[dict[str, Any]]
) -> None:
    job = runs.submit(slurm, tmp_path, ["--partition", "batch"])
    with job.training() as ranks:
        urgent = slurm.submit(
            runs.batch(["true"]),
            *("--partition=urgent", "--nodes=4", "--exclusive", f"--output={os.devnull}"),
        )
        job.wait_for_signal(ranks)
    slurm.wait(urgent, "COMPLETED")
    job.wait_for_requeue(1)
    assert max(runs.checkpoints(job.folder)) % runs.EVERY != 0
    slurm.release(job.id)
    job.wait("COMPLETED")
    assert runs.curve(job.folder) == uninterrupted


def test_a_task_of_an_array_is_queued_again_by_itself_and_the_other_is_left_alone(
    slurm: Cluster, tmp_path: Path, uninterrupted: list[dict[str, Any]]
) -> None:
    first, second = runs.submit_array(slurm, tmp_path, ["first", "second"])
    with second.training() as ranks:
        slurm.ask("scancel", "--signal=USR1", second.slurm_id)
        second.wait_for_signal(ranks)
    second.wait_for_requeue(1)
    slurm.release(second.slurm_id)
    for job, restarts in ((first, "0"), (second, "1")):
        assert job.wait("COMPLETED")["Restarts"] == restarts
        assert runs.curve(job.folder) == uninterrupted
        assert f"results are in {job.folder}" in job.output()


@pytest.mark.parametrize("which", ["head", "other"])
def test_a_run_that_loses_a_node_goes_on_elsewhere_from_its_last_checkpoint(
    slurm: Cluster, tmp_path: Path, uninterrupted: list[dict[str, Any]], which: str
) -> None:
    job = runs.submit(slurm, tmp_path, [])
    with job.training() as ranks:
        head = slurm.job(job.id)["BatchHost"]
        lost = next(p for p in ranks.values() if (p.node == head) == (which == "head"))
        slurm.ask("scontrol", "update", f"nodename={lost.node}", "state=down", "reason=lost")
        os.kill(lost.pid, signal.SIGKILL)  # a node that is really gone saves nothing any more
        job.wait_for_requeue(1)
    saved = max(runs.checkpoints(job.folder))
    slurm.release(job.id)
    with job.training(after=saved) as ranks:
        assert lost.node not in {process.node for process in ranks.values()}
    job.wait("COMPLETED")
    assert f"going on from the checkpoint of step {saved}\n" in job.output()
    assert runs.curve(job.folder) == uninterrupted


def test_a_job_goes_on_without_a_node_that_its_own_check_finds_bad(
    slurm: Cluster, tmp_path: Path
) -> None:
    check = "sh -c 'echo the fan of $SLURMD_NODENAME rattles; test $SLURMD_NODENAME != node3'"
    options = ["--nodelist", "node1", "--exclude", "node4"]
    job = runs.submit(slurm, tmp_path, options, ["--preflight.command", check])
    job.wait_for_requeue(1)
    assert set(slurm.job(job.id)["ExcNodeList"].split(",")) == {"node3", "node4"}
    assert not (job.folder / "metrics.jsonl").exists()
    slurm.release(job.id)
    assert job.wait("COMPLETED")["NodeList"] == "node[1-2]"
    told = [line for line in job.output().splitlines() if "the fan of node3 rattles" in line]
    assert len(told) == 1
    assert "node3" in told[0].split("the fan")[0]


def test_a_run_survives_the_loss_of_a_rank_within_the_job_and_of_a_launcher_by_requeueing(
    slurm: Cluster, tmp_path: Path, uninterrupted: list[dict[str, Any]]
) -> None:
    job = runs.submit(slurm, tmp_path, ["--max-restarts", "1"])
    with job.training() as ranks:
        saved = max(runs.checkpoints(job.folder))
        os.kill(ranks[1].pid, signal.SIGKILL)
    with job.training(after=saved) as ranks_again:
        assert slurm.job(job.id)["Restarts"] == "0"
        assert {r: p.node for r, p in ranks_again.items()} == {r: p.node for r, p in ranks.items()}
        assert not {p.pid for p in ranks.values()} & {p.pid for p in ranks_again.values()}
        launchers = job.launchers()
        assert set(launchers) == {p.node for p in ranks.values()}
        os.kill(launchers[ranks[1].node].pid, signal.SIGKILL)
    job.wait_for_requeue(1)
    assert "rank 1 was ended by SIGKILL" in job.output()
    slurm.release(job.id)
    job.wait("COMPLETED")
    assert runs.curve(job.folder) == uninterrupted
