"""What ranks say of themselves before a dispatch, so that all of them refuse what one has wrong.

Without it a rank that raised alone would leave the others waiting, and ranks whose tensors do not
fit each other would exchange rows of different lengths.

Shapes: T tokens, K experts a token, P slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .host import to_device
from .pieces import wanted

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Declared(NamedTuple):
    """What a rank says of the tensors that it is going to send; 0 where it does not know yet.

    Attributes:
        hidden: D.
        x_dtype, weights_dtype: 1 + their place among the floating dtypes.
        learns: 1, and 2 more if x needs a gradient, and 4 more if the weights do.
        refused: 1 if the rank refused what it was given, and so sends nothing.
    """

    hidden: int = 0
    x_dtype: int = 0
    weights_dtype: int = 0
    learns: int = 0
    refused: int = 0

    @classmethod
    def of(
        cls, x_TD: Tensor, weights_TK: Tensor, needs: tuple[bool, bool] | None = None
    ) -> Declared:
        """Of a dispatch of these; `needs`: which need a gradient, None for what autograd says."""
        if needs is None:
            grad = torch.is_grad_enabled()
            needs = grad and x_TD.requires_grad, grad and weights_TK.requires_grad
        learns = 1 + 2 * needs[0] + 4 * needs[1]
        return cls(x_TD.shape[1], _code(x_TD.dtype), _code(weights_TK.dtype), learns)


UNKNOWN = Declared()


class Census(NamedTuple):
    """What a rank says of itself.

    Attributes:
        num_tokens, top_k: T, K.
        declared: of the tensors to come.
        low, high: lowest and highest index in experts_TK; 0 and -1 without any.
        most_nodes: the most nodes that a token of it reaches, or 0 where nobody asked.
    """

    num_tokens: int
    top_k: int
    declared: Declared
    low: int
    high: int
    most_nodes: int

    @classmethod
    def read(cls, line: Sequence[int]) -> Census:
        """From the first `LENGTH` numbers of a line."""
        return cls(line[0], line[1], Declared(*line[2:-3]), *line[-3:])


LENGTH = 2 + len(Declared._fields) + 3  # numbers of a census


def take_census(
    experts_TK: Tensor,
    slots_TK: Tensor,
    declared: Declared,
    node_P1: Tensor | None,
    num_nodes: int,
) -> Tensor:
    """This rank's `Census`, [LENGTH] int64 on the device.

    Args:
        node_P1: the node of each slot, or None where nodes need not be counted.
    """
    device = experts_TK.device
    known = to_device([*experts_TK.shape, *declared], device)
    if not experts_TK.numel():
        return torch.cat([known, to_device([0, -1, 0], device)])
    low, high = experts_TK.aminmax()
    most = torch.zeros_like(low)
    if node_P1 is not None:
        most = wanted(node_P1[slots_TK], num_nodes).sum(dim=1).max()
    return torch.cat([known, torch.stack([low, high, most])])


def check_census(
    told: Sequence[Census], ranks: Sequence[int], num_experts: int, node_limit: int | None
) -> None:
    """Refuse what any rank has wrong; all ranks see the same and so refuse together.

    Args:
        told: by ep rank.
        ranks: their global ranks, to name.

    Raises:
        ValueError: a rank has refused its tensors; ranks do not fit each other; an expert's index
            out of range; or a token that reaches too many nodes.
    """
    each = list(zip(ranks, told, strict=True))
    for rank, census in each:
        if census.declared.refused:
            raise ValueError(
                f"rank {rank} refused the tensors that it was given to dispatch, so nothing was "
                "sent; its own error says why"
            )
    _check_alike(each)
    for rank, census in each:
        if census.low < -1 or census.high >= num_experts:
            raise ValueError(
                f"experts_TK of rank {rank} holds experts {census.low}..{census.high}, but this "
                f"dispatcher has {num_experts}: 0..{num_experts - 1}, or -1 for none"
            )
    for rank, census in each:
        if node_limit is not None and census.most_nodes > node_limit:
            raise ValueError(
                f"a token of rank {rank} goes to {census.most_nodes} nodes, but node_limit is "
                f"{node_limit}: the router's groups must each lie within a node, and a token "
                f"choose from {node_limit} of them at most"
            )


def _check_alike(each: Sequence[tuple[int, Census]]) -> None:
    first, one = each[0]
    for rank, other in each:
        if other.top_k == one.top_k and other.declared == one.declared:
            continue  # as nearly always; what follows would take a while over many ranks
        for what, here, there in (
            ("experts a token (K)", one.top_k, other.top_k),
            ("columns of x_TD (D)", one.declared.hidden, other.declared.hidden),
            ("dtype of x_TD", _dtype(one.declared.x_dtype), _dtype(other.declared.x_dtype)),
            (
                "dtype of weights_TK",
                _dtype(one.declared.weights_dtype),
                _dtype(other.declared.weights_dtype),
            ),
            (
                "tensors that need a gradient",
                _learning(one.declared.learns),
                _learning(other.declared.learns),
            ),
        ):
            if here != there:
                raise ValueError(
                    f"ranks differ in the {what}: {here} on rank {first}, {there} on rank {rank}; "
                    "give all ranks of an expert group tensors of one kind"
                )


def _code(dtype: torch.dtype) -> int:
    return 1 + (_DTYPES.index(dtype) if dtype in _DTYPES else len(_DTYPES))


def _dtype(code: int) -> str:
    names = ("not known", *map(str, _DTYPES))
    return names[code] if code < len(names) else "another"


def _learning(learns: int) -> str:
    if not learns:
        return "not known"
    names = [name for bit, name in ((2, "x_TD"), (4, "weights_TK")) if (learns - 1) & bit]
    return " and ".join(names) or "none"
