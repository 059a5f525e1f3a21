"""How ranks are laid out: world = pp x dp, with experts sharded over ep ranks inside dp.

Global rank = pp_rank * dp + dp_rank, and dp_rank = replica * ep + ep_rank: the ranks of one expert
group are contiguous, so that they share nodes as far as possible, and experts are replicated over
dp / ep groups, as DeepSeek-V3 does (PP16, EP64, DP128; arXiv 2412.19437, section 3.2).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

from ..comm.topology import gather_topology, warn_of_spread
from ..comm.waiting import WaitBoard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from ..comm.dispatch.lane import Lane


@dataclass(frozen=True)
class MeshShape:
    """Sizes of the mesh, checked: an impossible one raises ValueError with the reason.

    Attributes:
        pp: pipeline ranks.
        dp: data-parallel ranks of each pipeline rank.
        ep: expert-parallel ranks; divides dp.
    """

    pp: int = 1
    dp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for name in ("pp", "dp", "ep"):
            _require_size(f"mesh.{name}", getattr(self, name))
        if self.dp % self.ep:
            raise ValueError(
                f"mesh.ep={self.ep} must divide mesh.dp={self.dp}: experts are sharded over ep of "
                f"the dp ranks; choose ep from {_divisors(self.dp)} or another dp"
            )

    @classmethod
    def fit(cls, world_size: int, *, pp: int = 1, ep: int = 1) -> MeshShape:
        """The shape with dp = world_size / pp."""
        _require_size("the number of processes", world_size)
        _require_size("mesh.pp", pp)
        if world_size % pp:
            raise ValueError(
                f"mesh.pp={pp} does not divide the {world_size} processes that were started; "
                f"choose pp from {_divisors(world_size)} or start a multiple of {pp}"
            )
        return cls(pp, world_size // pp, ep)

    @property
    def world_size(self) -> int:
        return self.pp * self.dp

    def require_world_size(self, world_size: int) -> None:
        """Raise ValueError unless exactly `world_size` processes make up this mesh."""
        if world_size != self.world_size:
            raise ValueError(
                f"mesh pp={self.pp} x dp={self.dp} needs {self.world_size} processes, but "
                f"{world_size} were started; start {self.world_size} or change mesh.pp or mesh.dp"
            )

    def require_experts(self, num_experts: int) -> None:
        """Raise ValueError unless `num_experts` spread evenly over the ep ranks."""
        _require_size("the number of routed experts", num_experts)
        if num_experts % self.ep:
            raise ValueError(
                f"mesh.ep={self.ep} does not divide the model's {num_experts} routed experts; "
                f"choose ep from {_divisors(num_experts)}"
            )

    def rank(self, pp_rank: int, dp_rank: int) -> int:
        """Global rank at these coordinates."""
        if not (0 <= pp_rank < self.pp and 0 <= dp_rank < self.dp):
            raise ValueError(
                f"there is no rank at pp {pp_rank}, dp {dp_rank}: the mesh is pp={self.pp} x "
                f"dp={self.dp}"
            )
        return pp_rank * self.dp + dp_rank

    def pp_rank(self, rank: int) -> int:
        return rank // self.dp

    def dp_rank(self, rank: int) -> int:
        return rank % self.dp

    def ep_rank(self, rank: int) -> int:
        return self.dp_rank(rank) % self.ep

    def pp_peers(self, rank: int) -> tuple[int, ...]:
        """Global ranks of the pipeline that `rank` belongs to, in pipeline order."""
        return tuple(self.rank(p, self.dp_rank(rank)) for p in range(self.pp))

    def dp_peers(self, rank: int) -> tuple[int, ...]:
        """Global ranks that hold the same stages, in dp order."""
        return tuple(self.rank(self.pp_rank(rank), d) for d in range(self.dp))

    def ep_peers(self, rank: int) -> tuple[int, ...]:
        """Global ranks that share one set of experts, in ep order."""
        first = self.dp_rank(rank) - self.ep_rank(rank)
        return tuple(self.rank(self.pp_rank(rank), first + e) for e in range(self.ep))

    def edp_peers(self, rank: int) -> tuple[int, ...]:
        """Global ranks that hold the same experts (the expert-data-parallel group)."""
        return tuple(
            self.rank(self.pp_rank(rank), d) for d in range(self.ep_rank(rank), self.dp, self.ep)
        )


class Mesh:
    """One rank's place in the mesh, where every rank's node is, and its process groups.

    `Mesh.create` makes the groups; `Mesh(shape, rank, nodes)` alone makes none and needs no torch.
    Groups of one rank are None: collectives over them are no-ops.

    Attributes:
        shape: the sizes.
        rank, pp_rank, dp_rank, ep_rank: this process's coordinates.
        nodes: the node index of every global rank.
        pp_group, dp_group, ep_group, edp_group: process groups, ordered as in shape's `*_peers`.
        waits: what this rank is waiting for at the moment.
        dispatch_lane: runs the moves of all dispatchers over this mesh in one order, since they
            share groups; the first dispatcher makes it.
    """

    def __init__(self, shape: MeshShape, rank: int = 0, nodes: Sequence[int] | None = None) -> None:
        if not 0 <= rank < shape.world_size:
            raise ValueError(f"rank {rank} is outside the mesh of {shape.world_size} processes")
        self.shape = shape
        self.rank = rank
        self.nodes = tuple(nodes) if nodes is not None else (0,) * shape.world_size
        if len(self.nodes) != shape.world_size:
            raise ValueError(
                f"nodes names the node of {len(self.nodes)} ranks, the mesh has {shape.world_size}"
            )
        self.pp_rank = shape.pp_rank(rank)
        self.dp_rank = shape.dp_rank(rank)
        self.ep_rank = shape.ep_rank(rank)
        self.pp_group: ProcessGroup | None = None
        self.dp_group: ProcessGroup | None = None
        self.ep_group: ProcessGroup | None = None
        self.edp_group: ProcessGroup | None = None
        self.waits = WaitBoard()
        self.dispatch_lane: Lane | None = None
        self._made: dict[tuple[str, tuple[int, ...]], ProcessGroup | None] = {}

    @property
    def node(self) -> int:
        """The node that this rank is on."""
        return self.nodes[self.rank]

    @property
    def num_nodes(self) -> int:
        return len(set(self.nodes))

    @property
    def world_group(self) -> ProcessGroup | None:
        """All ranks; None where torch.distributed is not initialised."""
        import torch.distributed as dist

        return dist.group.WORLD if dist.is_initialized() else None

    @classmethod
    def create(
        cls,
        shape: MeshShape,
        *,
        nodes: Sequence[int] | None = None,
        timeout_s: float = 300.0,
    ) -> Mesh:
        """The mesh of this process, with its process groups.

        Args:
            shape: sizes; must fit the initialised world, or be 1 x 1 where torch.distributed is not
                initialised.
            nodes: node index of every rank; by default what torchrun, MPI or Slurm tells (see
                `comm.topology`), or else the hosts.
            timeout_s: limit of every collective in the groups, seconds.

        Raises:
            ValueError: the world does not fit; no group has been made then.
            CommError: a rank did not tell its node within the limit of torch.distributed's world.
        """
        import torch.distributed as dist

        if not dist.is_initialized():
            shape.require_world_size(1)
            return cls(shape, 0, nodes)
        shape.require_world_size(dist.get_world_size())
        rank = dist.get_rank()
        if nodes is None:
            nodes = gather_topology(timeout_s=timeout_s).nodes
        mesh = cls(shape, rank, nodes)
        if rank == 0:
            warn_of_spread((shape.ep_peers(r) for r in range(shape.world_size)), mesh.nodes)

        def group(peers_of: str) -> ProcessGroup | None:
            every = {getattr(shape, peers_of)(r) for r in range(shape.world_size)}
            return mesh._make_group(sorted(every), timeout_s)

        mesh.pp_group = group("pp_peers")
        mesh.dp_group = group("dp_peers")
        # Its own even where ep = dp, so that all-to-alls run beside the reduction of gradients.
        mesh.ep_group = group("ep_peers")
        mesh.edp_group = mesh.dp_group if shape.ep == 1 else group("edp_peers")
        return mesh

    def groups_within_pipelines(
        self, sets: Iterable[tuple[int, ...]], purpose: str, *, timeout_s: float = 300.0
    ) -> dict[tuple[int, ...], ProcessGroup]:
        """Process groups of sets of pipeline ranks, of this rank's own pipeline.

        A collective of the world: every rank asks for the same sets in the same order of calls.
        (torch's local synchronisation is no way out: it names a group by how many groups a rank has
        made already.) Groups once made are kept, by purpose.

        Args:
            sets: of pipeline ranks, each ascending; all that any rank needs.
            purpose: groups of different purposes are different, even of the same ranks.
            timeout_s: limit of every collective in the groups, seconds.

        Returns:
            The group of each set that this rank is in.
        """
        shape = self.shape
        for ranks in sorted(set(sets)):
            if (purpose, ranks) not in self._made:
                alike = [tuple(shape.rank(p, d) for p in ranks) for d in range(shape.dp)]
                self._made[purpose, ranks] = self._make_group(alike, timeout_s)
        found = ((ranks, self._made[purpose, ranks]) for ranks in sorted(set(sets)))
        return {ranks: group for ranks, group in found if group is not None}

    def group_among(
        self,
        sets: Iterable[tuple[int, ...]],
        purpose: str,
        *,
        timeout_s: float = 300.0,
        most_blocks: int | None = None,
    ) -> ProcessGroup | None:
        """This rank's process group among these sets of global ranks, which share no rank.

        A collective of the world, as `groups_within_pipelines`.

        Args:
            sets: each ascending, the same on all ranks.
            purpose: groups of different purposes are different, even of the same ranks.
            timeout_s: limit of every collective in the groups, seconds.
            most_blocks: that a kernel of NCCL launches in them, each of which takes an SM; None
                leaves it to NCCL. A group of another number is another group.

        Returns:
            None where this rank is alone in its set, or in none.
        """
        every = sorted(set(sets))
        if most_blocks is not None:
            purpose = f"{purpose}, of {most_blocks} blocks"
        key = (purpose, next((ranks for ranks in every if self.rank in ranks), ()))
        if key not in self._made:
            self._made[key] = self._make_group(every, timeout_s, most_blocks)
        return self._made[key]

    def _make_group(
        self, every: Iterable[tuple[int, ...]], timeout_s: float, most_blocks: int | None = None
    ) -> ProcessGroup | None:
        """Make a group of each of these, none of one rank; returns the one that this rank is in."""
        import torch.distributed as dist

        several = [ranks for ranks in every if len(ranks) > 1]
        if not several:
            return None
        # Headers of CUDA transfers are CPU tensors, which need gloo beside NCCL.
        backend = "cpu:gloo,cuda:nccl" if dist.get_backend() == "nccl" else None
        options = None if most_blocks is None else _nccl_options(most_blocks, timeout_s)
        mine = None
        # Every rank makes every group, in one order: new_group is a collective of the world.
        for ranks in several:
            limit = timedelta(seconds=timeout_s)
            made = dist.new_group(list(ranks), timeout=limit, backend=backend, pg_options=options)
            if self.rank in ranks:  # elsewhere `made` is a mark, not a group
                mine = cast("ProcessGroup", made)
        return mine


def _nccl_options(most_blocks: int, timeout_s: float) -> Any:
    """Options of a process group of NCCL whose kernels launch so many blocks at most."""
    from torch.distributed import ProcessGroupNCCL  # pyright: ignore[reportAttributeAccessIssue]

    options = ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=timeout_s)
    options.config.max_ctas = most_blocks
    return options


def _require_size(what: str, size: object) -> None:
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"{what} must be a whole number from 1 up, got {size!r}")


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
