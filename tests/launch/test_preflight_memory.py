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
from counterflow.launch.life.status import MISTAKE
from counterflow.launch.plan_layout import layout_of
from counterflow.launch.preflight.disk import disk_findings
from counterflow.launch.preflight.finding import bad_nodes, decided, status_of
from counterflow.launch.preflight.host_memory import memory_of_machine
from counterflow.launch.preflight.memory import (
    GIB,
    estimate_memory,
    memory_findings,
)
from counterflow.launch.preflight.sizes import checkpoint_bytes, stage_weights
from counterflow.model import DeepSeekV3, ModelConfig
from counterflow.parallel.chunk import Chunk
from counterflow.parallel.schedule import Schedule
from counterflow.predict.activations import MicroBatch, stage_activations
from counterflow.predict.memory import rank_states, storage_of
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


@pytest.mark.parametrize(
    "overrides",
    [
        [*SMALL, ("train.ema_decay", "0.9")],
        [
            *BF16,
            *SMALL,
            ("schedule.name", "1f1b"),
            ("train.moments", "float32"),
            ("mesh.pp", "1"),
            ("mesh.dp", "4"),
        ],
    ],
)
def test_zeros_shares_are_predicted_to_their_rounding(
    overrides: list[tuple[str, str]], ranks: RankPool
) -> None:
    overrides = [*overrides, ("zero.stage", "1")]
    config = load(None, overrides)
    schedule = schedule_of(config)
    found = ranks.run(cases.state_bytes, world=4, overrides=overrides)
    predicted = estimate_memory(config, schedule, device="cpu")
    stages = stage_weights(config, schedule)
    layout = layout_of(config)
    parts = layout.parts(config.model, schedule.num_stages)
    for rank in found:
        held = schedule.placement.stages(rank["pp_rank"])
        mine = {name: weight for stage in held for name, weight in stages[stage].items()}
        shared, whole = (
            rank_states(
                config.model,
                replace(layout, zero=zero),
                tuple(parts[stage] for stage in held),
                device="cuda",
            ).update
            for zero in (1, 0)
        )
        of_rank = predicted.ranks[rank["pp_rank"]]
        assert rank["updated"] < whole
        assert len(mine) == rank["count"]
        # Of each parameter a number more or less: moments and master, or the average.
        for told, size in (
            (of_rank.parts["optimizer"], rank["optimizer"]),
            (shared, rank["updated"]),
            (of_rank.host, 2 * rank["averages"]),
        ):
            assert abs(told - size) <= 12 * len(mine)
        steps = 4 * sum(weight.matrices for weight in mine.values())
        assert abs(of_rank.staging - rank["saved"]) <= 16 * len(mine) + steps


@pytest.mark.parametrize("overrides", [[], BF16, [("model.num_nextn_predict_layers", "0")]])
@pytest.mark.parametrize("num_stages", [1, 4])
def test_what_a_stage_keeps_is_predicted(overrides: list[tuple[str, str]], num_stages: int) -> None:
    config = load(None, [*overrides, ("data.sequence_length", "64")])
    config = replace(config, mesh=replace(config.mesh, ep=1))
    layout = layout_of(config)
    given = MicroBatch(layout.sequences, layout.length, ep=1)
    for part in layout.parts(config.model, num_stages):
        predicted = stage_activations(
            config.model, storage_of(layout), given, part, padded_heads=True
        )
        kept, waiting = bytes_of_stage(config, part)
        if part.head:
            # Layers are exact; of the losses a few numbers of each token are left out.
            assert predicted.kept.total == pytest.approx(kept, rel=1e-3)
            assert predicted.waiting.total == pytest.approx(waiting, rel=1e-3)
        else:
            assert (predicted.kept.total, predicted.waiting.total) == (kept, waiting)


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


def test_deepseek_v3s_layout_fits_80_gb_with_micro_batches_of_2048_tokens() -> None:
    config = replace(load(None, V3), model=ModelConfig())
    schedule = schedule_of(config)
    estimate = estimate_memory(config, schedule, device="cuda")
    assert set(estimate.chunk_peak) == {17}  # pp + 1, as the paper's table 2
    assert memory_findings(estimate, memory_bytes=80 * GIB, ranks=8) == []
    assert 60 * GIB < estimate.ranks[estimate.worst].total < 75 * GIB
    [host] = memory_findings(estimate, memory_bytes=80 * GIB, ranks=8, host_bytes=100 * GIB)
    assert (host.verdict, "set checkpoint.asynchronous to false" in host.message) == (
        "warning",
        True,
    )
    twice = replace(config, data=replace(config.data, sequence_length=4096))
    [found] = memory_findings(
        estimate_memory(twice, schedule, device="cuda"), memory_bytes=80 * GIB, ranks=8
    )
    assert (found.verdict, found.node) == ("warning", "")  # by no more than what is estimated
    longer = replace(config, data=replace(config.data, sequence_length=8192))
    [found] = memory_findings(
        estimate_memory(longer, schedule, device="cuda"), memory_bytes=80 * GIB, ranks=8
    )
    assert (found.verdict, found.node) == ("bad", "")  # the job's mistake
    assert "a GPU's memory is 80.0 (activations" in found.message
    for size, verdict in ((0, "warning"), (-1, "bad")):
        sure = max(rank.exact for rank in estimate.ranks) + size
        [close] = memory_findings(estimate, memory_bytes=sure, ranks=8, node="n1")
        assert (close.verdict, close.node) == (verdict, "n1")
    assert bad_nodes(decided([close], ["n1"])) == ()
    assert bad_nodes(decided([close], ["n1", "n2"])) == ("n1",)  # whose GPUs are smaller
    # Without ZeRO each of 128 ranks keeps all states, of experts each of the two that have them.
    whole = estimate_memory(
        replace(config, zero=replace(config.zero, stage=0)), schedule, device="cuda"
    )
    ratio = whole.ranks[1].parts["optimizer"] / estimate.ranks[1].parts["optimizer"]
    assert 2 < ratio < 128


