"""Sums the gradients of parameters that several ranks of one pipeline hold.

There are two reasons for a second copy: a stage that stands on two ranks (bidirectional DualPipe),
and a parameter that two stages share (the embedding, which multi-token prediction needs again
beside the head). Both are one thing here: a set of ranks that hold the same parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn
from torch.nn import Parameter

from ..comm.collectives import sum_over
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
        ValueError: a tie names what is not there, two stages of this rank hold separate tensors
            for one tied parameter, or ranks begin with different values of one parameter.
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
                known = self.by_ranks.setdefault(ranks, {}).setdefault(place, parameter)
                _require_same(known, parameter, place, (stage, name))
        self.by_ranks = {ranks: held for ranks, held in self.by_ranks.items() if len(ranks) > 1}
        self._groups = mesh.groups_within_pipelines(
            _all_sets(placement, tied), "replicas", timeout_s=timeout_s
        )
        self._check_values()

    @property
    def parameters(self) -> list[Parameter]:
        """Every replicated parameter of this rank that is trained at present."""
        return [p for ranks in sorted(self.by_ranks) for p in self._ordered(ranks)]

    def sum(self, instead: Mapping[Parameter, Parameter] | None = None) -> None:
        """Replace every gradient by its sum over the holders.

        Args:
            instead: whose gradients are meant, by replicated parameter: shares of them, which all
                holders cut alike. None for those of the parameters themselves.

        A gradient that is None on every holder stays None; where only some have one, the others
        count as zero. The result is the same on all holders, bit for bit.

        Raises:
            CommError: a holder is gone or did not answer in time.
        """
        for ranks in sorted(self.by_ranks):
            held = self._ordered(ranks)
            if instead is not None:
                held = [instead[parameter] for parameter in held]
            sum_gradients(held, self._groups[ranks], board=self._board)

    def _ordered(self, ranks: tuple[int, ...]) -> list[Parameter]:
        """The trained parameters shared by `ranks`, in an order that all of them use."""
        held = sorted(self.by_ranks[ranks].items(), key=lambda item: item[0])
        return [parameter for _, parameter in held if parameter.requires_grad]

    def _check_values(self) -> None:
        """Copies that start out different would stay different, and nobody would see it."""
        for ranks, shared in sorted(self.by_ranks.items()):
            places = sorted(shared)
            sums = torch.stack([shared[place].detach().to(torch.float64).sum() for place in places])
            total = sums.clone()
            sum_over(total, self._groups[ranks], "a comparison of replicas", board=self._board)
            # Equal addends: a sum over n of them is n times each, but for the rounding of the sum.
            differs = (total - len(ranks) * sums).abs() > 1e-12 * total.abs() + 1e-300
            if bool(differs.any()):
                stage, name = places[int(differs.nonzero()[0])]
                raise ValueError(
                    f"parameter {name!r} of stage {stage} is held by pipeline ranks {list(ranks)} "
                    "with different values; initialise it alike on all of them (the same seed for "
                    "each stage)"
                )


def _all_sets(placement: Placement, tied: Ties) -> list[tuple[int, ...]]:
    """Every set of ranks that hold one parameter, as every rank can tell: without any module."""
    sets = {placement.replicas(stage) for stage in range(placement.num_stages)}
    sets |= {holders(placement, tied, place)[0] for tie in tied for place in tie}
    return sorted(ranks for ranks in sets if len(ranks) > 1)


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
