"""The phases of a layer, and how long a pair of chunks takes when two lanes overlap them.

A chunk is some layers, each cut where it communicates. The compute lane runs attention and MLP, the
communication lane dispatch and combine (DeepSeek-V3, arXiv 2412.19437, section 3.2.1, figure 4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

from ..schedule.interleaving import PUBLISHED_ORDER
from .amounts import check_amount, unknown_name

COMPUTE = "compute"
COMMUNICATION = "communication"

# Per direction, the phases of one layer in the order of its data. `mlp(W)` and `attn(W)` need what
# `mlp(B)` and `attn(B)` need, and nothing needs them.
FORWARD = ("attn(F)", "dispatch(F)", "mlp(F)", "combine(F)")
BACKWARD = ("combine(B)", "mlp(B)", "dispatch(B)", "attn(B)")
WEIGHTS = {"mlp(W)": "mlp(B)", "attn(W)": "attn(B)"}
NAMES = (*FORWARD, *BACKWARD, *WEIGHTS)


class PhaseSpan(NamedTuple):
    """One phase of one layer, counted from the start of the step that it is part of."""

    name: str
    layer: int
    lane: str
    start: float
    end: float


@dataclass(frozen=True)
class Phases:
    """Times of the phases of one layer, from which those of F, I, W, B and a pair follow.

    Attributes:
        times: time of each of NAMES: of computation with all multiprocessors (SMs), of
            communication with the share of them that it gets.
        layers: layers of a stage; one number, or one entry a stage. A list may also have a multiple
            of the number of stages: neighbours are summed.
        order: in which order a pair of layers issues its phases, a permutation of NAMES. On each
            lane they run in this order, each after what it needs.
        comm_share: share of the SMs that communication keeps where the lanes overlap, in pairs and
            in B, from 0 to below 1: computation there takes 1 / (1 - comm_share) times as long. V3
            gives 20 of 132. How fast communication is with another share has to be measured.

    Raises:
        ValueError: a phase is missing, unknown or negative, or the order is no permutation or puts
            a phase before what it needs.
    """

    times: Mapping[str, float]
    layers: int | Sequence[int] = 1
    order: Sequence[str] = PUBLISHED_ORDER
    comm_share: float = 0.0

    def __post_init__(self) -> None:
        for name in self.times:
            if name not in NAMES:
                raise ValueError(f"phases: {unknown_name(name, NAMES)}")
        for name in NAMES:
            if name not in self.times:
                raise ValueError(
                    f"phases: no time for {name!r}; each of {', '.join(NAMES)} has one"
                )
            check_amount(f"phases: {name}", self.times[name])
        counts = self.layers if isinstance(self.layers, Sequence) else (self.layers,)
        if not counts or any(type(count) is not int or count < 1 for count in counts):
            raise ValueError(f"phases: layers={self.layers!r} must be whole numbers from 1 up")
        if check_amount("phases: comm_share", self.comm_share) >= 1:
            raise ValueError(
                f"phases: comm_share={self.comm_share!r} must be from 0 to below 1, such as 20/132"
            )
        if sorted(self.order) != sorted(NAMES):
            raise ValueError(f"phases: order must have each of {', '.join(NAMES)} once")
        place = {name: index for index, name in enumerate(self.order)}
        for before, after in _ORDERED:
            if place[before] > place[after]:
                raise ValueError(f"phases: order has {after} before {before}, which it needs")

    def forward(self, layers: int) -> tuple[PhaseSpan, ...]:
        """The phases of F alone: nothing overlaps."""
        return compose(self._order(FORWARD), [self.times] * layers, [])

    def input_half(self, layers: int) -> tuple[PhaseSpan, ...]:
        """The phases of I alone: nothing overlaps."""
        return compose(self._order(BACKWARD), [], [self.times] * layers)

    def weight_half(self, layers: int) -> tuple[PhaseSpan, ...]:
        """The phases of W alone."""
        return compose(self._order(tuple(WEIGHTS)), [], [self.times] * layers)

    def backward(self, layers: int) -> tuple[PhaseSpan, ...]:
        """The phases of B: weight gradients run behind its communication."""
        return self.pair(0, layers)

    def pair(self, forward_layers: int, backward_layers: int) -> tuple[PhaseSpan, ...]:
        """The phases of a forward of so many layers and a backward of so many, interleaved.

        Layer i of the forward goes with the i-th layer that the backward reaches; what is left of
        the longer one follows.
        """
        stretch = 1.0 / (1.0 - self.comm_share)
        times = {
            name: time * (stretch if lane_of(name) == COMPUTE else 1.0)
            for name, time in self.times.items()
        }
        return compose(self.order, [times] * forward_layers, [times] * backward_layers)

    def layers_of(self, stages: int) -> tuple[int, ...]:
        """Layers of each of `stages` stages.

        Raises:
            ValueError: `layers` does not fit that many.
        """
        if not isinstance(self.layers, Sequence):
            return (self.layers,) * stages
        width, rest = divmod(len(self.layers), stages)
        if rest or not width:
            raise ValueError(
                f"phases: layers has {len(self.layers)} entries, but there are {stages} stages"
            )
        return tuple(sum(self.layers[i : i + width]) for i in range(0, stages * width, width))

    def for_ranks(self, ranks: int, stages: int) -> Phases:
        """The phases of the same model, whose layers are given for `ranks` stages, cut finer.

        Raises:
            ValueError: the layers of a stage cannot be cut so.
        """
        if isinstance(self.layers, Sequence) and len(self.layers) % stages == 0:
            return replace(self, layers=self.layers_of(stages))
        coarse, parts = self.layers_of(ranks), stages // ranks
        for stage, count in enumerate(coarse):
            if count % parts:
                raise ValueError(
                    f"phases: the {count} layers of stage {stage} cannot be cut in {parts} parts"
                )
        return replace(self, layers=tuple(n // parts for n in coarse for _ in range(parts)))

    def _order(self, names: Sequence[str]) -> tuple[str, ...]:
        return tuple(name for name in self.order if name in names)


def duration(spans: Sequence[PhaseSpan]) -> float:
    """From the start of a step until the last of its phases has ended."""
    return max((span.end for span in spans), default=0.0)


# (one, other): `other` needs `one`, within a layer.
_ORDERED = (
    *pairwise(FORWARD),
    *pairwise(BACKWARD),
    *((of, name) for name, of in WEIGHTS.items()),
)
BEFORE = {after: before for before, after in _ORDERED}
"""Of each phase, the one of its layer that it needs; of a chain's first, none."""