def test_on_cpus_a_run_is_refused_only_where_the_whole_machine_is_too_small() -> None:
    config = load(None, SMALL)
    estimate = estimate_memory(config, schedule_of(config), device="cpu")
    needed = 2 * sum(rank.total + rank.staging for rank in estimate.ranks)
    assert memory_findings(estimate, memory_bytes=needed, ranks=4) == []
    [found] = memory_findings(estimate, memory_bytes=needed - 1, ranks=4)
    assert found.verdict == "warning"
    assert "4 ranks take about" in found.message
    sure = 2 * sum(rank.exact for rank in estimate.ranks)
    [found] = memory_findings(estimate, memory_bytes=sure - 1, ranks=4)
    assert (found.verdict, "the machine's memory is" in found.message) == ("bad", True)
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

    def leave(name: str, size: int) -> None:
        there = run.path / name / "step-00000001"
        there.mkdir(parents=True, exist_ok=True)
        (there / "rank00000.safetensors").write_bytes(b"\0" * size)

    leave("checkpoints.previous", 500)  # goes when checkpoints are set aside, and there are none
    assert len(disk_findings(config, 1001)) == 1
    leave("checkpoints", 300)
    assert disk_findings(config, 1100) == []  # goes on, and its older ones go
    assert len(disk_findings(config, 1101)) == 1
    anew = replace(config, checkpoint=CheckpointConfig(keep=2, resume="never"))
    assert disk_findings(anew, 1166) == []
    assert "need 3001 bytes more" in disk_findings(anew, 1167)[0].message
    (run.path / "result.json").touch()  # was finished, so a new one begins
    assert disk_findings(config, 1166) == []
    again = replace(config, checkpoint=CheckpointConfig(keep=2, resume="latest"))
    assert len(disk_findings(again, 1166)) == 1
    leave("checkpoints", 10**6)
    assert "need 3001 bytes more" in disk_findings(again, 3001)[0].message  # before any can go
    off = replace(config, checkpoint=replace(config.checkpoint, enabled=False))
    assert disk_findings(off, 10**9) == []


def test_a_node_that_lacks_the_folder_which_the_launcher_made_is_bad(tmp_path: Path) -> None:
    config = Config(run=RunConfig(folder=str(tmp_path), name="r"))
    assert disk_findings(config, 1) == []
    [found] = disk_findings(config, 1, node="n1", launched=True)
    assert (found.verdict, found.node) == ("bad", "n1")
    assert f"{config.run.path} is not here" in found.message
    assert bad_nodes(decided([found], ["n1", "n2"])) == ("n1",)
    assert status_of(decided([found], ["n1"])) == MISTAKE
    config.run.path.mkdir()
    assert disk_findings(config, 1, node="n1", launched=True) == []


def test_the_smallest_limit_of_the_control_groups_counts(tmp_path: Path) -> None:
    whole = memory_of_machine(tmp_path)  # no such files there
    assert whole > 1 << 20
    (tmp_path / "proc/self").mkdir(parents=True)
    top = tmp_path / "sys/fs/cgroup"
    step = top / "job/step"
    step.mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/job/step\n")
    (step / "memory.max").write_text("max\n")
    assert memory_of_machine(tmp_path) == whole
    (top / "job/memory.max").write_text("1048576\n")
    assert memory_of_machine(tmp_path) == 1 << 20
    (tmp_path / "proc/self/cgroup").write_text("5:cpu,cpuacct:/x\n9:memory:/job\n0::/\n")
    (top / "memory/job").mkdir(parents=True)
    (top / "memory/memory.limit_in_bytes").write_text(f"{2**63 - 4096}\n")
    assert memory_of_machine(tmp_path) == whole
    (top / "memory/job/memory.limit_in_bytes").write_text("4096\n")
    assert memory_of_machine(tmp_path) == 4096


def test_a_folder_that_cannot_be_written_is_refused() -> None:
    if not os.path.isdir("/proc/self"):
        pytest.skip("no file system here that nobody can write to")
    [found] = disk_findings(Config(run=RunConfig(folder="/proc/self/runs")), 1)
    assert found.message.startswith("/proc/self cannot be written: ")
