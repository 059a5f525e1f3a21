"""ZeRO-1: each rank updates a share of every parameter that its group holds.

Of the ranks that hold the same parameters (data-parallel ones; for experts those with the same
experts), each keeps optimizer states of a share only: P_os of Rajbhandari et al., "ZeRO" (arXiv
1910.02054, section 5.1). A parameter is cut in its flattened form into nearly equal stretches, by
nothing but its size and that of the group: so ranks of other groups that hold the same parameter (a
stage held twice, a tied weight) cut alike, and their shares can be summed.

Gradients are reduced so that each rank has the sum of its shares; parameters are gathered when all
have updated theirs. Both go in buckets of parameters, all shares of one rank side by side:

    a bucket of a [5] and b [4], two ranks:    | a0 a1 b0 b1 .  | a2 a3 a4 b2 b3 |

Both are started and waited for apart, so that they run beside the work of other stages. All ranks
of a group must start them in the same order, which they do if they run the same row of a schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from ..comm.collectives import Pending, start_all_gather, start_reduce_scatter
from ..comm.marks import mark
from ..comm.waiting import WaitBoard
from .accumulate import accumulate_in_float32, grad_dtype
from .zero_ends import BUCKET_BYTES


class Share(NamedTuple):
    """What this rank updates of a parameter.

    Attributes:
        parameter: [n], a view of the whole parameter's elements: to change one changes the other.
            Its `.grad` is the share of the gradient.
        start: of these elements in the flattened parameter.
    """

    parameter: Parameter
    start: int


def bounds(numel: int, num_shares: int) -> list[int]:
    """Where the shares of a parameter begin, and at last where they end: [num_shares + 1]."""
    return [numel * i // num_shares for i in range(num_shares + 1)]


class Sharing(Protocol):
    """What is known of shares by those who read or change them between steps."""

    @property
    def shares(self) -> Mapping[str, Share]:
        """By the parameter's name."""
        ...

    def start_gather(self) -> None:
        """Start to bring every rank's shares, as they are now, into all ranks' wholes."""
        ...

    def finish_gather(self, stage: int | None = None) -> None:
        """Return when the parameters of a stage, or of all, are whole."""
        ...