def lane_of(name: str) -> str:
    """COMPUTE or COMMUNICATION, where a phase runs."""
    return COMMUNICATION if name.startswith(("dispatch", "combine")) else COMPUTE


def compose(
    order: Sequence[str],
    forward: Sequence[Mapping[str, float]],
    backward: Sequence[Mapping[str, float]],
) -> tuple[PhaseSpan, ...]:
    """Run the phases of a chunk, or of two, layer by layer on the two lanes.

    Args:
        order: phases as each pair of layers issues them; those that it lacks do not run.
        forward: times of the phases of each layer that the forward passes, in its order.
        backward: the same of the backward, which begins with the last layer of its chunk.
    """
    free = {COMPUTE: 0.0, COMMUNICATION: 0.0}
    data = {"F": 0.0, "B": 0.0}  # when the last layer's output, of either direction, was there
    spans: list[PhaseSpan] = []
    for layer in range(max(len(forward), len(backward))):
        ended: dict[str, float] = {}
        for name in order:
            layers = forward if name in FORWARD else backward
            if layer >= len(layers):
                continue
            lane = lane_of(name)
            direction = "F" if name in FORWARD else "B"
            ready = ended.get(BEFORE.get(name, ""), data[direction])
            start = max(free[lane], ready)
            free[lane] = ended[name] = start + layers[layer][name]
            spans.append(PhaseSpan(name, layer, lane, start, ended[name]))
        for direction, last in (("F", FORWARD[-1]), ("B", BACKWARD[-1])):
            data[direction] = ended.get(last, data[direction])
    return tuple(spans)
