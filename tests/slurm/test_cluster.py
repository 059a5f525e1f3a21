"""The cluster that the tests of this folder run on is a real one, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from .cluster import Cluster

ROOT = Path(__file__).parents[2]


def test_a_job_runs_on_nodes_whose_natural_order_is_not_that_of_the_topology(
    slurm: Cluster, tmp_path: Path
) -> None:
    script = "#!/bin/sh\nsrun --label sh -c 'echo $SLURM_TOPOLOGY_ADDR $CUDA_VISIBLE_DEVICES'\n"
    job = slurm.submit(script, "--nodes=4", "--gpus-per-node=2", f"--output={tmp_path}/out")
    slurm.wait(job, "COMPLETED")
    assert sorted((tmp_path / "out").read_text().splitlines()) == [
        "0: spine.leaf1.node1 0,1",
        "1: spine.leaf2.node2 0,1",
        "2: spine.leaf1.node3 0,1",
        "3: spine.leaf2.node4 0,1",
    ]


def test_a_requeued_job_starts_again_at_once_when_released(slurm: Cluster, tmp_path: Path) -> None:
    script = (
        '#!/bin/sh\n[ -n "$SLURM_RESTART_COUNT" ] && exit 0\nscontrol requeue $SLURM_JOB_ID\nwait'
    )
    job = slurm.submit(script, f"--output={tmp_path}/out", "--requeue")
    slurm.until(lambda: slurm.job(job)["Restarts"] == "1", "the requeue", job)
    slurm.wait(job, "PENDING")
    slurm.release(job)
    slurm.wait(job, "COMPLETED")


def test_nothing_outlives_a_cluster_whose_owner_is_killed(slurm: Cluster) -> None:
    code = """
import os, signal
from tests.slurm.cluster import cluster
from tests.slurm.runs import processes

with cluster() as slurm:
    script = "#!/bin/sh\\nsrun sh -c 'setsid sleep 1000 & setsid sleep 1000'\\n"
    job = slurm.submit(script, "--nodes=4", "--output=/dev/null")
    started = lambda: sum("1000" in process.arguments for process in processes(job)) == 8
    slurm.until(started, "eight processes", job)
    print(slurm.folder, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    folder = done.stdout.strip()
    assert folder != str(slurm.folder)
    limit = time.monotonic() + 120
    while left := {*mentioning(folder), *([folder] if os.path.exists(folder) else [])}:
        assert time.monotonic() < limit, left
        time.sleep(0.05)


def mentioning(folder: str) -> list[str]:
    """Commands of processes that have this folder in their environment."""
    found: list[str] = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if folder.encode() in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_text())
    return found
