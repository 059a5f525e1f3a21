"""The phases of a model's kinds of layers, timed on this machine as a run executes them.

A round runs, on every rank at once, on a stage with one layer of each kind and on one with the
head: a chunk phase by phase, one after another; a forward; a pair, that chunk's backward beside the
next forward; and a backward. What computes is timed inside of these, so that the other lane, the
other ranks and their use of memory have their effect. What communicates is timed by itself, waiting
for the slowest rank included, and stretched so that the lanes come to the forward or pair as it was
measured (`parallel.simulate.phases.compose`): in a forward shared experts hide some of it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..comm.collectives import gather, sum_over
from ..comm.dispatch import Dispatcher
from ..model import DeepSeekV3, ModelConfig, build_parts
from ..model.stages import Part as ModelPart
from ..parallel.live import LiveChunk
from ..parallel.mesh import Mesh
from ..parallel.overlap import Part, Plan, execute
from ..parallel.phased import Communicate
from ..parallel.schedule.interleaving import DEFAULT_INTERLEAVING
from ..parallel.stage import StageRunner
from ..predict.layout import Kind
from . import fp8
from .config import Config
from .measure_fit import COMMUNICATING, PhaseResults, Round, fitted, quiet


class Taken(NamedTuple):
    """One phase of one layer, timed: where it is, between which marks of the clock."""

    kind: Kind
    phase: str
    began: Any
    ended: Any


class Clock:
    """Marks on the time line of what computes: the host's on the CPU, a stream's on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def mark(self) -> Any:
        """Now."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, began: Any, ended: Any) -> float:
        """Between two marks; `settle` has to come first."""
        return began.elapsed_time(ended) if self._cuda else (ended - began) * 1e3

    def settle(self) -> None:
        """Wait until the device has done all that it was given."""
        if self._cuda:
            torch.cuda.synchronize()


class _Timed:
    """A chunk whose computing phases are timed; all else is the chunk's."""

    def __init__(self, live: LiveChunk, around: Callable[[int, str], Any]) -> None:
        self._live, self._around = live, around

    def __getattr__(self, name: str) -> Any:
        return getattr(self._live, name)

    def compute(self, number: int, context: AbstractContextManager[object] | None = None) -> None:
        with self._around(number, "F"):
            self._live.compute(number, context)

    def backward(self, number: int, *, loss_scale: float, defer: bool) -> None:
        with self._around(number, "B"):
            self._live.backward(number, loss_scale=loss_scale, defer=defer)

    def weights(self, number: int) -> None:
        with self._around(number, "W"):
            self._live.weights(number)


def measured_model(model: ModelConfig) -> ModelConfig:
    """The model with one layer of each kind that it has, and no multi-token prediction."""
    dense = min(model.first_k_dense_replace, model.num_hidden_layers)
    kinds = (dense > 0) + (model.num_hidden_layers > dense)
    return replace(
        model,
        num_hidden_layers=kinds,
        first_k_dense_replace=int(dense > 0),
        num_nextn_predict_layers=0,
    )


