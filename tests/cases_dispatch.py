"""Dispatchers of all backends held against `reference`, by real ranks.

T tokens of a rank, D hidden, K experts a token, E experts, N rows of a rank.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from counterflow.comm import Dispatcher, dispatcher
from counterflow.comm.dispatch import ExpertLayout
from counterflow.comm.dispatch.grid import NodeGrid
from counterflow.comm.dispatch.payload import PayloadName
from counterflow.comm.dispatch.reference import Reference
from counterflow.fp8 import quantize_tiles
from counterflow.parallel.mesh import Mesh, MeshShape

E, K, D = 8, 3, 5
Name = Literal["flat", "dedup", "two_hop"]


@dataclass(frozen=True)
class Setting:
    """What a dispatcher is made with.

    Attributes:
        name: the backend.
        nodes: the node of each rank of the world.
        ep: ranks of an expert group; all of the world's if None.
        others: as of `dispatcher`.
    """

    name: Name
    nodes: tuple[int, ...]
    ep: int | None = None
    num_experts: int = E
    layout: ExpertLayout | None = None
    payload: PayloadName = "exact"
    alignment: int = 1
    node_limit: int | None = None
    chunks: int = 4

    @property
    def shape(self) -> MeshShape:
        return MeshShape(1, len(self.nodes), self.ep or len(self.nodes))

    def mesh(self) -> Mesh:
        return Mesh.create(self.shape, nodes=self.nodes)

    def make(self, mesh: Mesh, timeout_s: float = 60.0) -> Dispatcher[Any]:
        return dispatcher(
            self.name,
            mesh,
            num_experts=self.num_experts,
            layout=self.layout,
            payload=self.payload,
            alignment=self.alignment,
            node_limit=self.node_limit,
            chunks=self.chunks,
            timeout_s=timeout_s,
        )

    def reference(self, rank: int, batches: Sequence[Batch]) -> Reference:
        """Of the expert group of `rank`; `batches` by global rank."""
        ranks = self.shape.ep_peers(rank)
        layout = self.layout or ExpertLayout.contiguous(self.num_experts, len(ranks))
        if self.name == "two_hop":
            grid = NodeGrid.of([self.nodes[r] for r in ranks])
        else:
            grid = NodeGrid.one_node(len(ranks))
        experts = [batches[r].experts_TK for r in ranks]
        return Reference(self.name, layout, grid, experts, self.alignment, self.payload)


# Every backend, and two_hop on every way to lay four ranks on nodes, some of them in one hop.
SETTINGS = {
    "flat": Setting("flat", (0, 0, 0, 0)),
    "dedup": Setting("dedup", (0, 0, 0, 0)),
    "two_hop": Setting("two_hop", (0, 0, 1, 1)),
    "two_hop, ranks dealt to nodes in turn": Setting("two_hop", (0, 1, 0, 1)),
    "two_hop, a rank a node": Setting("two_hop", (0, 1, 2, 3)),
    "two_hop on one node": Setting("two_hop", (0, 0, 0, 0)),
    "two_hop within each pair of nodes": Setting("two_hop", (0, 1, 0, 1), ep=2),
    "dedup, one rank has all experts": Setting("dedup", (0, 0, 0, 0), ep=1),
    "flat, one rank has all experts": Setting("flat", (0, 0, 0, 0), ep=1),
}
EIGHT = {
    "two_hop on 2 x 4": Setting("two_hop", (0, 0, 0, 0, 1, 1, 1, 1)),
    "two_hop on 4 x 2": Setting("two_hop", (0, 1, 2, 3, 0, 1, 2, 3)),
    "dedup over 8": Setting("dedup", (0, 0, 0, 0, 1, 1, 1, 1)),
}


class Batch(NamedTuple):
    """What one rank's tokens are, and the gradient that comes back to them."""

    x_TD: Tensor
    experts_TK: Tensor
    weights_TK: Tensor
    grad_TD: Tensor


# Tokens of each rank, and which experts a routing may pick.
LOADS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "even": ((6, 6, 6, 6), tuple(range(E))),
    "uneven": ((1, 9, 4, 12, 3, 2, 0, 5), tuple(range(E))),
    "some without expert": ((4, 9, 3, 8), (-1, -1, *range(E))),
    "idle experts": ((5, 7, 3, 4), (0, 3, 6)),
    "one busy rank": ((5, 7, 3, 4), (6, 7)),
    "a rank without tokens": ((0, 7, 0, 4), tuple(range(E))),
    "no expert at all": ((5, 7, 3, 4), (-1,)),
    "no tokens at all": ((0, 0, 0, 0), tuple(range(E))),
}


