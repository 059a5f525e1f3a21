"""The training path on a GPU gives what one process on the CPU gives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import cases_gpu, cases_training
from tests.ranks import RankPool


@pytest.mark.parametrize(
    ("schedule", "world", "pp", "ep"),
    [
        ("1f1b", 1, 1, 1),
        ("1f1b", 2, 2, 1),
        ("1f1b", 4, 4, 1),
        ("dualpipe", 2, 2, 1),
        ("dualpipe", 4, 2, 2),
        ("dualpipe", 4, 4, 1),
        ("dualpipev", 2, 2, 1),
    ],
)
def test_gradients_over_nccl_equal_those_of_one_process_on_the_cpu(
    ranks: RankPool, schedule: str, world: int, pp: int, ep: int
) -> None:
    results = ranks.run(
        cases_gpu.gradients_on_gpu,
        world=world,
        backend="cpu:gloo,cuda:nccl",
        timeout_s=240,
        schedule=schedule,
        pp=pp,
        ep=ep,
    )
    _, want = cases_training.one_process_gradients(
        "1f1b", 1, world // pp, results[0]["microbatches"], torch.float64
    )
    for result in results:
        assert result["spans"] > 0
        for name, grad in result["grads"].items():
            expected = want[name]
            assert grad is not None
            assert expected is not None
            # Other kernels, other orders of summation: rounding of float64.
            assert float((grad - expected).norm()) <= 1e-11 * max(float(expected.norm()), 1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_train_uses_the_gpu_and_learns(tmp_path: Path, dtype: str) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "counterflow", "train"),
            *("--mesh.pp", "1", "--mesh.dp", "1", "--mesh.ep", "1", "--schedule.name", "1f1b"),
            *("--run.device", "cuda", "--run.folder", str(tmp_path), "--run.name", "gpu"),
            *("--train.steps", "60", "--train.dtype", dtype, "--train.constant_steps", "20"),
        ],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "gpu" / "result.json").read_text())
    assert result["device"] == "cuda"
    assert result["validation_loss"] < result["unigram_entropy"] - 0.5
