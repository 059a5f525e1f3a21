"""Training in FP8: the same numbers in every layout, as the command line runs it, and its errors.

The reference's products and quantisers state every rounding, so layouts that add up in one order
agree to the last bit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from counterflow.comm.dispatch.names import PayloadName
from counterflow.fp8 import NonFiniteError
from counterflow.fp8.weights import quantized_weights
from counterflow.launch import report
from counterflow.launch.config import load
from counterflow.launch.trainer import train
from counterflow.parallel import Mesh, MeshShape
from tests import cases_fp8 as cases
from tests.cases_training import global_batch
from tests.ranks import RankPool, free_port

# Multi-token prediction uses the embedding too. Where stages part the two uses, each is summed over
# the micro-batches first; one process adds both of a micro-batch in bfloat16, as autograd does.
TWICE_USED = "model.embed_tokens.weight"


@cache
def one_process(
    share: int, shares: int, microbatches: int, payload: PayloadName = "exact"
) -> dict[str, Any]:
    return cases.one_process(share, shares, microbatches, payload=payload)


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def require_equal(
    results: list[dict[str, Any]], want: dict[str, Tensor], *, but: tuple[str, ...] = ()
) -> None:
    """All gradients of all ranks bit for bit, but for some that are close."""
    assert set().union(*(r["grads"] for r in results)) == set(want), "some rank holds every one"
    for result in results:
        for name, grad in result["grads"].items():
            if name in but:
                assert error(grad, want[name]) < 2**-7, name  # bfloat16's rounding
            else:
                assert torch.equal(grad, want[name]), name


def test_a_pipeline_has_the_bits_of_one_process(ranks: RankPool) -> None:
    """1F1B adds micro-batches up in their order, as one process does."""
    sizes = {"schedule": "1f1b", "pp": 2, "dp": 1, "ep": 1, "microbatches": 4}
    results = ranks.run(cases.gradients, world=2, **sizes)
    want = one_process(0, 1, 4)
    assert [r["losses"] for r in results] == [want["losses"]] * 2
    require_equal(results, want["grads"], but=(TWICE_USED,))


def test_dualpipe_has_the_bits_of_two_processes_that_share_the_batch(ranks: RankPool) -> None:
    """Either holder of a stage sums half of the micro-batches, from one end; then both are added.

    That is another order than one process has, so what is compared is the sum of two processes, one
    for each half. The means are exact: the numbers of micro-batches are powers of two. Half of the
    backward passes are split here, none of theirs is.
    """
    sizes = {"schedule": "dualpipe", "pp": 2, "dp": 1, "ep": 1, "microbatches": 4}
    results = ranks.run(cases.gradients, world=2, **sizes)
    halves = [one_process(i, 2, 2) for i in range(2)]
    want = {
        name: (first + halves[1]["grads"][name]) / 2 for name, first in halves[0]["grads"].items()
    }
    for name, loss in results[0]["losses"].items():
        mean = (halves[0]["losses"][name] + halves[1]["losses"][name]) / 2
        # Layers' balance losses are added up stage by stage, in float64.
        assert loss == (pytest.approx(mean, rel=1e-14) if name == "balance" else mean), name
    require_equal(results, want, but=(TWICE_USED,))
    again = ranks.run(cases.gradients, world=2, **sizes)
    for one, two in zip(results, again, strict=True):
        assert one["losses"] == two["losses"]
        require_equal([two], one["grads"])


def test_a_split_backward_has_the_bits_of_a_whole_one() -> None:
    split = cases.one_process(0, 1, 4, schedule="zb-h1")
    require_equal([split], one_process(0, 1, 4)["grads"])


@pytest.mark.parametrize("payload", ["exact", "fp8"])
def test_experts_on_two_ranks_compute_what_one_has(ranks: RankPool, payload: PayloadName) -> None:
    """Rows are quantised one by one, so the forward is that of one process to the last bit.

    So is the gradient of all that is not an expert: the same rows, added up over the two ranks. An
    expert's weight gradient is a sum over the rows of both ranks, cut into tiles of 128x1 at other
    places. With powers of two for scales that moves only numbers at the low end of a tile, which
    are rounded to a multiple of 2**-9 of the scale, and the order of a float32 sum.

    Rows that travel in FP8 are rounded row by row too, and so they are by one process with the same
    payload; their sums go back in bfloat16, which they have here anyway. So the same holds.
    """
    sizes = {"schedule": "1f1b", "pp": 1, "dp": 2, "ep": 2, "microbatches": 2, "payload": payload}
    results = ranks.run(cases.gradients, world=2, **sizes)
    shares = [one_process(i, 2, 2, payload) for i in range(2)]
    for result in results:
        assert result["losses"] == shares[result["dp_rank"]]["losses"]
        for name, grad in result["grads"].items():
            want = (shares[0]["grads"][name] + shares[1]["grads"][name]) / 2
            if ".experts." in name and "shared" not in name:
                assert error(grad, want) < 2e-3, name
            else:
                assert torch.equal(grad, want), name


def test_weights_are_quantised_once_a_step_and_not_once_a_micro_batch() -> None:
    engine = cases.make_engine(Mesh(MeshShape()), "1f1b", 4)
    inputs, targets = global_batch(0, 4, 1)

    def times() -> set[int]:
        found = [w for part in engine.parts.values() for w in quantized_weights(part)]
        return {weight.times_quantized for weight in found if weight.nbytes()}

    assert times() == set()
    engine.gradients(inputs, targets)
    assert times() == {1}
    engine.evaluate(inputs, targets)
    assert times() == {1}, "nothing has changed"
    engine._update(1e-3)
    engine.evaluate(inputs, targets)
    engine.gradients(inputs, targets)
    assert times() == {2}, "an update is followed by one quantisation"


SMALL = {
    "model.hidden_size": 64,
    "model.intermediate_size": 96,
    "model.moe_intermediate_size": 32,
    "model.num_hidden_layers": 2,
    "model.n_routed_experts": 4,
    "model.n_group": 1,
    "model.topk_group": 1,
    "model.num_nextn_predict_layers": 0,
    "data.sequence_length": 32,
    "train.sequences": 1,
    "train.steps": 6,
    "train.warmup_steps": 2,
    "train.eval_batches": 1,
    "train.dtype": "bfloat16",
    "train.lr": 1e-2,
    "run.timeout_s": 100,
}
ONE = {
    "mesh.pp": 1,
    "mesh.dp": 1,
    "mesh.ep": 1,
    "schedule.name": "1f1b",
    "schedule.microbatches": 8,
    "run.device": "cpu",
}


def options(**keys: Any) -> list[tuple[str, str]]:
    given = {**SMALL, **{key.replace("__", "."): value for key, value in keys.items()}}
    return [(key, str(value)) for key, value in given.items()]


def train_here(folder: Path, **keys: Any) -> Path:
    """A run of one rank in this process, which has the global batch of four; returns its folder."""
    config = load(None, options(**ONE, **keys, run__folder=folder))
    config.run.path.mkdir(parents=True)
    place = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in place.items():
            patch.setenv(name, str(value))
        # Drawing takes longer than all else; the other run does it.
        patch.setattr(report, "_pictures", lambda *_: None)
        try:
            train(config, config.run.path)
        finally:
            if dist.is_initialized():  # after an error
                dist.destroy_process_group()
    return config.run.path


@pytest.fixture(scope="module")
def fp8_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the command said of a run in FP8, and its folder."""
    folder = tmp_path_factory.mktemp("runs")
    # Two ranks that exchange tokens; pipelines have tests of their own above, in fewer seconds.
    place = {"mesh.pp": 1, "mesh.dp": 2, "mesh.ep": 2, "schedule.name": "1f1b"}
    arguments = [f"--{key}={text}" for key, text in options(**place, fp8__enabled="true")]
    run = subprocess.run(
        [
            *(sys.executable, "-m", "counterflow", "train", *arguments),
            *("--run.folder", str(folder), "--run.name", "fp8"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout, folder / "fp8"


@pytest.fixture(scope="module")
def bf16_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same run in bfloat16."""
    return train_here(tmp_path_factory.mktemp("runs"))


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["main_loss"] for line in lines if line["kind"] == "train"]


def test_training_in_fp8_over_ranks_stays_near_bfloat16(
    fp8_run: tuple[str, Path], bf16_run: Path
) -> None:
    fp8, bf16 = losses(fp8_run[1]), losses(bf16_run)
    assert fp8[-1] < fp8[0] - 0.5
    for one, two in zip(fp8, bf16, strict=True):
        assert abs(one / two - 1) < 0.01  # six steps; a run is held to 0.25 % over many
    assert fp8 != bf16


def test_a_run_says_what_ran_in_fp8(fp8_run: tuple[str, Path], bf16_run: Path) -> None:
    said, folder = fp8_run
    assert "dispatch dedup, fp8 rows" in said
    assert "FP8, scales power of two, gradients e4m3, products by reference (on cpu" in said
    result = json.loads((folder / "result.json").read_text())
    assert result["dispatch"]["payload"] == "fp8"
    assert result["moments"] == "bfloat16"
    assert result["recompute"] == {"norms": True, "up_projections": True}
    fp8 = result["fp8"]
    assert (fp8["enabled"], fp8["scales"], fp8["e5m6"]) == (True, "power_of_two", True)
    kinds = ("dense", "grouped", "grouped_along_k")
    assert fp8["backends"] == {kind: ["reference"] for kind in kinds}
    assert fp8["why"] == "on cpu the reference computes"
    # Both layers on both ranks, but half of the experts on each: one byte a weight, and little for
    # scales.
    attention = 64 * (64 + 32 + 16) + 64 * 4 * 32 + 32 * 4 * 48 + 4 * 32 * 64
    shared, dense, expert = 3 * 64 * 32, 3 * 64 * 96, 3 * 64 * 32
    weights = 2 * (2 * attention + dense + shared + 2 * expert)
    assert weights < fp8["weight_bytes"] < 1.01 * weights
    page = (folder / "report.html").read_text()
    assert "Linear layers ran in FP8" in page
    assert f"{fp8['weight_bytes']:,} bytes of weights in FP8" in page
    plain = json.loads((bf16_run / "result.json").read_text())
    assert plain["fp8"] == {"enabled": False}
    assert (plain["moments"], plain["dispatch"]["payload"]) == ("float32", "exact")
    assert "Linear layers ran in FP8" not in (bf16_run / "report.html").read_text()


def test_a_nan_ends_the_run_with_one_line_that_says_where(tmp_path: Path) -> None:
    broken = {"fp8.enabled": "true", "fp8.check": "true", "train.lr": 1e39}
    with pytest.raises(NonFiniteError) as caught:  # the command line names the rank before it
        train_here(tmp_path, **broken, train__warmup_steps=0)
    line = str(caught.value)
    assert line.startswith("step 2, action 0F0: model.layers.0.self_attn")
    assert "the input [32, 64] holds an infinity or NaN" in line
    assert "\n" not in line