def batch(
    rank: int,
    load: str,
    dtype: torch.dtype = torch.float64,
    weights_dtype: torch.dtype | None = None,
) -> Batch:
    """A rank's tokens; a token may name an expert twice."""
    tokens, allowed = LOADS[load]
    random = torch.Generator().manual_seed(100 + rank)
    T = tokens[rank]
    x_TD = torch.randn(T, D, generator=random, dtype=torch.float64).to(dtype)
    choice_TK = torch.randint(len(allowed), (T, K), generator=random)
    weights_TK = torch.rand(T, K, generator=random, dtype=torch.float64).to(weights_dtype or dtype)
    grad_TD = torch.randn(T, D, generator=random, dtype=torch.float64).to(dtype)
    return Batch(x_TD, torch.tensor(allowed)[choice_TK], weights_TK, grad_TD)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Also where == differs from it: -0 and 0, NaN."""
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )


def same(a: Tensor | list[int], b: Tensor | list[int]) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and same_bits(a, b)
    return a == b


def through(
    rows_ND: Tensor, weights_N: Tensor, local_experts: Sequence[int], counts: Sequence[int]
) -> Tensor:
    """Experts of which each row comes out the same whatever the rows beside it are."""
    factors = torch.tensor([0.25 * (e + 1) for e in local_experts], dtype=rows_ND.dtype)
    factor_N = factors.repeat_interleave(torch.tensor(counts))
    return (rows_ND.square() * factor_N[:, None] * weights_N[:, None]).to(rows_ND.dtype)


class Found(NamedTuple):
    """What one rank sees of a dispatch, its experts, a combine, and their backwards."""

    rows_ND: Tensor
    weights_N: Tensor
    counts: list[int]
    y_TD: Tensor
    grad_x_TD: Tensor
    grad_weights_TK: Tensor


def same_found(a: Found, b: Found) -> bool:
    return all(same(x, y) for x, y in zip(a, b, strict=True))


def found_by(d: Dispatcher[Any], given: Batch) -> tuple[Found, Any]:
    """By the dispatcher, in the differentiable form; also the tiles, if any."""
    x_TD = given.x_TD.clone().requires_grad_()
    weights_TK = given.weights_TK.clone().requires_grad_()
    out = d.dispatch(x_TD, given.experts_TK, weights_TK)
    rows_ND = through(out.rows_ND, out.weights_N, d.local_experts, out.counts)
    y_TD = d.combine(rows_ND, out.handle)
    y_TD.backward(given.grad_TD)
    assert x_TD.grad is not None
    assert weights_TK.grad is not None
    found = (out.rows_ND.detach(), out.weights_N.detach(), out.counts, y_TD.detach())
    return Found(*found, x_TD.grad, weights_TK.grad), out.tiles


def expected_by(reference: Reference, batches: Sequence[Batch]) -> list[Found]:
    """By the reference, for all ranks of the group; `batches` by ep rank."""
    rows = [t.requires_grad_() for t in reference.spread([b.x_TD for b in batches])]
    weights = [
        t.requires_grad_() for t in reference.spread_weights([b.weights_TK for b in batches])
    ]
    experts = [reference.layout.experts_of(r) for r in range(len(batches))]
    parts = zip(rows, weights, experts, reference.counts, strict=True)
    outputs = [through(*part) for part in parts]
    y = reference.gather([o.detach() for o in outputs])
    for output, grad in zip(outputs, reference.spread([b.grad_TD for b in batches]), strict=True):
        output.backward(grad)
    grad_x = reference.gather([_grad(t) for t in rows])
    grad_weights = reference.gather_weights([_grad(t) for t in weights])
    return [
        Found(rows[r].detach(), weights[r].detach(), reference.counts[r], y[r], grad_x[r], of_k)
        for r, of_k in enumerate(grad_weights)
    ]


def _grad(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def deviations(setting: Setting, mesh: Mesh, batches: Sequence[Batch]) -> list[str]:
    """What of this rank's is not bit for bit the reference's; `batches` by global rank."""
    d = setting.make(mesh)
    found, tiles = found_by(d, batches[mesh.rank])
    mine = [batches[r] for r in mesh.shape.ep_peers(mesh.rank)]
    reference = setting.reference(mesh.rank, batches)
    expected = expected_by(reference, mine)[mesh.ep_rank]
    wrong = [
        what for what, a, b in zip(Found._fields, found, expected, strict=True) if not same(a, b)
    ]
    if (tiles is None) != (setting.payload != "fp8"):
        wrong.append("whether there are tiles")
    if tiles is not None and not _right_tiles(tiles, reference, mine, mesh.ep_rank):
        wrong.append("tiles")
    bytes_ = expected_bytes(setting, reference, batches[mesh.rank], mesh.ep_rank)
    wrong += [
        f"bytes of {name}: {d.sent_bytes[name]} is not {sent}"
        for name, sent in bytes_.items()
        if d.sent_bytes[name] != sent
    ]
    nodes = [setting.nodes[r] for r in mesh.shape.ep_peers(mesh.rank)]
    away = [r for r, node in enumerate(nodes) if node != mesh.node]
    if d.crossed_bytes != sum(sent[r] for sent in bytes_.values() for r in away):
        wrong.append("bytes to other nodes")
    return wrong


def _right_tiles(tiles: Any, reference: Reference, batches: Sequence[Batch], ep_rank: int) -> bool:
    """Whether tiles are each row's own, and zeros in padding."""
    quantised = [quantize_tiles(b.x_TD) for b in batches]
    for n, origin in enumerate(reference.origins[ep_rank]):
        found = tiles.values[n], tiles.scales[n]
        if origin is None:
            right = tuple(torch.zeros_like(t) for t in found)
        else:
            values, scales = quantised[origin.source]
            right = values[origin.token], scales[origin.token]
        if not all(same_bits(a, b) for a, b in zip(found, right, strict=True)):
            return False
    return len(tiles.values) == len(reference.origins[ep_rank])


