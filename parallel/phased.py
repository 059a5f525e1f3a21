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

import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias, TypeVar

from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from .chunk import Chunk
from .schedule.interleaving import PhaseOutline

Tensors: TypeAlias = tuple[Tensor | None, ...]
Run: TypeAlias = Callable[..., tuple[Tensor, ...]]
T_co = TypeVar("T_co", covariant=True)
_INPUT = re.compile(r"input(0|[1-9][0-9]*)")


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

    def prepare(self, tensors: tuple[Tensor, ...], needs: tuple[bool, ...]) -> None:
        """Take what the phase reads, and start what `start` would have to wait for.

        Args:
            tensors: one a tensor read, cut from autograd.
            needs: which of them need a gradient. If any does, `start_backward` is called in every
                backward, with zeros where nobody gave a gradient: ranks have to act alike.
        """
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
    """A stage that tells its phases. Calling the stage must compute the same, to the last bit.

    A run by phases does not call the stage, so what hangs on calls would be passed over: see
    `why_whole`, which says when a stage is called instead, in one piece.

    Two things depend on the phases and can make the last bits differ from those of a call:
    - Random numbers are drawn in the order in which phases run, of all chunks: dropout differs.
    - The gradients of a tensor are added up phase by phase, the last reader's first. One that an
      earlier phase uses twice gets (last + (a + b)), where a call may give ((last + a) + b).
    """

    def phases(self, chunk: Chunk) -> Sequence[Layer]:
        """The layers of one chunk, made anew for each.

        Phases read the stage's inputs as "input0", "input1" and so on. The last phase computes, and
        what it writes is what the stage returns. How many phases there are and what they are
        called must not change from chunk to chunk.

        Args:
            chunk: phases may put weight gradients in its queue, `weight_grads`, and add losses,
                whether or not the stage's `forward` takes a chunk. For a stage whose `forward` does
                not, `torch.nn.functional.linear` does so by itself where a backward is split.
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
            ValueError: a phase reads a name that nothing before it wrote, two of a layer have one
                name, or the last one communicates.
        """
        written = {f"input{i}": (-1, i) for i in range(num_inputs)}
        sources: list[tuple[tuple[int, int], ...]] = []
        readers: dict[tuple[int, int], list[int]] = {}
        first: list[int] = []
        for layer in layers:
            first.append(len(sources))
            names = [phase.name for phase in layer.phases]
            for phase in layer.phases:
                if names.count(phase.name) > 1:
                    raise ValueError(
                        f"{stage}: {layer.label or 'a layer'} has two phases called {phase.name}; "
                        "orders go by the names, so give each its own"
                    )
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


def why_whole(module: nn.Module) -> str:
    """Why a module that tells its phases has to be called in one piece all the same; "" if not.

    A run by phases calls neither the module's `forward` nor, in general, that of submodules that
    have submodules themselves (layers), and hooks and compiled code go with these calls. So it has
    to be called where a subclass, or an attribute, replaces a `forward` or `__call__` for which
    `phases` was not written, and where the module or such a submodule has hooks or was compiled
    with its method `compile`. Submodules without submodules are not looked at: phases that pass
    one over have to do as its hooks would.
    """
    if not is_phased(module):
        return "it tells no phases"
    classes = type(module).__mro__
    telling = _defining(classes, "phases")
    for name in ("forward", "__call__"):
        calling = _defining(classes, name)
        if name in vars(module) or calling < telling:
            where = "an attribute" if name in vars(module) else classes[calling].__name__
            return f"{where} replaces {name}, which phases of {classes[telling].__name__} pass over"
    if nn_module._has_any_global_hook():
        return "there are hooks on the calls of all modules, which phases would pass over"
    for name, part in module.named_modules():
        if part is module or next(part.children(), None) is not None:
            what = f"its part {name}" if name else "it"
            if part._compiled_call_impl is not None:
                return f"{what} was compiled, which phases would pass over"
            if any(getattr(part, hooks) for hooks in _HOOKS):
                return f"{what} has hooks, which phases would pass over"
    return ""


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _defining(classes: Sequence[type], name: str) -> int:
    return next(place for place, cls in enumerate(classes) if name in vars(cls))


def inputs_read(layers: Sequence[Layer]) -> int:
    """How many inputs a stage must have for its phases to read those that they speak of."""
    names = {name for layer in layers for phase in layer.phases for name in phase.reads}
    found = (_INPUT.fullmatch(name) for name in names)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def whole(run: Run, num_inputs: int) -> tuple[Layer, ...]:
    """A stage that tells nothing of itself: one phase."""
    return (Layer((Compute("stage", run, tuple(f"input{i}" for i in range(num_inputs)), ()),)),)


def with_last(layers: Sequence[Layer], wrap: Callable[[Run], Run], stage: str) -> tuple[Layer, ...]:
    """The layers of `stage`, what the last phase runs wrapped in something: a check, a loss.

    What the wrapped phase returns has no names any more: there may be less or nothing.
    """
    *others, layer = layers
    last = layer.phases[-1]
    assert isinstance(last, Compute)
    where = f"{stage}, {layer.label}" if layer.label else stage

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        return checked_writes(last, last.run(*inputs), where)

    wrapped = replace(last, run=wrap(run if last.writes else last.run), writes=())
    return (*others, replace(layer, phases=(*layer.phases[:-1], wrapped)))


def checked_writes(phase: Phase, outputs: object, where: str) -> tuple[Tensor, ...]:
    """What a phase returned, which has to be a tensor for each name that it writes.

    Args:
        phase: that returned it. If it writes no names, any number of tensors will do.
        outputs: what its `run` returned, or its exchange's `finish`.
        where: stage and layer, for errors.

    Raises:
        ValueError: it is something else.
    """
    names = ", ".join(phase.writes)
    for_each = f"return a tuple with a tensor for each of what it writes ({names})"
    if not isinstance(outputs, tuple):
        raise ValueError(
            f"{where}: phase {phase.name} returned a {type(outputs).__name__}; {for_each}"
        )
    if phase.writes and len(outputs) != len(phase.writes):
        raise ValueError(f"{where}: phase {phase.name} returned {len(outputs)} values; {for_each}")
    for place, output in enumerate(outputs):
        if not isinstance(output, Tensor):
            name = f" for {phase.writes[place]!r}" if phase.writes else ""
            raise ValueError(
                f"{where}: phase {phase.name} returned a {type(output).__name__}{name}; {for_each}"
            )
    return outputs
