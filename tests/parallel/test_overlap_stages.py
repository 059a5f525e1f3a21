"""Which stages run phase by phase, and what is told of phases that are wrong."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from counterflow.model import DeepSeekV3
from counterflow.parallel import Chunk, Mesh, MeshShape, Pipeline
from counterflow.parallel.phased import (
    Compute,
    Layer,
    checked_writes,
    inputs_read,
    why_whole,
)
from counterflow.parallel.schedule import build
from counterflow.parallel.schedule.interleaving import Interleaving
from tests import cases_overlap as cases
from tests.cases_training import TINY
from tests.ranks import RankPool


@pytest.mark.parametrize("pp", [1, 2])
def test_overlap_is_compared_over_all_ranks_and_those_that_differ_are_named(
    ranks: RankPool, pp: int
) -> None:
    for rank, told in enumerate(ranks.run(cases.unlike, world=2, pp=pp)):
        assert "given different values of overlap; alike are rank 0; rank 1, and" in told
        assert ("this rank has None" in told) == (rank == 1)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


class Stage(nn.Module):
    """Its phases call the linear layer and pass `Inner` over."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()
        self.asked = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def phases(self, chunk: Chunk) -> list[Layer]:
        self.asked += 1
        attn = Compute("attn", lambda x: (self.inner.linear(x),), ("input0",), ("x",))
        mlp = Compute("mlp", lambda x: (torch.tanh(x),), ("x",), ("y",))
        return [Layer((attn, mlp), "layer 0")]


class Doubled(Stage):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Doubling:
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Mixed(Doubling, Stage):
    """A forward that stands ahead of the phases without being of a subclass."""


class Both(Doubled):
    def phases(self, chunk: Chunk) -> list[Layer]:
        return super().phases(chunk)


class Telling:
    def phases(self, chunk: Chunk) -> list[Layer]:
        return Stage.phases(self, chunk)  # pyright: ignore[reportArgumentType]


class ByMixin(Telling, Stage):
    """Phases that stand ahead of the forward."""


def nothing(*_: Any) -> None:
    """A hook."""


HINDRANCES: dict[str, tuple[Callable[[], Stage], Callable[[Stage], Any], str]] = {
    "subclass": (Doubled, lambda s: None, "Doubled replaces forward, which phases of Stage"),
    "mixin": (Mixed, lambda s: None, "Doubling replaces forward, which phases of Stage"),
    "attribute": (Stage, lambda s: setattr(s, "forward", torch.tanh), "attribute replaces forward"),
    "hook": (Stage, lambda s: s.register_forward_hook(nothing), "it has hooks"),
    "pre-hook": (Stage, lambda s: s.register_forward_pre_hook(nothing), "it has hooks"),
    "backward hook": (Stage, lambda s: s.register_full_backward_hook(nothing), "it has hooks"),
    "backward pre-hook": (
        Stage,
        lambda s: s.register_full_backward_pre_hook(nothing),
        "it has hooks",
    ),
    "hook of a part": (
        Stage,
        lambda s: s.inner.register_forward_hook(nothing),
        "its part inner has hooks",
    ),
    "compiled": (Stage, lambda s: s.compile(backend="eager"), "it was compiled"),
    "compiled part": (
        Stage,
        lambda s: s.inner.compile(backend="eager"),
        "its part inner was compiled",
    ),
}


def pipeline_of(stage: nn.Module, schedule: str = "gpipe", **options: Any) -> Pipeline:
    plan = build(schedule, ranks=1, microbatches=2, **options)
    stages = [stage, *(Stage() for _ in range(plan.num_stages - 1))]
    return Pipeline(stages, plan, Mesh(MeshShape()), lambda y, t: (y - t).square().mean())


@pytest.mark.parametrize("hindrance", HINDRANCES)
def test_a_stage_whose_phases_would_pass_something_over_runs_in_one_piece_and_says_why(
    hindrance: str, caplog: pytest.LogCaptureFixture
) -> None:
    make, change, reason = HINDRANCES[hindrance]
    stage = make()
    change(stage)
    with caplog.at_level(logging.WARNING, logger="counterflow.parallel.plans"):
        pipeline_of(stage)
    (record,) = caplog.records
    assert reason in record.getMessage()
    assert f"stage 0 ({type(stage).__name__}) runs without overlap" in record.getMessage()
    assert not stage.asked


def test_a_subclass_that_replaces_forward_trains_what_it_computes() -> None:
    stage = Doubled()
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    loss = pipeline_of(stage).step(x, y)
    torch.testing.assert_close(loss, (stage(x) - y).square().mean().double())


