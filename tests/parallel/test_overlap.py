"""Phase by phase, a step gives the same numbers as in one piece, and communication rides beside."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from counterflow.parallel import Chunk, Mesh, MeshShape, Pipeline
from counterflow.parallel.live import LiveChunk
from counterflow.parallel.overlap import Part, Plan, execute, in_turn
from counterflow.parallel.phased import Communicate, Compute, Layer, Wiring
from counterflow.parallel.schedule import build
from counterflow.parallel.schedule.interleaving import (
    PUBLISHED_ORDER,
    Interleaving,
    InterleavingError,
)
from tests import cases_overlap as cases
from tests.ranks import RankPool


@pytest.mark.parametrize(
    ("schedule", "pp", "ep", "options"),
    [
        pytest.param("dualpipe", 2, 2, {}, id="dualpipe"),
        pytest.param("dualpipe", 2, 2, {"layers": 5, "shared": 0}, id="uneven, none shared"),
        pytest.param("dualpipev", 2, 2, {"order": cases.OTHER_ORDER}, id="another order"),
        pytest.param("dualpipev", 1, 4, {"way": "two_hop", "nodes": (0, 0, 1, 1)}, id="two_hop"),
        pytest.param("dualpipev", 2, 2, {"way": "flat"}, id="flat"),
        pytest.param("1f1b", 2, 2, {"dtype": torch.bfloat16}, id="no pairs, bf16"),
        pytest.param("1f1b", 1, 2, {"world": 2}, id="embedding and head in one stage"),
        pytest.param("zbv", 2, 2, {"layers": 6}, id="split backwards"),
        pytest.param(
            "dualpipe",
            2,
            2,
            {"fp8": True, "payload": "fp8", "dtype": torch.bfloat16, "recompute": True, "steps": 1},
            id="fp8, recomputation",
        ),
    ],
)
def test_training_with_overlap_gives_the_same_bits(
    ranks: RankPool, schedule: str, pp: int, ep: int, options: dict[str, Any]
) -> None:
    options = {"world": 4, **options}
    for found in ranks.run(cases.with_and_without, schedule=schedule, pp=pp, ep=ep, **options):
        assert found["differing"] == []
        assert found["compared"] > 50


@pytest.mark.parametrize("version", ["v1", "v2 over nodes"])
def test_deep_ep_overlaps_to_the_same_bits(ranks: RankPool, version: str) -> None:
    for found in ranks.run(cases.over_deep_ep, world=4, version=version):
        assert found["differing"] == []


def test_ranks_that_were_told_different_things_all_refuse(ranks: RankPool) -> None:
    for told in ranks.run(cases.unlike, world=2):
        assert "given different values of overlap" in told


@pytest.mark.parametrize("overlap", [None, Interleaving()], ids=["one piece", "phases"])
def test_ranks_that_train_different_parameters_all_refuse(
    ranks: RankPool, overlap: Interleaving | None
) -> None:
    for told in ranks.run(cases.unlike_needs, world=2, overlap=overlap):
        assert "need a gradient" in told


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_phase_by_phase_a_stage_keeps_what_it_keeps_in_one_piece(
    fp8: bool, recompute: bool
) -> None:
    options = {"fp8": fp8, "recompute": recompute}
    assert cases.kept(True, **options) == cases.kept(False, **options)


# One process, with exchanges that log when they are started and finished.


@dataclass
class Log:
    lines: list[str] = field(default_factory=list)

    def add(self, line: str) -> None:
        self.lines.append(line)


@dataclass
class Doubling:
    """Sends nothing: what arrives is twice what was sent, and gradients likewise."""

    name: str
    log: Log
    waits_on_host: bool = False
    tensors: tuple[Tensor, ...] = ()

    def prepare(self, tensors: tuple[Tensor, ...], needs: tuple[bool, ...]) -> None:
        self.log.add(f"prepare {self.name}(F)")
        self.tensors = tensors

    def start(self) -> Started:
        return Started(f"{self.name}(F)", self.log, tuple(2 * x for x in self.tensors))

    def start_backward(self, grads: tuple[Tensor, ...], needs: tuple[bool, ...]) -> Started:
        assert all(needs)
        return Started(f"{self.name}(B)", self.log, tuple(2 * g for g in grads))


class Started:
    def __init__(self, name: str, log: Log, result: tuple[Tensor, ...]) -> None:
        log.add(f"start {name}")
        self._name, self._log, self._result = name, log, result

    def finish(self) -> tuple[Tensor, ...]:
        self._log.add(f"finish {self._name}")
        return self._result


class Stage(nn.Module):
    """Two layers whose dispatch and combine double; its forward is the same in one piece."""

    def __init__(self, log: Log, *, waits: bool = False, reads: str = "sent") -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(3, 3) for _ in range(4))
        self.log, self.waits, self.reads = log, waits, reads

    def forward(self, x: Tensor, chunk: Chunk) -> Tensor:
        for layer in range(2):
            h = torch.tanh(x @ self.weights[2 * layer])
            routed = 2 * torch.tanh(2 * h @ self.weights[2 * layer + 1])
            x = x + h + routed
        return x

    def phases(self, chunk: Chunk) -> list[Layer]:
        layers: list[Layer] = []
        reads: tuple[str, ...] = ("input0",)
        for number in range(2):
            first, second = self.weights[2 * number], self.weights[2 * number + 1]
            layers.append(Layer(self._phases(first, second, reads), f"layer {number}"))
            reads = ("hidden", "sent", "routed")
        layers.append(Layer((Compute("output", lambda x, h, r: (x + h + r,), reads, ("y",)),)))
        return layers

    def _phases(self, first: Tensor, second: Tensor, reads: tuple[str, ...]) -> tuple[Any, ...]:
        log = self.log
        dispatch = Doubling("dispatch", log, self.waits)

        def attn(*given: Tensor) -> tuple[Tensor, ...]:
            log.add("attn(F)")
            x = given[0] if len(given) == 1 else given[0] + given[1] + given[2]
            return x * 1, torch.tanh(x @ first)

        def mlp(rows: Tensor) -> tuple[Tensor, ...]:
            log.add("mlp(F)")
            return (torch.tanh(rows @ second),)

        return (
            Compute("attn", attn, reads, ("hidden", "sent")),
            Communicate("dispatch", dispatch, (self.reads,), ("rows",)),
            Compute("mlp", mlp, ("rows",), ("out",)),
            Communicate("combine", Doubling("combine", log), ("out",), ("routed",)),
        )


def run(stage: Stage, interleaving: Interleaving | None, log: Log) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of a pipeline of one rank with two such stages and pairs."""
    torch.manual_seed(0)
    stages = [stage, Stage(log)]
    for module in stages:
        for weight in module.weights:
            nn.init.normal_(weight)
    plan = build("dualpipev", ranks=1, microbatches=4)
    pipeline = Pipeline(
        stages, plan, Mesh(MeshShape()), lambda y, t: (y - t).square().mean(), overlap=interleaving
    )
    loss = pipeline.step(torch.randn(8, 3), torch.randn(8, 3))
    grads = [p.grad for module in stages for p in module.parameters()]
    return loss, [g for g in grads if g is not None]


