"""The memory and disk that a run takes, predicted before it starts, against what it then takes."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import get_gradient_edge

from bench.layer_memory import Alive
from counterflow.launch.check import step_schedules
from counterflow.launch.config import CheckpointConfig, Config, RunConfig, load
from counterflow.launch.fp8 import make_recipe, make_recompute
from counterflow.launch.preflight.activations import StageActivations, activations
from counterflow.launch.preflight.disk import disk_findings
from counterflow.launch.preflight.memory import (
    GIB,
    activation_peaks,
    estimate_memory,
    memory_findings,
)
from counterflow.launch.preflight.sizes import checkpoint_bytes
from counterflow.model import DeepSeekV3, ModelConfig, partition
from counterflow.parallel.chunk import Chunk
from counterflow.parallel.schedule import Schedule, build
from counterflow.parallel.simulate import Costs, Memory, memory_of, simulate
from tests import cases_preflight as cases
from tests.ranks import RankPool

BF16 = [("train.dtype", "bfloat16"), ("train.ema_decay", "0.9")]
FP8 = [("train.dtype", "bfloat16"), ("fp8.enabled", "true"), ("data.sequence_length", "32")]
SMALL = [("train.sequences", "1"), ("data.sequence_length", "16")]
# The layout of DeepSeek-V3 (arXiv 2412.19437, section 3.2 and 4.2); it does not tell the tokens of
# a micro-batch.
V3 = [
    *(("mesh.pp", "16"), ("mesh.dp", "128"), ("mesh.ep", "64"), ("zero.stage", "1")),
    *(("train.dtype", "bfloat16"), ("fp8.enabled", "true"), ("train.sequences", "1")),
    *(("schedule.microbatches", "120"), ("data.sequence_length", "2048")),
]


def schedule_of(config: Config) -> Schedule:
    return step_schedules(config)[config.schedule.microbatches]


@pytest.mark.parametrize("overrides", [SMALL, [*BF16, *SMALL], FP8])
def test_parameters_gradients_and_states_are_predicted_to_the_byte(
    overrides: list[tuple[str, str]], ranks: RankPool
) -> None:
    config = load(None, overrides)
    found = ranks.run(cases.state_bytes, world=4, overrides=overrides)
    predicted = estimate_memory(config, schedule_of(config), device="cpu")
    for rank in found:
        parts = predicted.ranks[rank["pp_rank"]].parts
        for what in ("parameters", "gradients", "optimizer"):
            assert parts[what] == rank[what], what
    whole = {name: size for rank in found for name, size in rank["whole"].items()}
    assert checkpoint_bytes(config, schedule_of(config)) == sum(whole.values())


@pytest.mark.parametrize("overrides", [[], BF16, [("model.num_nextn_predict_layers", "0")]])
@pytest.mark.parametrize("num_stages", [1, 4])
def test_what_a_stage_keeps_is_predicted(overrides: list[tuple[str, str]], num_stages: int) -> None:
    config = load(None, [*overrides, ("data.sequence_length", "64")])
    config = replace(config, mesh=replace(config.mesh, ep=1))
    predicted = activations(config, num_stages, padded_heads=True)
    for stage, part in enumerate(partition(config.model, num_stages)):
        kept, waiting = bytes_of_stage(config, part)
        if part.head:
            # Layers are exact; of the losses a few numbers of each token are left out.
            assert predicted[stage].kept == pytest.approx(kept, rel=1e-3)
            assert predicted[stage].waiting == pytest.approx(waiting, rel=1e-3)
        else:
            assert predicted[stage][:2] == (kept, waiting)


def bytes_of_stage(config: Config, part: object) -> tuple[int, int]:
    """What one stage keeps of a micro-batch before its backward, and between I and W."""
    dtype, size = getattr(torch, config.train.dtype), config.data.sequence_length
    stage = DeepSeekV3(
        config.model,
        part,  # pyright: ignore[reportArgumentType]
        dtype=dtype,
        recipe=make_recipe(config),
        recompute=make_recompute(config),
    )
    tokens = torch.randint(0, config.model.vocab_size, (config.train.sequences, size))
    hidden = torch.randn(*tokens.shape, config.model.hidden_size).to(dtype).requires_grad_()

    def step(chunk: Chunk, alive: Alive | None) -> tuple[int, int]:
        y = stage(tokens if stage.part.embed else hidden * 1, chunk)
        if stage.part.head:
            y = stage.loss(y, tokens, chunk)
        edges = [get_gradient_edge(root) for root in (y, *(value for _, value in chunk.losses))]
        grads = [torch.ones(y.shape, dtype=y.dtype), *(torch.ones(()) for _ in edges[1:])]
        chunk.losses.clear()
        del y
        # Not the gradients with which the backward begins.
        given = sum(g.nbytes for g in grads)
        kept = alive.nbytes() - given if alive else 0
        torch.autograd.backward(edges, grads)
        del edges, grads
        waiting = alive.nbytes() if alive else 0
        chunk.weight_grads.run()
        return kept, waiting

    step(Chunk(), None)  # makes the weights' gradients
    chunk = Chunk()
    chunk.weight_grads.deferring = True
    with Alive() as alive:
        return step(chunk, alive)


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb-h1", "zbv", "dualpipe", "dualpipev"])
def test_the_peak_is_the_simulations_where_that_can_tell(name: str) -> None:
    schedule = build(name, ranks=4, microbatches=8)
    sizes = [StageActivations(100 + i, 40 + i, 0) for i in range(schedule.num_stages)]
    kept, waiting = ([float(size[i]) for size in sizes] for i in (0, 1))
    simulated = memory_of(
        simulate(schedule, Costs()), Memory(activations=tuple(kept), kept=tuple(waiting))
    )
    assert activation_peaks(schedule, sizes) == [rank.peak for rank in simulated]


def test_deepseek_v3s_layout_fits_80_gb_with_micro_batches_of_2048_tokens() -> None:
    config = replace(load(None, V3), model=ModelConfig())
    schedule = schedule_of(config)
    estimate = estimate_memory(config, schedule, device="cuda")
    assert set(estimate.chunk_peak) == {17}  # pp + 1, as the paper's table 2
    assert memory_findings(estimate, memory_bytes=80 * GIB, ranks=8) == []
    assert 60 * GIB < estimate.ranks[estimate.worst].total < 75 * GIB
    twice = replace(config, data=replace(config.data, sequence_length=4096))
    [found] = memory_findings(
        estimate_memory(twice, schedule, device="cuda"), memory_bytes=80 * GIB, ranks=8
    )
    assert (found.verdict, found.node) == ("bad", "")  # the job's mistake
    assert "a GPU's memory is 80.0 (activations" in found.message
    # Without ZeRO each of 128 ranks keeps all states, of experts each of the two that have them.
    whole = estimate_memory(
        replace(config, zero=replace(config.zero, stage=0)), schedule, device="cuda"
    )
    ratio = whole.ranks[1].parts["optimizer"] / estimate.ranks[1].parts["optimizer"]
    assert 2 < ratio < 128


def test_on_cpus_a_run_is_refused_only_where_the_whole_machine_is_too_small() -> None:
    config = load(None, SMALL)
    estimate = estimate_memory(config, schedule_of(config), device="cpu")
    needed = 4 * sum(rank.total for rank in estimate.ranks) / 2
    assert memory_findings(estimate, memory_bytes=round(needed) + 1, ranks=4) == []
    [found] = memory_findings(estimate, memory_bytes=round(needed) - 1, ranks=4, node="n1")
    assert "4 ranks take about" in found.message
    assert "the machine's memory on n1 is" in found.message
    assert memory_findings(estimate, memory_bytes=0, ranks=4) == []  # nobody knows


def test_a_disk_without_room_for_the_checkpoints_is_refused_with_the_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 3000))
    run = RunConfig(folder=str(tmp_path / "not" / "yet"), name="r")
    config = Config(run=run, checkpoint=CheckpointConfig(keep=2))
    assert disk_findings(config, 1000) == []
    [found] = disk_findings(config, 1001)
    assert "need 3003 bytes more" in found.message
    assert "has 3000 bytes free" in found.message
    there = run.path / "checkpoints" / "step-00000001"
    there.mkdir(parents=True)
    (there / "rank00000.safetensors").write_bytes(b"\0" * 500)  # is used already
    assert disk_findings(config, 1001) == []
    off = replace(config, checkpoint=replace(config.checkpoint, enabled=False))
    assert disk_findings(off, 10**9) == []


def test_a_folder_that_cannot_be_written_is_refused() -> None:
    if not os.path.isdir("/proc/self"):
        pytest.skip("no file system here that nobody can write to")
    [found] = disk_findings(Config(run=RunConfig(folder="/proc/self/runs")), 1)
    assert found.message.startswith("/proc/self cannot be written: ")