C_TYPES: dict[torch.dtype, Any] = {
    torch.float64: ctypes.c_double,
    torch.float32: ctypes.c_float,
    torch.bfloat16: ctypes.c_uint16,
    torch.float16: ctypes.c_uint16,
    torch.int16: ctypes.c_int16,
    torch.uint8: ctypes.c_uint8,
}


def struct_bytes(*parts: tuple[torch.dtype, int]) -> int:
    """The size of a C struct of these arrays (dtype, length), which is how records are laid out."""
    fields = [(f"f{i}", C_TYPES[dtype] * n) for i, (dtype, n) in enumerate(parts)]
    return ctypes.sizeof(type("Record", (ctypes.Structure,), {"_fields_": fields}))


def record_bytes(setting: Setting, given: Batch, *, first: bool = True) -> dict[str, int]:
    """Bytes of a record in each operation; the `first` dispatch of a handle has the slots too."""
    hidden, top_k = given.x_TD.shape[1], given.weights_TK.shape[1]
    tiles = (torch.float32, -(-hidden // 128))
    back = [(given.x_TD.dtype if setting.payload == "exact" else torch.bfloat16, hidden)]
    if setting.payload == "logfmt10":
        back = [(torch.uint8, -(-hidden // 4) * 5), tiles, tiles]
    there = back
    if setting.payload in ("fp8", "logfmt8"):
        there = [(torch.uint8, hidden), *([tiles] if setting.payload == "fp8" else [tiles, tiles])]
    choices = 1 if setting.name == "flat" else top_k
    weights = (given.weights_TK.dtype, choices)
    slots = [(torch.int16, choices)] if first else []
    return {
        "dispatch(F)": struct_bytes(*there, weights, *slots),
        "combine(F)": struct_bytes(*back),
        "combine(B)": struct_bytes(*there),
        "dispatch(B)": struct_bytes(*back, weights),
    }


def expected_bytes(
    setting: Setting, reference: Reference, given: Batch, ep_rank: int
) -> dict[str, list[int]]:
    """What `sent_bytes` must be after one pass: records, counted by token, times their size."""
    there = reference.records()
    back = [list(column) for column in zip(*there, strict=True)]
    return {
        name: [
            size * n for n in (back if name in ("combine(F)", "dispatch(B)") else there)[ep_rank]
        ]
        for name, size in record_bytes(setting, given).items()
    }


def on_meshes(settings: Sequence[Setting]) -> Iterator[tuple[Setting, Mesh]]:
    """Each setting with its mesh; those of one shape on the same nodes share theirs."""
    made: dict[Any, Mesh] = {}
    for setting in settings:
        place = setting.shape, setting.nodes
        if place not in made:
            made[place] = setting.mesh()
        yield setting, made[place]


def exact(
    rank: int,
    world: int,
    settings: Sequence[Setting],
    given: Sequence[tuple[str, torch.dtype, torch.dtype]],
) -> list[str]:
    """Deviations from the reference, over settings and (load, dtype, dtype of weights)."""
    wrong = []
    for setting, mesh in on_meshes(settings):
        for load, dtype, weights_dtype in given:
            batches = [batch(r, load, dtype, weights_dtype) for r in range(world)]
            found = deviations(setting, mesh, batches)
            wrong += [f"{setting}, {load}, {dtype}: {what}" for what in found]
    return wrong