def test_a_model_of_someone_else_overlaps_by_telling_its_phases() -> None:
    quiet, log = Log(), Log()
    loss, grads = run(Stage(quiet), None, quiet)
    other, others = run(Stage(log), Interleaving(), log)
    assert not quiet.lines  # in one piece, no phase is asked for
    assert torch.equal(loss, other)
    assert len(grads) == len(others) == 8
    assert all(torch.equal(a, b) for a, b in zip(grads, others, strict=True))
    assert log.lines.count("start combine(B)") == log.lines.count("finish combine(B)") == 16


def pair(log: Log, order: Interleaving, *, waits: bool = False, reads: str = "sent") -> list[str]:
    """The log of one pair of chunks of two stages."""
    forward, backward = Stage(log, waits=waits, reads=reads), Stage(log)
    parts: list[LiveChunk] = []
    for stage, name in ((forward, "F"), (backward, "B")):
        layers = stage.phases(Chunk())
        wiring = Wiring.of(layers, 1, name)
        parts.append(LiveChunk(Chunk(), layers, wiring, (torch.ones(2, 3, requires_grad=True),)))
    of = [(part.layers, part.wiring) for part in parts]
    alone = Plan.of(order, of[1], None)
    execute(alone, Part(lambda: parts[1], lambda _: None), None)
    parts[1].seed((torch.ones(2, 3),))
    log.lines.clear()
    plan = Plan.of(order, of[0], of[1])
    one = Part(lambda: parts[0], lambda _: log.add("output"))

    def gradient(live: LiveChunk) -> None:
        (grad,) = live.input_grads()
        assert grad is not None
        log.add(f"gradient {list(grad.shape)}")

    other = Part(lambda: parts[1], gradient)
    in_turn(other, one)
    execute(plan, one, other)
    return log.lines


