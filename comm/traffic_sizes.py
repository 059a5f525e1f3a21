"""How large a message row of expert-parallel exchange is, in each of its four communications."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .dispatch.sizes import record_starts, slot_bytes

_SCALE_BYTES = 4  # a float32
_WEIGHT_BYTES = 4  # a float32
_TILE = 128


class Elements(NamedTuple):
    """How a row's elements travel.

    Attributes:
        bits: of an element: 8, 16 or 32; or 10, of which four are packed in five bytes.
        scales: float32 numbers that each tile of 1x128 has beside its elements.
    """

    bits: int
    scales: int = 0

    def parts(self, hidden: int) -> list[tuple[int, int]]:
        """What `hidden` elements are made of: (bytes of an item, items) of each part."""
        scales = [(_SCALE_BYTES, -(-hidden // _TILE))] * self.scales
        if self.bits == 10:
            return [(1, 5 * -(-hidden // 4)), *scales]
        return [(self.bits // 8, hidden), *scales]


@dataclass(frozen=True)
class PayloadSizes:
    """How elements of rows travel there and back.

    Attributes:
        name: as users know it.
        to_experts: in a spread: dispatch(F) and combine(B).
        back: in a gather: combine(F) and dispatch(B).
    """

    name: str
    to_experts: Elements
    back: Elements

    @classmethod
    def named(cls, name: str) -> PayloadSizes:
        """The payload called "fp32", "bf16", "fp8", "logfmt8" or "logfmt10".

        Raises:
            ValueError: no payload is called so.
        """
        for payload in PAYLOADS:
            if payload.name == name:
                return payload
        known = ", ".join(payload.name for payload in PAYLOADS)
        raise ValueError(f"there is no payload {name!r}; use one of {known}")

    def parts(self, hidden: int, *, spread: bool) -> list[tuple[int, int]]:
        """What a row of `hidden` elements is made of: (bytes of an item, items) of each part."""
        return (self.to_experts if spread else self.back).parts(hidden)


# fp8 is E4M3 with a scale for each 1x128 tile on the way to the experts, BF16 on the way back
# (arXiv 2412.19437, section 3.2.2); LogFMT has two numbers for each tile (2505.09343, section 3.2).
PAYLOADS = (
    PayloadSizes("bf16", Elements(16), Elements(16)),
    PayloadSizes("fp32", Elements(32), Elements(32)),
    PayloadSizes("fp8", Elements(8, scales=1), Elements(16)),
    PayloadSizes("logfmt8", Elements(8, scales=2), Elements(16)),
    PayloadSizes("logfmt10", Elements(10, scales=2), Elements(10, scales=2)),
)


class Phase(NamedTuple):
    """What travels in one of the four communications.

    Attributes:
        spread: rows go to their experts; False: they come back from there.
        weights: the router's weights, or their gradients, go with each row.
        indices: the slots of the row's experts go with it: the first dispatch of a handle alone.
    """

    spread: bool
    weights: bool
    indices: bool


PHASES = {
    "dispatch(F)": Phase(spread=True, weights=True, indices=True),
    "combine(F)": Phase(spread=False, weights=False, indices=False),
    "dispatch(B)": Phase(spread=False, weights=True, indices=False),
    "combine(B)": Phase(spread=True, weights=False, indices=False),
}


@dataclass(frozen=True)
class RowSizes:
    """The rows of a layer's exchange: how their elements travel, and how many there are.

    Attributes:
        payload: how elements travel.
        hidden: D, elements of a row.
    """

    payload: PayloadSizes
    hidden: int

    def record_bytes(self, phase: str, experts: int, num_slots: int) -> int:
        """Bytes of one message row: the elements, then weights and slots where they go along.

        Args:
            phase: a key of PHASES.
            experts: experts that a record has room for: K, or 1 where each has a row of its own.
            num_slots: expert slots of the layout.
        """
        what = PHASES[phase]
        parts = self.payload.parts(self.hidden, spread=what.spread)
        if what.weights:
            parts.append((_WEIGHT_BYTES, experts))
        if what.indices:
            parts.append((slot_bytes(num_slots), experts))
        return record_starts(parts)[-1]
