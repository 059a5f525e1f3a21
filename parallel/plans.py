"""How this rank executes the steps of its schedules: phase by phase or in one piece."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import nn

from ..comm.collectives import sum_over
from ..comm.waiting import name_ranks
from .mesh import Mesh
from .overlap import Plan
from .phased import is_phased, why_whole
from .schedule import Action, Op, Pair, Step, actions
from .schedule.interleaving import DEFAULT_INTERLEAVING, Interleaving
from .stage import StageRunner

_LOG = logging.getLogger(__name__)
_DIGEST_WORDS = 4  # of 64 bits


class Plans:
    """Which stages run phase by phase, how each step is executed, whose message goes first.

    Args:
        modules: this rank's stages by index. Hooks and the like that keep a stage in one piece (see
            `why_whole`) are looked for here; later ones are not noticed.
        num_stages: of the whole pipeline.
        mesh: this rank's place.
        overlap: in which order phases are issued; None runs all stages in one piece.
        device: where the ranks compare, for one collective of the world.

    Attributes:
        cut: the stages that run phase by phase, the same on all ranks: those that do so on every
            rank that holds them. It tells the order of messages, and that of the dispatchers'
            exchanges, which ranks of several pipelines share.

    Raises:
        ValueError: ranks were given different values of `overlap`.
    """

    def __init__(
        self,
        modules: Mapping[int, nn.Module],
        num_stages: int,
        mesh: Mesh,
        overlap: Interleaving | None,
        device: torch.device,
    ) -> None:
        self._interleaving = overlap or DEFAULT_INTERLEAVING
        self._runners: Mapping[int, StageRunner] = {}
        self._made: dict[tuple[int | None, int | None, bool], Plan] = {}
        reasons = {
            stage: "" if overlap is None else why_whole(module) for stage, module in modules.items()
        }
        uncut = [overlap is None or bool(reasons.get(stage)) for stage in range(num_stages)]
        told = _gathered([*_digest(overlap), *map(int, uncut)], mesh, device)
        _check_alike(told[:, :_DIGEST_WORDS].tolist(), mesh.rank, overlap)
        found = told[:, _DIGEST_WORDS:].any(0).tolist()
        self.cut = frozenset(stage for stage in range(num_stages) if not found[stage])
        for stage, module in modules.items():
            if overlap is not None and is_phased(module) and stage not in self.cut:
                reason = reasons[stage] or "it does on another rank"
                name = type(module).__name__
                _LOG.warning("stage %d (%s) runs without overlap: %s", stage, name, reason)

    def use(self, runners: Mapping[int, StageRunner], steps: Iterable[Step]) -> None:
        """Make the plans of all steps, whose chunks these runners make, and forget others.

        Raises:
            ValueError: phases do not fit together, or not the order.
        """
        self._runners = runners
        self._made.clear()
        for step in steps:
            self.of(step)

    def of(self, step: Step) -> Plan | None:
        """How a step is executed; None for a W, and for a pair that runs as F and then B."""
        if isinstance(step, Pair) and not self._overlaps(step):
            for action in actions(step):
                self.of(action)
            return None
        if isinstance(step, Action) and step.op is Op.W:
            return None
        forward, backward, weights = None, None, True
        for stage, op, _ in actions(step):
            if op is Op.F:
                forward = stage
            else:
                backward, weights = stage, op is Op.B
        key = forward, backward, weights
        if key not in self._made:
            outlines = [None if s is None else self._runners[s].outline() for s in key[:2]]
            self._made[key] = Plan.of(self._interleaving, *outlines, weights=weights)
        return self._made[key]

    def ended(self, step: Step) -> tuple[Action, ...]:
        """The actions of a step of any rank, in the order in which their messages are sent."""
        if isinstance(step, Pair) and self._overlaps(step) and self._interleaving.backward_first:
            return step.backward, step.forward
        return actions(step)

    def _overlaps(self, pair: Pair) -> bool:
        return all(action.stage in self.cut for action in actions(pair))


def _digest(overlap: Interleaving | None) -> list[int]:
    """64-bit words of a cryptographic hash: different values have different ones."""
    digest = hashlib.sha256(repr(overlap).encode()).digest()
    return [
        int.from_bytes(digest[8 * word : 8 * word + 8], "little", signed=True)
        for word in range(_DIGEST_WORDS)
    ]


def _gathered(mine: list[int], mesh: Mesh, device: torch.device) -> torch.Tensor:
    """These numbers of every rank of the mesh: int64 [rank, number], on the CPU."""
    if mesh.shape.world_size == 1 or not dist.is_initialized():  # or what needs groups will say so
        return torch.tensor([mine], dtype=torch.int64)
    told = torch.zeros(mesh.shape.world_size, len(mine), dtype=torch.int64, device=device)
    told[mesh.rank] = torch.tensor(mine, dtype=torch.int64)
    # A sum that gathers: each row has one rank's numbers, and zeros from all others.
    sum_over(told, dist.group.WORLD, "which stages overlap, and how", board=mesh.waits)
    return told.cpu()


def _check_alike(digests: list[list[int]], rank: int, overlap: Interleaving | None) -> None:
    """Raise unless all ranks were given the same `overlap`, by their digests."""
    holders: dict[tuple[int, ...], list[int]] = {}
    for other, digest in enumerate(digests):
        holders.setdefault(tuple(digest), []).append(other)
    if len(holders) > 1:
        sets = "; ".join(name_ranks(ranks) for ranks in holders.values())
        raise ValueError(
            f"rank {rank}: ranks were given different values of overlap; alike are {sets}, and "
            f"this rank has {overlap}: give all of them the same"
        )
