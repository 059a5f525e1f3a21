"""How large a message row of expert-parallel exchange is, in each of its four communications."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .dispatch.sizes import record_starts, slot_bytes

_SCALE_BYTES = 4  # a float32
_WEIGHT_BYTES = 4  # a float32


@dataclass(frozen=True)
class PayloadSizes:
    """How elements of rows travel.

    Attributes:
        name: as users know it.
        spread_bytes: of an element on its way to the experts: dispatch(F) and combine(B).
        gather_bytes: of an element on its way back: combine(F) and dispatch(B).
        tile: elements that share a float32 scale where rows are spread; 0: there are no scales.
    """

    name: str
    spread_bytes: int
    gather_bytes: int
    tile: int = 0

    @classmethod
    def named(cls, name: str) -> PayloadSizes:
        """The payload called "fp32", "bf16" or "fp8".

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
        if not spread:
            return [(self.gather_bytes, hidden)]
        scales = [(_SCALE_BYTES, -(-hidden // self.tile))] if self.tile else []
        return [(self.spread_bytes, hidden), *scales]


# fp8 is E4M3 with a scale for each 1x128 tile on the way to the experts, BF16 on the way back
# (arXiv 2412.19437, section 3.2.2).
PAYLOADS = (
    PayloadSizes("bf16", 2, 2),
    PayloadSizes("fp32", 4, 4),
    PayloadSizes("fp8", 1, 2, tile=128),
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
