"""Executes a step phase by phase: one chunk's communication behind another's compute.

The items of a step come in the order that its interleaving gives them. Those that compute run here,
one after another. Those that communicate are started in their own order, each as soon as what it
needs is there, and finished when something needs them: so they ride beside whatever computes
meanwhile, as on the two lanes of arXiv 2412.19437, figure 4.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ..comm.marks import mark, named
from .live import LiveChunk
from .phased import Communicate, Layer, Started, Wiring
from .schedule.interleaving import Interleaving, Item, PhaseName, check_order

Outline: TypeAlias = tuple[Sequence[Layer], Wiring]  # of a stage's chunks, all alike


@dataclass(frozen=True)
class Plan:
    """The items of a step, as `Interleaving.arrange` gives them, and what is known of each.

    Attributes:
        items: in the order in which they are issued.
        needs: items of the step whose results an item takes.
        communicating: those that communicate; the others compute.
        deferred: backward items that leave their weight gradients to an item or step of their own.
        names: for profiles and errors, such as "mlp(B) layer 3".
    """

    items: tuple[Item, ...]
    needs: Mapping[Item, tuple[Item, ...]]
    communicating: frozenset[Item]
    deferred: frozenset[Item]
    names: Mapping[Item, str]

    @classmethod
    def of(
        cls,
        interleaving: Interleaving,
        forward: Outline | None,
        backward: Outline | None,
        *,
        weights: bool = True,
    ) -> Plan:
        """The plan of a step with a forward, a backward or both.

        Args:
            interleaving: gives the order.
            forward, backward: the layers and wiring of the step's chunks; None for one it lacks.
            weights: False where the step leaves all weight gradients for later (I).

        Raises:
            InterleavingError: an item comes before what it needs (both are named), or has no place.
        """
        nothing: Outline = ((), Wiring((), (), {}))
        chunks = {"F": forward or nothing, "B": backward or nothing, "W": backward or nothing}
        items = interleaving.arrange(
            [layer.outline() for layer in chunks["F"][0]],
            [layer.outline() for layer in chunks["B"][0]],
            weights=weights,
        )
        names: dict[Item, str] = {}
        for item in items:
            layer = chunks[item.direction][0][item.layer]
            name = str(PhaseName(layer.phases[item.phase].name, item.direction))
            names[item] = f"{name} {layer.label}".rstrip()
        needs = {item: _needs(item, chunks[item.direction][1]) for item in items}
        check_order(items, needs.__getitem__, lambda item: names.get(item, "its gradient"))
        own = {item._replace(direction="B") for item in items if item.direction == "W"}
        communicating = frozenset(
            item
            for item in items
            if isinstance(chunks[item.direction][0][item.layer].phases[item.phase], Communicate)
        )
        deferred = frozenset(
            item for item in items if item.direction == "B" and (not weights or item in own)
        )
        return cls(items, needs, communicating, deferred, names)


def _needs(item: Item, wiring: Wiring) -> tuple[Item, ...]:
    direction, layer, phase = item
    if direction == "W":
        return (Item("B", layer, phase),)
    number = wiring.first[layer] + phase
    if direction == "F":
        others = [source for source, _ in wiring.sources[number] if source >= 0]
    else:
        others = [r for (source, _), rs in wiring.readers.items() if source == number for r in rs]
    return tuple(Item(direction, *wiring.place(other)) for other in dict.fromkeys(others))


@dataclass
class Part:
    """One of a step's chunks, and how its messages come and go.

    Attributes:
        begin: called when the chunk's first item of the step is due: takes the message that this
            needs and returns the chunk.
        end: called once when the chunk's last item but for weight gradients has ended: sends on
            what came out.
        context: in which forward phases compute.
        loss_scale: weight of the chunk's losses, for a backward.
    """

    begin: Callable[[], LiveChunk]
    end: Callable[[LiveChunk], object]
    context: Callable[[LiveChunk], AbstractContextManager[object]] = field(
        default=lambda _: nullcontext()
    )
    loss_scale: float = 1.0


def in_turn(first: Part, second: Part) -> None:
    """Have the second part's messages sent after the first's, whichever ends earlier.

    Receivers know their order from the schedule; it cannot depend on the layers of a stage.
    """
    end_first, end_second = first.end, second.end
    held: list[LiveChunk] = []
    ended: list[LiveChunk] = []

    def of_first(live: LiveChunk) -> None:
        end_first(live)
        ended.append(live)
        for other in held:
            end_second(other)

    def of_second(live: LiveChunk) -> None:
        if ended:
            end_second(live)
        else:
            held.append(live)

    first.end, second.end = of_first, of_second


def execute(plan: Plan, forward: Part | None, backward: Part | None) -> None:
    """Run a step.

    Args:
        plan: of the step's chunks.
        forward, backward: its chunks; None for one that the step lacks.

    Raises:
        CommError: a peer died or a limit expired.
    """
    _Execution(plan, {"F": forward, "B": backward, "W": backward}).run()


class _Execution:
    """One run of a plan.

    An item that communicates is `due` until it has been started, under way until it is finished;
    every item is done then.
    """

    def __init__(self, plan: Plan, parts: Mapping[str, Part | None]) -> None:
        self._plan = plan
        self._parts = parts
        self._live: dict[str, LiveChunk] = {}
        self._place = {item: number for number, item in enumerate(plan.items)}
        self._left = {d: sum(item.direction == d for item in plan.items) for d in "FBW"}
        self._due = deque(item for item in plan.items if item in plan.communicating)
        self._under_way: dict[Item, Started[Any] | None] = {}
        self._prepared: Item | None = None
        self._done: set[Item] = set()

    def run(self) -> None:
        for item in self._plan.items:
            if item in self._plan.communicating:
                continue
            self._start_ready(self._place[item])
            for needed in self._plan.needs[item]:
                self._finish(needed)
            with mark(self._plan.names[item]):
                self._compute(item)
            self._end(item)
        self._start_ready(len(self._place))
        for item in [*self._under_way, *self._due]:
            self._finish(item)

    def _compute(self, item: Item) -> None:
        live, part = self._chunk(item.direction)
        number = live.number(item.layer, item.phase)
        if item.direction == "F":
            live.compute(number, part.context(live))
        elif item.direction == "B":
            defer = item in self._plan.deferred
            live.backward(number, loss_scale=part.loss_scale, defer=defer)
        else:
            live.weights(number)

    def _start_ready(self, place: int) -> None:
        """Start what can be, in its order, before the item of this place computes.

        What makes the host wait for the device is only prepared until its own place has come: or
        the device would be left without work.
        """
        while self._due and all(need in self._done for need in self._plan.needs[self._due[0]]):
            item = self._due[0]
            if self._place[item] > place and self._waits_on_host(item):
                if self._prepared != item:
                    live, _ = self._chunk("F")
                    with mark(self._plan.names[item]):
                        live.prepare(live.number(item.layer, item.phase))
                    self._prepared = item
                return
            self._start()

    def _waits_on_host(self, item: Item) -> bool:
        if item.direction != "F":
            return False
        live, _ = self._chunk("F")
        return live.exchange(live.number(item.layer, item.phase)).waits_on_host

    def _start(self) -> None:
        item = self._due.popleft()
        live, _ = self._chunk(item.direction)
        number, name = live.number(item.layer, item.phase), self._plan.names[item]
        with named(name), mark(name):
            if item.direction == "F":
                if self._prepared != item:
                    live.prepare(number)
                self._under_way[item] = live.start(number)
            else:
                self._under_way[item] = live.start_backward(number)

    def _finish(self, item: Item) -> None:
        """Have an item done, starting it and what is due before it if need be."""
        if item in self._done:
            return
        while item not in self._under_way:
            for needed in self._plan.needs[self._due[0]]:
                self._finish(needed)
            self._start()
        started = self._under_way.pop(item)
        live, _ = self._chunk(item.direction)
        number = live.number(item.layer, item.phase)
        with mark(f"wait {self._plan.names[item]}"):
            if item.direction == "F":
                assert started is not None
                live.finish(number, started)
            else:
                live.finish_backward(number, started)
        self._end(item)

    def _chunk(self, direction: str) -> tuple[LiveChunk, Part]:
        part = self._parts[direction]
        assert part is not None
        chunk = "F" if direction == "F" else "B"
        if chunk not in self._live:
            self._live[chunk] = part.begin()
        return self._live[chunk], part

    def _end(self, item: Item) -> None:
        self._done.add(item)
        self._left[item.direction] -= 1
        if not self._left[item.direction] and item.direction != "W":
            live, part = self._chunk(item.direction)
            part.end(live)
