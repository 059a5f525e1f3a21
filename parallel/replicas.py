"""Sums the gradients of parameters that several ranks of one pipeline hold.

There are two reasons for a second copy: a stage that stands on two ranks (bidirectional DualPipe),
and a parameter that two stages share (the embedding, which multi-token prediction needs again
beside the head). Both are one thing here: a set of ranks that hold the same parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from .gradients import sum_gradients
from .mesh import Mesh
from .schedule import Placement

Place = tuple[int, str]  # stage, name of the parameter within it
Ties = Sequence[Sequence[Place]]


def holders(placement: Placement, tied: Ties, place: Place) -> tuple[tuple[int, ...], Place]:
    """Pipeline ranks that hold the parameter at `place`, and the one name that all of them use."""
    alike = {place}
    grew = True
    while grew:
        joined = {p for tie in tied if alike & set(tie) for p in tie}
        grew = not joined <= alike
        alike |= joined
    ranks = {rank for stage, _ in alike for rank in placement.replicas(stage)}
    return tuple(sorted(ranks)), min(alike)


class Replicas:
    """The replicated parameters of this rank and the groups that share them.

    Args:
        stages: this rank's stage modules by stage index.
        placement: which ranks hold which stages.
        mesh: this rank's place.
        tied: sets of (stage, parameter name) that are one parameter.
        timeout_s: limit of a sum, seconds.

    Raises:
        ValueError: a tie names what is not there, or two stages of this rank hold separate tensors
            for one tied parameter.
    """

    def __init__(
        self,
        stages: Mapping[int, nn.Module],
        placement: Placement,
        mesh: Mesh,
        tied: Ties = (),
        *,
        timeout_s: float = 300.0,
    ) -> None:
        self._board = mesh.waits
        self.by_ranks: dict[tuple[int, ...], dict[Place, Parameter]] = {}
        named = {s: dict(m.named_parameters(remove_duplicate=False)) for s, m in stages.items()}
        _check_ties(named, placement, tied)
        for stage, parameters in named.items():
            for name, parameter in parameters.items():
                ranks, place = holders(placement, tied, (stage, name))
                if len(ranks) > 1 and parameter.requires_grad:
                    known = self.by_ranks.setdefault(ranks, {}).setdefault(place, parameter)
                    _require_same(known, parameter, place, (stage, name))
        peers = mesh.shape.pp_peers(mesh.rank)
        self._groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        for ranks in sorted(self.by_ranks):
            group = dist.new_group(
                [peers[p] for p in ranks],
                timeout=timedelta(seconds=timeout_s),
                use_local_synchronization=True,  # only the holders take part
            )
            assert isinstance(group, dist.ProcessGroup)  # this rank is one of them
            self._groups[ranks] = group

    @property
    def parameters(self) -> list[Parameter]:
        """Every replicated parameter of this rank."""
        return [p for shared in self.by_ranks.values() for p in shared.values()]

    def set_aside(self) -> list[Tensor | None]:
        """Take the gradients of earlier steps, which have been summed already, out of the way."""
        earlier = [p.grad for p in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        return earlier

    def sum(self, earlier: list[Tensor | None]) -> None:
        """Sum this step's gradients over their holders, then add those set aside.

        A gradient that is None on every holder stays None; where only some have one, the others
        count as zero. The result is the same on all holders, bit for bit.
        """
        for ranks in sorted(self.by_ranks):
            sum_gradients(self._ordered(ranks), self._groups[ranks], board=self._board)
        for parameter, before in zip(self.parameters, earlier, strict=True):
            if before is not None:
                parameter.grad = before if parameter.grad is None else parameter.grad.add_(before)

    def _ordered(self, ranks: tuple[int, ...]) -> list[Parameter]:
        """The parameters shared by `ranks`, in an order that all of them use."""
        return [p for _, p in sorted(self.by_ranks[ranks].items(), key=lambda item: item[0])]


def _check_ties(
    named: Mapping[int, Mapping[str, Parameter]], placement: Placement, tied: Ties
) -> None:
    for stage, name in (place for tie in tied for place in tie):
        if not 0 <= stage < placement.num_stages:
            raise ValueError(f"tied: there is no stage {stage} among {placement.num_stages}")
        if stage in named and name not in named[stage]:
            raise ValueError(
                f"tied: stage {stage} has no parameter {name!r}; it has {_some(named[stage])}"
            )


def _require_same(known: Parameter, parameter: Parameter, place: Place, other: Place) -> None:
    if known is not parameter:
        raise ValueError(
            f"tied parameters {place} and {other} are on one rank and must be the same Parameter "
            "object there; assign one module's parameter to the other before building the Pipeline"
        )


def _some(names: Iterable[str], limit: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