class PhaseTimer:
    """Times phases on this rank, one of several that do the same at once.

    Args:
        config: of a run: its model, micro-batch, formats and dispatcher.
        mesh: of all ranks that measure, one stage each.
        experts: the dispatcher of the run.
        device: where this rank computes.
    """

    def __init__(
        self, config: Config, mesh: Mesh, experts: Dispatcher[Any], device: torch.device
    ) -> None:
        self.model = measured_model(config.model)
        self._mesh, self._device, self._clock = mesh, device, Clock(device)
        self._local = mesh.shape.ep == 1
        last = self.model.num_hidden_layers
        body, head = ModelPart(range(last), True, False), ModelPart(range(last, last), False, True)

        def build(model: ModelConfig, part: ModelPart) -> DeepSeekV3:
            return build_parts(
                model,
                [part],
                experts,
                dtype=getattr(torch, config.train.dtype),
                device=device,
                recipe=fp8.make_recipe(config),
                recompute=fp8.make_recompute(config),
            )[0]

        heads = [self.model]
        if config.model.num_nextn_predict_layers:
            heads.append(replace(self.model, num_nextn_predict_layers=1))
        self._body = _Runner(0, build(self.model, body), head=False)
        self._heads = [_Runner(1, build(model, head), head=True) for model in heads]
        generator = torch.Generator().manual_seed(mesh.rank)
        shape = config.train.sequences, config.data.sequence_length + 1
        tokens = torch.randint(0, config.model.vocab_size, shape, generator=generator).to(device)
        self._inputs, self._targets = tokens[:, :-1], tokens[:, 1:]
        self.rounds: list[Round] = []
        self._now = Round()

    def warm_up(self) -> None:
        """A round that does not count: buffers, connections and compiled code are made in it."""
        self.round()
        self.rounds.pop()

    def round(self) -> None:
        """One sample of each; all ranks have to do so together."""
        self._now = Round()
        self._apart()
        first = self._run("alone", "F", forward=0, backward=None)
        grads = self._head(first)
        self._run("paired", "pair", forward=1, backward=0, grads=grads)
        self._run("alone", "B", forward=None, backward=1, grads=grads)
        self.rounds.append(self._now)

    def _together(self) -> None:
        """Have all ranks begin at once."""
        start = torch.zeros(1, device=self._device)
        sum_over(start, self._mesh.world_group, "measuring phases", board=self._mesh.waits)
        self._clock.settle()

    @contextmanager
    def _around(self, taken: list[Taken], kind: Kind, phase: str) -> Iterator[None]:
        computed, wall = time.process_time(), time.perf_counter()
        began = self._clock.mark()
        yield
        taken.append(Taken(kind, phase, began, self._clock.mark()))
        if phase not in COMMUNICATING:
            self._now.computed += time.process_time() - computed
            self._now.wall += time.perf_counter() - wall

    def _add(self, context: str, taken: Sequence[Taken]) -> dict[tuple[Kind, str], float]:
        """What is known of a context of this round, with what was taken."""
        found = self._now.phases.setdefault(context, {})
        for kind, phase, began, ended in taken:
            found[kind, phase] = found.get((kind, phase), 0.0) + self._clock.ms(began, ended)
        return found

    def _run(
        self,
        context: str,
        name: str,
        *,
        forward: int | None,
        backward: int | None,
        grads: tuple[Tensor | None, ...] = (),
    ) -> tuple[Tensor, ...]:
        """A forward, a backward or both as a run executes them; what the forward gave."""
        runner, taken, outputs = self._body, list[Taken](), list[tuple[Tensor, ...]]()

        def timed(live: LiveChunk) -> LiveChunk:
            def around(number: int, direction: str) -> AbstractContextManager[None]:
                kind, phase = runner.place(number)
                return self._around(taken, kind, f"{phase}({direction})")

            return cast(LiveChunk, _Timed(live, around))

        def begin_backward() -> LiveChunk:
            assert backward is not None
            live = runner.stage.live(backward)
            live.seed(grads)
            return timed(live)

        ahead = behind = None
        if forward is not None:
            number = forward
            ahead = Part(
                lambda: timed(runner.begin(number, (self._inputs,), None)),
                lambda live: outputs.append(runner.stage.outcome(live)[0]),
            )
        if backward is not None:
            behind = Part(begin_backward, lambda live: live.input_grads())
        plan = runner.plan(forward is not None, backward is not None)
        self._together()
        began = self._clock.mark()
        execute(plan, ahead, behind)
        ended = self._clock.mark()
        self._clock.settle()
        if backward is not None:
            runner.stage.end_backward(backward)
        self._add(context, taken)
        self._now.totals[name] = self._clock.ms(began, ended)
        return outputs[0] if outputs else ()

    def _head(self, hidden: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        """Time the head, and with it multi-token prediction; the gradient of its input."""
        grads: tuple[Tensor | None, ...] = ()
        kinds: tuple[Kind, ...] = ("head", "mtp")
        for kind, runner in zip(kinds, self._heads, strict=False):
            given = tuple(x.detach().requires_grad_() for x in hidden)
            taken: list[Taken] = []
            self._together()
            live = runner.begin(0, given, (self._targets,))
            with self._around(taken, kind, "mlp(F)"):
                live.compute(0)
            runner.stage.outcome(live)
            with self._around(taken, kind, "mlp(B)"):
                live.backward(0, loss_scale=1.0, defer=True)
            grads = grads or live.input_grads()
            with self._around(taken, kind, "mlp(W)"):
                live.weights(0)
            self._clock.settle()
            runner.stage.end_backward(0)
            found = self._add("alone", taken)
            if kind == "mtp":  # beyond the head
                for phase in ("mlp(F)", "mlp(B)", "mlp(W)"):
                    found[kind, phase] = max(0.0, found[kind, phase] - found["head", phase])
        return grads

    def _apart(self) -> None:
        """A chunk phase by phase, each after the other, for what communicates."""
        runner, taken = self._body, list[Taken]()
        self._together()
        live = runner.begin(0, (self._inputs,), None)
        for number in range(len(live.phases)):
            kind, phase = runner.place(number)
            if isinstance(live.phases[number], Communicate):
                with self._around(taken, kind, f"{phase}(F)"):
                    live.prepare(number)
                    live.finish(number, live.start(number))
            else:
                live.compute(number)
        outputs, _ = runner.stage.outcome(live)
        live.seed(tuple(torch.ones_like(x) for x in outputs))
        for number in reversed(range(len(live.phases))):
            kind, phase = runner.place(number)
            if isinstance(live.phases[number], Communicate):
                with self._around(taken, kind, f"{phase}(B)"):
                    live.finish_backward(number, live.start_backward(number))
            else:
                live.backward(number, loss_scale=1.0, defer=True)
                live.weights(number)
        self._clock.settle()
        runner.stage.end_backward(0)
        self._add("apart", taken)

    def results(self) -> PhaseResults:
        """What all rounds on all ranks have found; a collective of them."""
        waits, world = self._mesh.waits, self._mesh.world_group
        shares = gather([r.without_core for r in self.rounds], world, "cores", board=waits)
        rounds = quiet(self.rounds, [max(of) for of in zip(*shares, strict=True)])
        median = statistics.median
        mine = (
            {
                context: {key: median(r.phases[context][key] for r in rounds) for key in of}
                for context, of in rounds[0].phases.items()
            },
            {name: median(r.totals[name] for r in rounds) for name in rounds[0].totals},
        )
        told = gather(mine, world, "phases' times", board=waits)
        phases = {
            context: {key: statistics.fmean(rank[0][context][key] for rank in told) for key in of}
            for context, of in mine[0].items()
        }
        totals = {name: statistics.fmean(rank[1][name] for rank in told) for name in mine[1]}
        return fitted(phases, totals, local=self._local)


class _Runner:
    """One stage that is measured."""

    def __init__(self, index: int, model: DeepSeekV3, *, head: bool) -> None:
        # Every backward is split where it can be, as the weight gradients are timed apart.
        loss = model.loss if head else None
        self.stage = StageRunner(index, model, loss, frozenset({0, 1}), cut=True)
        self._model, self._head = model, head
        layers, wiring = self.stage.outline()
        self._outline = layers, wiring
        self._places: list[tuple[Kind, str]] = []
        for layer in layers:
            self._places += [self._place(layer.label, phase.name) for phase in layer.phases]

    def _place(self, label: str, phase: str) -> tuple[Kind, str]:
        """The kind of layer, and the phase of simulation, that a phase of a stage counts as."""
        if self._head:
            return "head", "mlp"
        if phase == "embed":
            return "embedding", "mlp"
        config = self._model.config
        index = config.num_hidden_layers - 1  # what follows the last layer joins its results
        if phase != "output":
            index = int(label.rpartition(" ")[2])
        kind: Kind = "moe" if config.is_moe(index) else "dense"
        return kind, {"shared": "mlp", "output": "attn"}.get(phase, phase)

    def place(self, number: int) -> tuple[Kind, str]:
        """Kind and phase of a phase by its number in the chunk."""
        return self._places[number]

    def begin(
        self, microbatch: int, inputs: tuple[Tensor, ...], targets: tuple[Tensor, ...] | None
    ) -> LiveChunk:
        """A new chunk for training."""
        return self.stage.begin(microbatch, inputs, targets, training=True)

    def plan(self, forward: bool, backward: bool) -> Plan:
        """How such a step is executed."""
        ahead = self._outline if forward else None
        return Plan.of(DEFAULT_INTERLEAVING, ahead, self._outline if backward else None)
