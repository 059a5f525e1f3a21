"""Ranks that something else than the launcher starts in an allocation find their places too."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import runs
from .cluster import Cluster

pytestmark = pytest.mark.timeout(900)  # every wait has a limit of its own

# One step: how ranks start is asked here, not how they train.
ONCE = ("--train.steps", "1", "--train.warmup_steps", "1", "--checkpoint.enabled", "false")
TRAIN = (*runs.COUNTERFLOW, "train", "tiny.toml", *ONCE)
TORCHRUN = ("-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2")
RENDEZVOUS = ("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.11:29411", "--rdzv-id=plain")
WAYS = {
    "srun": ("srun", "--ntasks=4", "--ntasks-per-node=2", *TRAIN),
    "torchrun": (
        *("srun", "--ntasks=2", "--ntasks-per-node=1", runs.COUNTERFLOW[0], *TORCHRUN),
        *(*RENDEZVOUS, *TRAIN[1:]),
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_four_ranks_started_plainly_on_two_nodes_train_together(
    slurm: Cluster, tmp_path: Path, way: str
) -> None:
    runs.write_tiny(tmp_path)
    command = [*WAYS[way], "--mesh.dp", "4"]
    options = ["--nodes=2", "--ntasks-per-node=2", f"--output={tmp_path}/out"]
    script = f"#!/bin/sh\nexport OMP_NUM_THREADS=1\n{runs.batch(command)}"
    slurm.wait(slurm.submit(script, *options, cwd=tmp_path), "COMPLETED")
    assert runs.result(tmp_path / "runs" / "tiny")["world_size"] == 4
    assert "pp 1 x dp 4 (ep 2) on 2 nodes" in (tmp_path / "out").read_text()