class Shards:
    """This rank's shares of its parameters, and the collectives between shares and wholes.

    Args:
        stages: this rank's parameters by name, by stage, in the order in which stages begin a
            step. A parameter may be held by several stages, by the same name.
        group_of: the ranks that hold the same parameter and see other data; None for this alone.
        scale: factor of the gradients, applied after the sum.
        bucket_bytes: of gradients that are reduced in one message; a larger one goes alone.
        board: where waits are announced.

    Attributes:
        shares: by the parameter's name.
    """

    def __init__(
        self,
        stages: Mapping[int, Mapping[str, Parameter]],
        group_of: Callable[[Parameter], dist.ProcessGroup | None],
        *,
        scale: float = 1.0,
        bucket_bytes: int = BUCKET_BYTES,
        board: WaitBoard | None = None,
    ) -> None:
        self._scale = scale
        # A parameter of several stages is complete when the last of them is, and needed when the
        # first of them begins: what goes together is what the same stages hold.
        holders: dict[str, tuple[int, ...]] = {}
        whole: dict[str, Parameter] = {}
        for stage, named in stages.items():
            for name, parameter in named.items():
                holders[name] = (*holders.get(name, ()), stage)
                whole[name] = parameter
        self._buckets: dict[tuple[int, ...], list[_Bucket]] = {}
        for unit in dict.fromkeys(holders.values()):
            named = {name: whole[name] for name, stages in holders.items() if stages == unit}
            self._buckets[unit] = list(_buckets(named, group_of, bucket_bytes, board))
        self.shares: Mapping[str, Share] = {
            name: share
            for buckets in self._buckets.values()
            for bucket in buckets
            for name, share in bucket.shares.items()
        }
        self._ended: set[int] = set()
        self._reducing: dict[tuple[int, ...], list[_Reducing]] = {}
        self._gathering: dict[tuple[int, ...], list[tuple[_Bucket, Tensor, Pending]]] = {}

    @property
    def instead(self) -> dict[Parameter, Parameter]:
        """The share of each whole parameter."""
        return {
            parameter: bucket.shares[name].parameter
            for buckets in self._buckets.values()
            for bucket in buckets
            for name, parameter in bucket.parameters.items()
        }

    def drop_gradients(self) -> None:
        """Begin anew: gradients of wholes and shares become None."""
        self._ended, self._reducing = set(), {}
        for parameter, share in self.instead.items():
            parameter.grad = share.grad = None

    @torch.no_grad()
    def end_stage(self, stage: int) -> None:
        """A stage's gradients are complete: start to reduce those that no other stage adds to.

        They leave `.grad` of the wholes. What only some ranks have a gradient of counts as zero on
        the others.
        """
        self._ended.add(stage)
        for unit, buckets in self._buckets.items():
            if unit not in self._reducing and self._ended.issuperset(unit):
                with mark(f"reduce-scatter of stage {stage}"):
                    self._reducing[unit] = [bucket.start_reduce() for bucket in buckets]

    @torch.no_grad()
    def finish_gradients(self) -> None:
        """Every share's `.grad` becomes its mean gradient, None where no rank has one.

        Stages that have not ended by themselves are ended here.

        Raises:
            CommError: a rank of a group is gone or did not answer in time.
        """
        for stage in dict.fromkeys(s for unit in self._buckets for s in unit):
            if stage not in self._ended:
                self.end_stage(stage)
        for unit, started in self._reducing.items():
            for bucket, reducing in zip(self._buckets[unit], started, strict=True):
                bucket.finish_reduce(reducing, self._scale)
        self._reducing = {}

    @torch.no_grad()
    def start_gather(self) -> None:
        """Start to bring every rank's shares, as they are now, into all ranks' wholes."""
        assert not self._gathering
        for unit, buckets in self._buckets.items():
            with mark(f"all-gather of stage {unit[0]}"):
                self._gathering[unit] = [
                    (bucket, *bucket.start_gather())
                    for bucket in buckets
                    if bucket.group is not None
                ]

    @torch.no_grad()
    def finish_gather(self, stage: int | None = None) -> None:
        """Return when the parameters of a stage, or of all, are whole.

        Raises:
            CommError: a rank of a group is gone or did not answer in time.
        """
        for unit in list(self._gathering):
            if stage is None or stage in unit:
                for bucket, gathered, pending in self._gathering.pop(unit):
                    pending.wait()
                    bucket.fill(gathered)


class _Reducing(NamedTuple):
    """A bucket's gradients on their way.

    Attributes:
        sums: [shares + flags], this rank's once it is done.
        all_have: this rank had a gradient of every parameter.
        pending: None where there is nothing to wait for.
    """

    sums: Tensor
    all_have: bool
    pending: Pending | None


