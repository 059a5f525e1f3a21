"""Which expert stands where: physical slots of ranks, and the logical experts in them. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class ExpertLayout:
    """Where each expert's weights are.

    A rank has `slots_per_rank` physical slots, each with one logical expert. A redundant expert has
    several slots; its tokens are dealt out among them in turn, so that each copy gets its share.

    Attributes:
        num_experts: E, logical experts, as the router numbers them.
        num_ranks: ranks of the expert-parallel group.
        slots: the logical expert of each slot, rank by rank; every expert has one at least.

    Raises:
        ValueError: slots that do not divide among the ranks, or an expert without a slot.
    """

    num_experts: int
    num_ranks: int
    slots: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.num_experts < 1 or self.num_ranks < 1:
            raise ValueError(
                f"a layout needs at least one expert and one rank, got {self.num_experts} experts "
                f"and {self.num_ranks} ranks"
            )
        object.__setattr__(self, "slots", tuple(int(e) for e in self.slots))
        if not self.slots or len(self.slots) % self.num_ranks:
            raise ValueError(
                f"{len(self.slots)} expert slots do not divide among {self.num_ranks} ranks; every "
                "rank has the same number of slots: add redundant experts, or change the ranks"
            )
        strange = sorted({e for e in self.slots if not 0 <= e < self.num_experts})
        if strange:
            raise ValueError(
                f"the layout's slots name expert {strange[0]}, but there are {self.num_experts}: "
                f"0..{self.num_experts - 1}"
            )
        absent = sorted(set(range(self.num_experts)) - set(self.slots))
        if absent:
            raise ValueError(f"the layout has no slot for expert {absent[0]}; each needs one")

    @classmethod
    def contiguous(cls, num_experts: int, num_ranks: int) -> ExpertLayout:
        """Expert e on rank e // (num_experts / num_ranks), without copies.

        Raises:
            ValueError: the experts do not divide among the ranks.
        """
        if num_ranks < 1 or num_experts % num_ranks:
            raise ValueError(
                f"{num_experts} experts do not divide among {num_ranks} ranks; give a layout with "
                "redundant experts, or another number of ranks"
            )
        return cls(num_experts, num_ranks, tuple(range(num_experts)))

    @property
    def num_slots(self) -> int:
        return len(self.slots)

    @property
    def slots_per_rank(self) -> int:
        return len(self.slots) // self.num_ranks

    @cached_property
    def copies(self) -> tuple[tuple[int, ...], ...]:
        """The slots of each logical expert, ascending."""
        found: list[list[int]] = [[] for _ in range(self.num_experts)]
        for slot, expert in enumerate(self.slots):
            found[expert].append(slot)
        return tuple(map(tuple, found))

    @property
    def is_redundant(self) -> bool:
        """Whether an expert has several slots."""
        return self.num_slots > self.num_experts

    @property
    def is_contiguous(self) -> bool:
        """Whether slot s has expert s."""
        return self.slots == tuple(range(self.num_experts))

    def rank_of(self, slot: int) -> int:
        """The ep rank that has this slot."""
        return slot // self.slots_per_rank

    def experts_of(self, rank: int) -> Sequence[int]:
        """The logical expert in each slot of an ep rank; a range where they follow each other."""
        here = self.slots[rank * self.slots_per_rank : (rank + 1) * self.slots_per_rank]
        run = range(here[0], here[0] + len(here))
        return run if tuple(run) == here else here