def test_hooks_of_a_stage_and_of_its_layers_run() -> None:
    stage, seen = Stage(), []
    stage.register_forward_hook(lambda *_: seen.append("stage"))
    stage.inner.register_forward_pre_hook(lambda *_: seen.append("inner"))
    pipeline_of(stage).step(torch.randn(4, 3), torch.randn(4, 3))
    assert sorted(seen) == ["inner", "inner", "stage", "stage"]


@pytest.mark.parametrize("make", [Stage, Both, ByMixin])
def test_phases_that_stand_at_or_ahead_of_forward_are_used(
    make: Callable[[], Stage], caplog: pytest.LogCaptureFixture
) -> None:
    stage = make()
    stage.inner.linear.register_forward_hook(nothing)  # of what phases call
    pipeline_of(stage)
    assert stage.asked
    assert not caplog.records


def test_a_hook_on_a_decoder_layer_keeps_the_model_in_one_piece() -> None:
    model = DeepSeekV3(replace(TINY, num_hidden_layers=2))
    assert why_whole(model) == ""
    model.decoder_layers()[1].mlp.register_forward_hook(nothing)
    assert "its part model.layers.1.mlp has hooks" in why_whole(model)


def test_linears_of_a_phased_stage_without_a_chunk_wait_in_a_split_backward() -> None:
    torch.manual_seed(0)
    stages = [Stage(), Stage()]
    plan = build("zbv", ranks=1, microbatches=2)
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    found: list[list[Tensor]] = []
    for overlap in (None, Interleaving()):
        for stage in stages:
            stage.zero_grad()
        pipeline = Pipeline(
            stages, plan, Mesh(MeshShape()), nn.functional.mse_loss, overlap=overlap
        )
        for runner in pipeline._runners.values():
            live = runner.begin(0, (x.requires_grad_(),), (y,), training=True)
            for number in range(len(live.phases)):
                live.compute(number, runner.computing(live))
            last = runner.loss_fn is not None
            live.seed(() if last else (torch.ones(4, 3),))
            for number in reversed(range(len(live.phases))):
                live.backward(number, loss_scale=1.0, defer=True)
            assert all(parameter.grad is None for parameter in runner.module.parameters())
            live.all_weights()
            runner.discard()
        found.append([p.grad.clone() for s in stages for p in s.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) == 2
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


WRITES = Compute("mlp", lambda: (), (), ("a", "b"))


@pytest.mark.parametrize(
    ("outputs", "words"),
    [
        ((torch.ones(1),), r"returned 1 values; .* \(a, b\)"),
        (torch.ones(2, 3), r"returned a Tensor; return a tuple .* \(a, b\)"),
        ((torch.ones(1), None), "returned a NoneType for 'b'"),
    ],
)
def test_what_a_phase_should_not_return_is_told_with_stage_layer_and_phase(
    outputs: object, words: str
) -> None:
    with pytest.raises(ValueError, match=rf"stage 1, layer 3: phase mlp {words}"):
        checked_writes(WRITES, outputs, "stage 1, layer 3")


class Wrong(Stage):
    def __init__(self, last: Any = None, name: str = "mlp") -> None:
        super().__init__()
        self.last, self.name = last, name

    def phases(self, chunk: Chunk) -> list[Layer]:
        (layer,) = super().phases(chunk)
        attn, mlp = layer.phases
        assert isinstance(mlp, Compute)
        return [Layer((attn, replace(mlp, run=lambda x: self.last, name=self.name)), "layer 0")]


def test_a_last_phase_that_returns_something_else_is_told_too() -> None:
    pipeline = pipeline_of(Wrong(last=torch.ones(2, 3)))
    with pytest.raises(
        ValueError, match=r"stage 0 \(Wrong\), layer 0: phase mlp returned a Tensor"
    ):
        pipeline.step(torch.ones(4, 3), torch.ones(4, 3))


def test_two_phases_of_one_name_in_a_layer_are_refused() -> None:
    with pytest.raises(ValueError, match=r"stage 0 \(Wrong\): layer 0 has two phases called attn"):
        pipeline_of(Wrong(name="attn"))


def test_a_stage_may_read_some_of_its_inputs_alone() -> None:
    def phase(*reads: str) -> Layer:
        return Layer((Compute("mlp", lambda *x: x, reads, ("y",)),))

    assert inputs_read([phase("input1")]) == 2
    assert inputs_read([phase("input10"), phase("input2", "input02", "y")]) == 11
    assert inputs_read([phase("y")]) == 0