@dataclass
class _Bucket:
    """Parameters of one dtype, device and group that go in one message.

    Attributes:
        parameters: whole, by name.
        group: None for this rank alone.
        board: where waits are announced.
    """

    parameters: Mapping[str, Parameter]
    group: dist.ProcessGroup | None
    board: WaitBoard | None

    def __post_init__(self) -> None:
        self._num = 1 if self.group is None else self.group.size()
        rank = 0 if self.group is None else self.group.rank()
        self._bounds = [bounds(p.numel(), self._num) for p in self.parameters.values()]
        # The largest rank's shares; others are padded to it.
        self._length = max(sum(b[i + 1] - b[i] for b in self._bounds) for i in range(self._num))
        self._flat = [p.detach().view(-1) for p in self.parameters.values()]
        self.shares = {
            name: Share(Parameter(flat[b[rank] : b[rank + 1]]), b[rank])
            for name, flat, b in zip(self.parameters, self._flat, self._bounds, strict=True)
        }
        accumulate_in_float32(share.parameter for share in self.shares.values())

    def start_reduce(self) -> _Reducing:
        """Take the gradients from the wholes; a flag for each tells who had one."""
        wholes = list(self.parameters.values())
        have = [p.grad is not None for p in wholes]
        dtype, device = grad_dtype(wholes[0]), wholes[0].device
        flags = torch.tensor(have, dtype=dtype, device=device)
        grads = [_gradient(p, dtype) for p in wholes]
        for parameter in wholes:
            parameter.grad = None
        rows: list[Tensor] = []
        for i in range(self._num):
            rows += [*self._padded(self._cut(grads, i)), flags]
        packed = torch.cat(rows)
        if self.group is None:
            return _Reducing(packed, all(have), None)
        sums = packed.new_empty(self._length + len(flags))
        what = f"a share of the gradients of {self._name}"
        pending = start_reduce_scatter(sums, packed, self.group, what, board=self.board)
        return _Reducing(sums, all(have), pending)

    def finish_reduce(self, reducing: _Reducing, scale: float) -> None:
        """Give the shares their gradients."""
        if reducing.pending is not None:
            reducing.pending.wait()
        sums, flags = reducing.sums.split([self._length, len(self.parameters)])
        if scale != 1.0:
            sums.mul_(scale)
        # Reading flags back would stop a GPU; where this rank had all, nothing needs deciding.
        num_with = [1.0] * len(flags) if reducing.all_have else flags.tolist()
        sizes = [share.parameter.numel() for share in self.shares.values()]
        pieces = sums[: sum(sizes)].split(sizes)
        for share, piece, num in zip(self.shares.values(), pieces, num_with, strict=True):
            share.parameter.grad = piece if num else None

    def start_gather(self) -> tuple[Tensor, Pending]:
        """This rank's shares to all others; returns where theirs arrive."""
        assert self.group is not None
        mine = [share.parameter for share in self.shares.values()]
        packed = torch.cat(self._padded(mine))
        gathered = packed.new_empty(self._num * self._length)
        what = f"the updated parameters {self._name}"
        return gathered, start_all_gather(gathered, packed, self.group, what, board=self.board)

    def fill(self, gathered: Tensor) -> None:
        """Put every rank's shares into the wholes."""
        pieces: list[list[Tensor]] = [[] for _ in self._bounds]
        for i, row in enumerate(gathered.split(self._length)):
            sizes = [b[i + 1] - b[i] for b in self._bounds]
            for of_parameter, piece in zip(pieces, row[: sum(sizes)].split(sizes), strict=True):
                of_parameter.append(piece)
        for flat, of_parameter in zip(self._flat, pieces, strict=True):
            # By an operation that moves the version, by which FP8 weights learn of the change.
            torch.cat(of_parameter, out=flat)

    @property
    def _name(self) -> str:
        first = next(iter(self.parameters))
        rest = len(self.parameters) - 1
        return f"{first} and {rest} more" if rest else first

    def _cut(self, flat: Sequence[Tensor], i: int) -> list[Tensor]:
        return [t[b[i] : b[i + 1]] for t, b in zip(flat, self._bounds, strict=True)]

    def _padded(self, shares: Sequence[Tensor]) -> list[Tensor]:
        missing = self._length - sum(share.numel() for share in shares)
        return [*shares, shares[0].new_zeros(missing)]


def _buckets(
    named: Mapping[str, Parameter],
    group_of: Callable[[Parameter], dist.ProcessGroup | None],
    bucket_bytes: int,
    board: WaitBoard | None,
) -> Iterable[_Bucket]:
    """What is alike, in the order of the parameters, cut where a bucket is full."""
    kinds: dict[object, list[str]] = {}
    for name, parameter in named.items():
        kind = (id(group_of(parameter)), parameter.dtype, parameter.device)
        kinds.setdefault(kind, []).append(name)
    for names in kinds.values():
        group = group_of(named[names[0]])
        full: dict[str, Parameter] = {}
        size = 0
        for name in names:
            num_bytes = named[name].numel() * grad_dtype(named[name]).itemsize
            if full and size + num_bytes > bucket_bytes:
                yield _Bucket(full, group, board)
                full, size = {}, 0
            full[name] = named[name]
            size += num_bytes
        yield _Bucket(full, group, board)


def _gradient(parameter: Parameter, dtype: torch.dtype) -> Tensor:
    """The flattened gradient, zeros where there is none."""
    if parameter.grad is None:
        return torch.zeros(parameter.numel(), dtype=dtype, device=parameter.device)
    return parameter.grad.reshape(-1)
