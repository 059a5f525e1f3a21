"""`counterflow doctor --measure`: real ranks time a small model; what cannot be is told at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from counterflow.launch.config import Config, small_model
from counterflow.launch.measure_command import ranks_here
from counterflow.launch.measure_fit import FEWEST, Round, composed, fitted, quiet
from counterflow.launch.measure_phases import measured_model
from counterflow.launch.settings import ConfigError
from counterflow.model import ModelConfig
from counterflow.parallel.mesh import MeshShape
from counterflow.parallel.schedule.interleaving import PUBLISHED_ORDER
from counterflow.parallel.simulate.phases import FORWARD, NAMES
from counterflow.predict.layout import Kind
from counterflow.predict.measured import FORMAT, read_measured
from counterflow.predict.step import predict

from .commands import Command

DOCTOR = Command("doctor")
TINY = """
[mesh]
pp = 1
dp = 2
ep = 2
[schedule]
name = "1f1b"
microbatches = 2
[train]
sequences = 1
[data]
sequence_length = 16
[model]
hidden_size = 32
num_hidden_layers = 2
"""


def test_two_ranks_measure_what_a_prediction_needs(tmp_path: Path) -> None:
    config, path = tmp_path / "run.toml", tmp_path / "here.json"
    config.write_text(TINY)
    command = [sys.executable, "-m", "counterflow", "doctor", "--measure", str(path), "--json"]
    command += ["--config", str(config), "--rounds", "1", "--timeout-s", "60"]
    environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    ran = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == json.loads(path.read_text())
    assert json.loads(ran.stdout)["format"] == FORMAT
    calibration, cluster = read_measured(path)
    kinds = {reference.kind for reference in calibration.references}
    assert kinds == {"embedding", "dense", "moe", "head", "mtp"}
    for reference in calibration.references:
        # "mtp" is the head with it less the head without: noise may leave nothing.
        least = 0.0 if reference.kind == "mtp" else 1e-9
        assert reference.alone["mlp(F)"] >= least
        assert (reference.layout.ep, reference.layout.tokens) == (2, 16)
    moe = calibration.reference("moe")
    assert moe is not None
    assert all(moe.alone[name] > 0 and moe.paired[name] >= 0 for name in NAMES)
    assert cluster.gpus_per_node == 2
    assert 0 < cluster.gpu.bf16_tflops < 100
    assert calibration.optimizer_gbps is not None
    found = predict(moe.model, cluster, moe.layout, calibration)
    assert 0 < found.step_ms < 60_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--measure", "here.txt"), "--measure here.txt: must end in .json"),
        (("--ranks", "2"), "--ranks and --rounds say how to measure; give --measure"),
        (("--rounds", "3"), "--ranks and --rounds say how to measure; give --measure"),
        (("--measure", "here.json", "--ranks", "0"), "--ranks 0 must be 1 or more"),
        (("--measure", "here.json", "--rounds", "0"), "--rounds 0 must be 1 or more"),
        (("--measure", "here.json", "--bandwidth"), "--measure stands alone"),
        (("--measure", "gone/here.json"), "there is no directory"),
    ],
)
def test_what_cannot_be_is_told(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in DOCTOR.error_of(capsys, *arguments)


def test_a_run_of_many_ranks_does_not_start_them_all_on_a_few_cores() -> None:
    config = Config(mesh=MeshShape(pp=16, dp=128, ep=8))
    with pytest.raises(ConfigError, match=r"the run has 2048 ranks, .* say by --ranks how many"):
        ranks_here(config, None)
    assert ranks_here(config, 3) == 3
    assert ranks_here(Config(), None) == Config().mesh.world_size


@pytest.mark.parametrize(
    ("dense", "layers", "kinds"), [(1, 4, [False, True]), (0, 4, [True]), (4, 4, [False])]
)
def test_a_layer_of_each_kind_is_measured(dense: int, layers: int, kinds: list[bool]) -> None:
    model = ModelConfig(num_hidden_layers=layers, first_k_dense_replace=dense)
    found = measured_model(model)
    assert [found.is_moe(index) for index in range(found.num_hidden_layers)] == kinds
    assert found.num_nextn_predict_layers == 0
    assert measured_model(small_model()).hidden_size == small_model().hidden_size


def test_rounds_without_a_core_do_not_count_where_there_are_enough_others() -> None:
    rounds = [Round(wall=1.0, computed=1.0 - share) for share in (0.5, 0.0, 0.02, 0.6)]
    rounds += [Round(wall=1.0, computed=0.99) for _ in range(FEWEST)]
    shares = [one.without_core for one in rounds]
    found = quiet(rounds, shares)
    assert len(found) == FEWEST + 2
    assert max(one.without_core for one in found) <= 0.05
    busy = [Round(wall=1.0, computed=0.2 + 0.05 * i) for i in range(9)]
    assert quiet(busy, [one.without_core for one in busy]) == busy[:3:-1][:FEWEST]


def _phases(comm: float) -> dict[str, dict[tuple[Kind, str], float]]:
    computing = [name for name in NAMES if not name.startswith(("dispatch", "combine"))]
    apart: dict[tuple[Kind, str], float] = {
        ("moe", name): comm for name in NAMES if name not in computing
    }
    alone: dict[tuple[Kind, str], float] = {("moe", name): 2.0 for name in computing}
    alone["embedding", "mlp(F)"] = alone["embedding", "mlp(B)"] = 0.5
    head: dict[tuple[Kind, str], float] = {("head", "mlp(F)"): 3.0}
    return {"apart": apart, "alone": alone | head, "paired": alone}


def test_communication_is_stretched_to_what_was_measured() -> None:
    totals = {"F": 8.0, "B": 10.0, "pair": 22.0}
    found = fitted(_phases(comm=1.0), totals, local=False)
    assert composed(found.alone, FORWARD) == pytest.approx(totals["F"])
    assert composed(found.paired, PUBLISHED_ORDER) == pytest.approx(totals["pair"])
    assert found.pair_gaps == pytest.approx(1.0)
    assert found.alone["moe"]["dispatch(F)"] == pytest.approx((8.0 - 4.0 - 0.5) / 2)
    assert found.alone["moe"]["dispatch(B)"] == 1.0
    assert found.paired["head"] == found.alone["head"]


def test_where_nothing_communicates_reordering_rows_counts_as_mlp_and_the_rest_as_gaps() -> None:
    totals = {"F": 7.5, "B": 14.0, "pair": 22.0}
    found = fitted(_phases(comm=1.0), totals, local=True)
    moe = found.alone["moe"]
    assert moe["mlp(F)"] == moe["mlp(B)"] == 4.0
    assert moe["dispatch(F)"] == moe["combine(B)"] == 0.0
    assert found.overhead_ms == pytest.approx(7.5 - 6.5)
    assert found.pair_gaps * composed(found.paired, PUBLISHED_ORDER) == pytest.approx(22.0 - 1.0)