def test_communication_starts_when_it_can_and_ends_when_it_must() -> None:
    lines = pair(Log(), Interleaving())
    expected = [
        "start combine(B)",
        "attn(F)",
        "prepare dispatch(F)",
        "start dispatch(F)",
        "finish combine(B)",
        "start dispatch(B)",
        "finish dispatch(F)",
        "mlp(F)",
        "prepare combine(F)",
        "start combine(F)",
        "finish dispatch(B)",
    ]
    assert lines[: len(expected)] == expected
    # The next layer's combine(B) needs attn(B) alone, and its attn(F) needs combine(F).
    rest = lines[len(expected) :]
    assert rest[:3] == ["start combine(B)", "finish combine(F)", "attn(F)"]
    assert lines[-3:] == ["gradient [2, 3]", "finish combine(F)", "output"]


def test_what_makes_the_host_wait_is_prepared_early_and_started_in_its_place() -> None:
    lines = pair(Log(), Interleaving(), waits=True)
    at = {line: lines.index(line) for line in lines}
    assert at["attn(F)"] + 1 == at["prepare dispatch(F)"]
    assert at["prepare dispatch(F)"] < at["finish combine(B)"] < at["start dispatch(F)"]


def test_an_order_that_breaks_a_dependency_is_refused_with_both_names() -> None:
    wrong = list(PUBLISHED_ORDER)
    wrong.remove("attn(F)")
    wrong.insert(5, "attn(F)")
    with pytest.raises(
        InterleavingError, match=r"dispatch\(F\) layer 0 comes before attn\(F\) layer 0, which"
    ):
        run(Stage(Log()), Interleaving(pair=tuple(wrong)), Log())


def test_a_phase_that_reads_what_nobody_wrote_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"stage 0 \(Stage\): phase dispatch of layer 0 reads 'no'"
    ):
        run(Stage(Log(), reads="no"), Interleaving(), Log())


class Ends(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x

    def phases(self, chunk: Chunk) -> list[Layer]:
        return [Layer((Communicate("send", Doubling("send", Log()), ("input0",), ("y",)),))]


def test_a_stage_that_ends_with_communication_is_refused() -> None:
    plan = build("gpipe", ranks=1, microbatches=1)
    with pytest.raises(ValueError, match="the last of its phases must be one that computes"):
        Pipeline([Ends()], plan, Mesh(MeshShape()), lambda y, t: y.sum())


def test_tensors_between_phases_are_let_go_when_their_last_reader_has_them() -> None:
    stage = Stage(Log())
    layers = stage.phases(Chunk(training=False))
    live = LiveChunk(Chunk(training=False), layers, Wiring.of(layers, 1, "s"), (torch.ones(2, 3),))
    plan = Plan.of(Interleaving(), (layers, live.wiring), None)
    execute(plan, Part(lambda: live, lambda _: None), None)
    assert len(live.results) == 1
    assert live._values == {}
    assert live._ran == {}


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ((torch.ones(2),), r"stage 0, layer 0: phase attn returned 1 values; return a tuple"),
        (torch.ones(2), r"stage 0, layer 0: phase attn returned a Tensor; return a tuple"),
        ((torch.ones(2), None), r"phase attn returned a NoneType for 'sent'"),
    ],
)
def test_a_phase_that_returns_something_else_is_named(returned: Any, words: str) -> None:
    class Wrong(Stage):
        def phases(self, chunk: Chunk) -> list[Layer]:
            first, *others = super().phases(chunk)
            attn = replace(first.phases[0], run=lambda *_: returned)
            return [replace(first, phases=(attn, *first.phases[1:])), *others]

        def forward(self, x: Tensor, chunk: Chunk) -> Tensor:
            return super().forward(x, chunk)

    with pytest.raises(ValueError, match=words):
        run(Wrong(Log()), Interleaving(), Log())
