"""What ranks do in tests of dispatch in two steps."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from counterflow.comm import Dispatcher, dispatcher
from counterflow.comm.dispatch.staged import StagedDispatch
from counterflow.parallel import Mesh, MeshShape

Name = Literal["flat", "dedup", "two_hop"]


class Touched(TorchDispatchMode):
    """Notes the storages of everything that operators are given."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = tree_leaves((args, kwargs))
        self.storages |= {storage(t) for t in given if isinstance(t, Tensor)}
        return func(*args, **(kwargs or {}))


def storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def make(world: int, name: Name) -> Dispatcher[Any]:
    mesh = Mesh.create(MeshShape(1, world, world), nodes=(0, 0, 1, 1))
    return dispatcher(name, mesh, num_experts=8, timeout_s=60)


def inputs(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(rank)
    x_TD = torch.randn(5, 6, generator=random)
    return x_TD, torch.randint(0, 8, (5, 2), generator=random), torch.rand(5, 2, generator=random)


def same_as_in_one_step(rank: int, world: int, name: Name) -> bool:
    ways, (x_TD, experts_TK, weights_TK) = make(world, name), inputs(rank)
    one = ways.dispatch(x_TD, experts_TK, weights_TK)
    pending = StagedDispatch(ways, x_TD, experts_TK, weights_TK, (True, True)).start()
    other = pending.finish()
    back = ways.start_combine(other.rows_ND, other.handle).finish()
    return (
        torch.equal(one.rows_ND, other.rows_ND)
        and torch.equal(one.weights_N, other.weights_N)
        and one.counts == other.counts
        and torch.equal(ways.combine(one.rows_ND, one.handle), back)
    )


def touched_by_counts(rank: int, world: int, name: Name) -> int:
    """How many of the device's tensors the end of the exchange of counts works on."""
    ways, (_, experts_TK, _) = make(world, name), inputs(rank)
    pending = ways.start_preprocess(experts_TK)
    pending = pending.then(lambda handle: handle)
    with Touched() as touched:
        handle = pending.finish()
    of_device = [experts_TK, handle.slots_TK, handle.first_rows]
    return sum(storage(x) in touched.storages for x in of_device)


def refused(rank: int, world: int) -> str:
    """What a rank is told when one of them has a weight that is not a number."""
    ways, (x_TD, experts_TK, weights_TK) = make(world, "dedup"), inputs(rank)
    if rank == 1:
        weights_TK[0, 0] = torch.nan
    try:
        StagedDispatch(ways, x_TD, experts_TK, weights_TK, (False, False)).start().finish()
    except ValueError as error:
        return str(error)
    return ""
