"""What a stage tells of itself so that its communication can hide behind another chunk's compute.

A stage that has a method `phases` (see `Phased`) is a sequence of layers, each cut into phases that
compute and phases that communicate. What one phase hands to another are named tensors:

    phase      reads                     writes
    attn       hidden                    residual, x, weights
    dispatch   x, weights                rows, row_weights              communicates
    shared     x                         local
    mlp        rows, row_weights         out
    combine    out                       routed                         communicates

Autograd is cut between phases: a computing phase is differentiated by itself, one that communicates
brings its own backward. A phase may read what any phase before it wrote, and a name that is written
again means the newer tensor from then on.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias, TypeVar

from torch import Tensor

from .chunk import Chunk
from .schedule.interleaving import PhaseOutline

Tensors: TypeAlias = tuple[Tensor | None, ...]
Run: TypeAlias = Callable[..., tuple[Tensor, ...]]
T_co = TypeVar("T_co", covariant=True)


class Started(Protocol[T_co]):
    """Something under way."""

    def finish(self) -> T_co:
        """Wait within a limit and return the result; called once.

        On a GPU it is the current stream that waits, not the host.
        """
        ...


class Exchange(Protocol):
    """What one phase of one layer communicates, for one chunk.

    Every call is a collective: all ranks of the group make the same ones in the same order. What is
    handed in does not change until `finish`.
    """

    @property
    def waits_on_host(self) -> bool:
        """Whether `start` makes the host wait for the device, as for the sizes of what comes.

        Such an exchange is prepared as soon as it can be and started only in its place among the
        phases that compute, so that the device has work during the wait.
        """
        ...

    def prepare(self, tensors: tuple[Tensor, ...]) -> None:
        """Take what the phase reads, and start what `start` would have to wait for."""
        ...

    def start(self) -> Started[tuple[Tensor, ...]]:
        """Start the forward, without autograd: the tensors that the phase writes.

        Called once after `prepare`; nothing of what was prepared is kept beyond its `finish`.
        """
        ...

    def start_backward(
        self, grads: tuple[Tensor, ...], needs: tuple[bool, ...]
    ) -> Started[Tensors]:
        """Start the backward: the gradients of what the phase reads.

        Args:
            grads: one a tensor written; zeros where nobody gave any.
            needs: which of the gradients are wanted; None may be returned for the others.
        """
        ...


@dataclass(frozen=True)
class Compute:
    """A phase that computes.

    Attributes:
        name: without a direction, such as "mlp".
        run: takes the tensors of `reads`, returns those of `writes`; differentiable by autograd,
            and leaves weight gradients to the chunk's queue where it can.
        reads, writes: names of tensors.
    """

    name: str
    run: Run
    reads: tuple[str, ...]
    writes: tuple[str, ...]


@dataclass(frozen=True)
class Communicate:
    """A phase that communicates; see `Compute` for what its fields mean."""

    name: str
    exchange: Exchange
    reads: tuple[str, ...]
    writes: tuple[str, ...]


Phase: TypeAlias = Compute | Communicate


@dataclass(frozen=True)
class Layer:
    """Some phases in the order of their data, and a label for profiles, such as "layer 3"."""

    phases: tuple[Phase, ...]
    label: str = ""

    def outline(self) -> tuple[PhaseOutline, ...]:
        """What an interleaving needs to know of it."""
        return tuple(PhaseOutline(p.name, isinstance(p, Communicate)) for p in self.phases)


class Phased(Protocol):
    """A stage that tells its phases. Calling the stage must compute the same, to the last bit."""

    def phases(self, chunk: Chunk) -> Sequence[Layer]:
        """The layers of one chunk, made anew for each.

        Phases read the stage's inputs as "input0", "input1" and so on. The last phase computes, and
        what it writes is what the stage returns. How many phases there are and what they are
        called must not change from chunk to chunk.
        """
        ...


@dataclass(frozen=True)
class Wiring:
    """Which phase gives what to which: phases of all layers counted through, inputs being -1.

    Attributes:
        first: by layer, the number of its first phase.
        sources: by phase, (phase, place among what it writes) of each tensor that it reads.
        readers: by (phase, place), which phases read it, in their order.
    """

    first: tuple[int, ...]
    sources: tuple[tuple[tuple[int, int], ...], ...]
    readers: Mapping[tuple[int, int], tuple[int, ...]]

    @classmethod
    def of(cls, layers: Sequence[Layer], num_inputs: int, stage: str) -> Wiring:
        """Follow the names through the layers of `stage`, as errors call it.

        Raises:
            ValueError: a phase reads a name that nothing before it wrote, or the last one
                communicates.
        """
        written = {f"input{i}": (-1, i) for i in range(num_inputs)}
        sources: list[tuple[tuple[int, int], ...]] = []
        readers: dict[tuple[int, int], list[int]] = {}
        first: list[int] = []
        for layer in layers:
            first.append(len(sources))
            for phase in layer.phases:
                number = len(sources)
                for name in phase.reads:
                    if name not in written:
                        raise ValueError(
                            f"{stage}: phase {phase.name} of {layer.label or 'a layer'} reads "
                            f"{name!r}, which nothing before it writes; there are "
                            f"{', '.join(sorted(written))}"
                        )
                    readers.setdefault(written[name], []).append(number)
                sources.append(tuple(written[name] for name in phase.reads))
                written |= {name: (number, place) for place, name in enumerate(phase.writes)}
        if not layers or not layers[-1].phases or isinstance(layers[-1].phases[-1], Communicate):
            raise ValueError(f"{stage}: the last of its phases must be one that computes")
        return cls(tuple(first), tuple(sources), {k: tuple(v) for k, v in readers.items()})

    def place(self, number: int) -> tuple[int, int]:
        """(layer, phase within it) of a phase's number."""
        layer = bisect_right(self.first, number) - 1
        return layer, number - self.first[layer]


def is_phased(module: object) -> bool:
    """Whether a module tells its phases; a submodule or buffer of that name does not count."""
    return callable(getattr(type(module), "phases", None))


def inputs_read(layers: Sequence[Layer]) -> int:
    """How many inputs of the stage the phases speak of."""
    names = {name for layer in layers for phase in layer.phases for name in phase.reads}
    return sum(f"input{i}" in names for i in range(len(names)))


def whole(run: Run, num_inputs: int) -> tuple[Layer, ...]:
    """A stage that tells nothing of itself: one phase."""
    return (Layer((Compute("stage", run, tuple(f"input{i}" for i in range(num_inputs)), ()),)),)


def with_last(layers: Sequence[Layer], wrap: Callable[[Run], Run]) -> tuple[Layer, ...]:
    """The layers, what the last phase runs wrapped in something: a check, a loss."""
    *others, layer = layers
    last = layer.phases[-1]
    assert isinstance(last, Compute)
    return (*others, replace(layer, phases=(*layer.phases[:-1], replace(last, run=wrap(last.run)))))
