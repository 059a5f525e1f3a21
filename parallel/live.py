"""One chunk between its forward and the end of its backward, phase by phase.

Between phases autograd is cut: each computing phase has a graph of its own, from what it reads to
what it writes, and its backward gives the gradients of what it reads. A tensor that several phases
read gets the sum of their gradients, the last reader's first, as autograd in one piece adds them up
if each reads it once.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .chunk import Chunk, WeightGrads
from .phased import (
    Communicate,
    Compute,
    Exchange,
    Layer,
    Phase,
    Started,
    Tensors,
    Wiring,
    checked_writes,
)

_Slot = tuple[int, int]  # (phase, place among what it writes)


class _Enter(torch.autograd.Function):
    """Where a phase's graph begins: hands on tensors, and keeps their gradients and nothing else.

    A leaf would hold its tensor until the backward, whether the phase needs it then or not.
    """

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, grads: list[Tensor | None], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        del anchor  # needs a gradient, so that what is returned does
        ctx.set_materialize_grads(False)
        ctx.grads = grads
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
        ctx.grads[:] = grads
        return (None, None, *(None for _ in grads))


def _entered(values: Tensors) -> tuple[Tensors, list[Tensor | None]]:
    """The tensors cut from autograd, and where the gradients of those that need one will be."""
    wanted = [x for x in values if x is not None and x.requires_grad]
    grads: list[Tensor | None] = [None] * len(wanted)
    given = iter(())
    if wanted:
        anchor = torch.empty(0, requires_grad=True)
        given = iter(_Enter.apply(anchor, grads, *(x.detach() for x in wanted)))
    cut = (x if x is None else next(given) if x.requires_grad else x.detach() for x in values)
    return tuple(cut), grads


class _Ran:
    """What a phase that computes keeps for its backward.

    Attributes:
        needed: which of the tensors that it reads need a gradient.
        grads: theirs, after the backward.
        outputs: where its graph ends.
        losses: that it added.
        weight_grads: that its backward left.
    """

    def __init__(
        self,
        needed: tuple[bool, ...],
        grads: list[Tensor | None],
        outputs: tuple[GradientEdge | None, ...],
    ) -> None:
        self.needed = needed
        self.grads = grads
        self.outputs = outputs
        self.losses: list[Tensor] = []
        self.weight_grads = WeightGrads()


class LiveChunk:
    """A chunk's phases and what stands between them.

    Args:
        chunk: handed to the phases.
        layers: of this chunk.
        wiring: of these layers.
        inputs: of the stage; those that require grad get a gradient.

    Attributes:
        results: what the last phase wrote, once it ran; detached, `requires_grad` telling which
            want a gradient.
    """

    def __init__(
        self, chunk: Chunk, layers: Sequence[Layer], wiring: Wiring, inputs: Tensors
    ) -> None:
        self.chunk = chunk
        self.layers = layers
        self.phases: tuple[Phase, ...] = tuple(p for layer in layers for p in layer.phases)
        self.wiring = wiring
        self.results: tuple[Tensor, ...] = ()
        self._values: dict[_Slot, Tensor | None] = {(-1, i): x for i, x in enumerate(inputs)}
        self._num_inputs = len(inputs)
        self._unread = {slot: len(readers) for slot, readers in wiring.readers.items()}
        self._ran: dict[int, _Ran] = {}
        self._needs: dict[int, tuple[bool, ...]] = {}
        self._shapes: dict[int, list[tuple[torch.Size, torch.dtype, torch.device]]] = {}
        self._grads: dict[_Slot, dict[int, Tensor]] = {}

    def _where(self, number: int) -> str:
        label = self.layers[self.wiring.place(number)[0]].label
        return f"stage {self.chunk.stage}" + (f", {label}" if label else "")

    def number(self, layer: int, phase: int) -> int:
        """The phase's number, counted through all layers."""
        return self.wiring.first[layer] + phase

    # Forward

    def compute(self, number: int, context: AbstractContextManager[object] | None = None) -> None:
        """Run the forward of a phase that computes, within `context`."""
        phase = self.phases[number]
        assert isinstance(phase, Compute)
        training = self.chunk.training
        values = self._read(number)
        needed = tuple(x is not None and x.requires_grad for x in values)
        seen = len(self.chunk.losses)
        with torch.set_grad_enabled(training), context or nullcontext():
            given, grads = _entered(values) if training else (values, [])
            del values
            outputs = checked_writes(phase, phase.run(*given), self._where(number))
            del given
        detached = tuple(o.detach().requires_grad_(o.requires_grad) for o in outputs)
        if training:
            edges = tuple(get_gradient_edge(o) if o.requires_grad else None for o in outputs)
            ran = _Ran(needed, grads, edges)
            ran.losses = [loss for _, loss in self.chunk.losses[seen:] if loss.requires_grad]
            self._ran[number] = ran
        if number == len(self.phases) - 1:
            self.results = detached
        self._write(number, detached)

    def exchange(self, number: int) -> Exchange:
        """Of a phase that communicates."""
        phase = self.phases[number]
        assert isinstance(phase, Communicate)
        return phase.exchange

    def prepare(self, number: int) -> None:
        """Hand a phase that communicates what it reads."""
        tensors = self._read(number)
        assert all(x is not None for x in tensors), "a phase that communicates was handed None"
        present = tuple(x for x in tensors if x is not None)
        training = self.chunk.training
        self._needs[number] = tuple(training and x.requires_grad for x in present)
        self.exchange(number).prepare(tuple(x.detach() for x in present), self._needs[number])

    def start(self, number: int) -> Started[tuple[Tensor, ...]]:
        """Start the forward of a phase that communicates and has been prepared."""
        return self.exchange(number).start()

    def finish(self, number: int, started: Started[tuple[Tensor, ...]]) -> None:
        """Wait for the forward of a phase that communicates."""
        outputs = checked_writes(self.phases[number], started.finish(), self._where(number))
        if self.chunk.training:
            wanted = any(self._needs[number])
            for output in outputs:
                output.requires_grad_(wanted and output.is_floating_point())
            self._shapes[number] = [(o.shape, o.dtype, o.device) for o in outputs]
        self._write(number, outputs)

    def _read(self, number: int) -> Tensors:
        """What a phase reads; a tensor is let go when its last reader has it."""
        values = tuple(self._values[source] for source in self.wiring.sources[number])
        for source in self.wiring.sources[number]:
            self._unread[source] -= 1
            if not self._unread[source]:
                del self._values[source]
        return values

    def _write(self, number: int, outputs: Sequence[Tensor]) -> None:
        for place, output in enumerate(outputs):
            if self._unread.get((number, place)):
                self._values[number, place] = output

    # Backward

    def seed(self, grads: Tensors) -> None:
        """Give the gradients of `results`; None where there is none."""
        last = len(self.phases) - 1
        for place, grad in enumerate(grads):
            if grad is not None:
                self._grads[last, place] = {last + 1: grad}

    def backward(self, number: int, *, loss_scale: float, defer: bool) -> None:
        """Run the backward of a phase that computes.

        Args:
            number: of the phase.
            loss_scale: weight of this chunk's losses in the step's loss.
            defer: leave weight gradients to `weights`.
        """
        ran = self._ran[number]
        roots: list[Tensor | GradientEdge] = []
        seeds: list[Tensor | None] = []
        for place, edge in enumerate(ran.outputs):
            grad = self._take_grad((number, place))
            if edge is not None and grad is not None:
                roots.append(edge)
                seeds.append(grad)
        for loss in ran.losses:
            roots.append(loss)
            seeds.append(torch.full_like(loss, loss_scale))
        ran.outputs, ran.losses = (), []
        if roots:
            queue = self.chunk.weight_grads
            queue.deferring = defer
            torch.autograd.backward(roots, seeds)  # pyright: ignore[reportArgumentType]
            queue.deferring = False
            ran.weight_grads = queue.take()
        grads = iter(ran.grads)
        for source, needed in zip(self.wiring.sources[number], ran.needed, strict=True):
            grad = next(grads) if needed else None
            if grad is not None:
                self._give_grad(source, number, grad)
        ran.grads = []

    def weights(self, number: int) -> None:
        """Compute the weight gradients that the backward of a phase left."""
        self._ran[number].weight_grads.run()

    def all_weights(self) -> None:
        """Compute all weight gradients that backwards left, in the order of these backwards."""
        for number in reversed(range(len(self.phases))):
            if number in self._ran:
                self.weights(number)

    def start_backward(self, number: int) -> Started[Tensors] | None:
        """Start the backward of a phase that communicates; None if nobody wants its gradients."""
        grads: list[Tensor] = []
        for place, (shape, dtype, device) in enumerate(self._shapes.pop(number)):
            grad = self._take_grad((number, place))
            if grad is None:
                grad = torch.zeros(shape, dtype=dtype, device=device)
            grads.append(grad)
        needs = self._needs[number]
        if not any(needs):
            return None
        return self.exchange(number).start_backward(tuple(grads), needs)

    def finish_backward(self, number: int, started: Started[Tensors] | None) -> None:
        """Wait for the backward of a phase that communicates."""
        if started is None:
            return
        needs, sources = self._needs.pop(number), self.wiring.sources[number]
        for source, grad, needed in zip(sources, started.finish(), needs, strict=True):
            if needed and grad is not None:
                self._give_grad(source, number, grad)

    def input_grads(self) -> Tensors:
        """The gradient of each input of the stage; None where there is none."""
        return tuple(self._take_grad((-1, place)) for place in range(self._num_inputs))

    def _give_grad(self, source: _Slot, reader: int, grad: Tensor) -> None:
        given = self._grads.setdefault(source, {})
        given[reader] = given[reader] + grad if reader in given else grad

    def _take_grad(self, slot: _Slot) -> Tensor | None:
        given = self._grads.pop(slot, {})
        total = None
        for reader in sorted(given, reverse=True):
            total = given[reader] if total is None else total + given[reader]
        return total
