"""What ranks on several hosts do to have the bytes of a dispatch and a combine counted.

DeepSeek-V3's routing shape: 8 experts a token, in at most 4 of 8 groups, chosen by the model's own
router. Ranks are numbered host by host. T tokens of a rank, D hidden, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from counterflow.comm import Dispatcher, dispatcher
from counterflow.comm.dispatch.payload import PayloadName
from counterflow.model.config import ModelConfig
from counterflow.model.router import Router, Routing
from counterflow.parallel import Mesh, MeshShape

from .cases_hosts import counted


class Way(NamedTuple):
    """A dispatcher and the format in which it sends rows."""

    name: str
    payload: PayloadName

    def __str__(self) -> str:
        return f"{self.name} {'fp8' if self.payload == 'fp8' else 'bf16'}"


class Sizes(NamedTuple):
    """Sizes of an exchange: experts altogether, tokens of a rank, values of a row."""

    num_experts: int
    tokens: int
    hidden: int


# Rows are bfloat16, so "exact" sends bfloat16.
PAYLOADS: tuple[PayloadName, ...] = ("exact", "fp8")
WAYS = tuple(Way(name, p) for name in ("flat", "dedup", "two_hop") for p in PAYLOADS)


def routing(rank: int, sizes: Sizes) -> Routing:
    """Where this rank's tokens go: the router of one layer on random tokens."""
    channels = 32  # as far as the router sees; which experts win does not depend on it
    config = ModelConfig(hidden_size=channels, n_routed_experts=sizes.num_experts)
    router = Router(config, dtype=torch.float32)
    with torch.no_grad():
        random = torch.Generator().manual_seed(5)  # one router on all ranks
        router.weight.normal_(std=0.3, generator=random)
        random.manual_seed(100 + rank)
        return router(torch.randn(1, sizes.tokens, channels, generator=random))


def crossing_rows(
    experts: Sequence[Tensor], ranks_per_host: int, num_experts: int
) -> dict[str, int]:
    """Rows that have to cross between hosts, by dispatcher: counted token by token.

    Args:
        experts: [T, K] of each rank.
    """
    per_rank = num_experts // len(experts)
    rows = {"flat": 0, "dedup": 0, "two_hop": 0}
    for source, experts_TK in enumerate(experts):
        here = source // ranks_per_host
        for chosen in experts_TK.tolist():
            away = [e // per_rank for e in chosen if e // per_rank // ranks_per_host != here]
            rows["flat"] += len(away)
            rows["dedup"] += len(set(away))
            rows["two_hop"] += len({r // ranks_per_host for r in away})
    return rows


def mesh_of_hosts(world: int, ranks_per_host: int) -> Mesh:
    """One expert group over all ranks."""
    nodes = [rank // ranks_per_host for rank in range(world)]
    return Mesh.create(MeshShape(1, world, world), nodes=nodes)


def make(way: Way, mesh: Mesh, sizes: Sizes) -> Dispatcher[Any]:
    return dispatcher(way.name, mesh, num_experts=sizes.num_experts, payload=way.payload)


def exchanged(
    rank: int, world: int, ranks_per_host: int, ways: Sequence[Way], sizes: Sizes
) -> dict[Way, dict[str, Any]]:
    """One dispatch and one combine each way: bytes that left this host, and what was meant to.

    The least of three measurements.

    Returns:
        By way: "link" (only of each host's first rank, zeros of the others) and "sent", both by
        operation, bytes to other hosts: of the whole host at its link, and of this rank as the
        dispatcher says.
    """
    own = rank // ranks_per_host
    away = [r for r in range(world) if r // ranks_per_host != own]
    route = routing(rank, sizes)
    x_TD = torch.randn(sizes.tokens, sizes.hidden).bfloat16()
    mesh = mesh_of_hosts(world, ranks_per_host)
    found: dict[Way, dict[str, Any]] = {}
    with torch.no_grad():
        for way in ways:
            links: list[tuple[int, int]] = []
            d = make(way, mesh, sizes)
            for _ in range(3):  # a busy machine acknowledges more often, and may send twice
                d.sent_bytes.clear()
                out, dispatch = counted(lambda d=d: d.dispatch(x_TD, *route))
                _, combine = counted(lambda d=d, out=out: d.combine(out.rows_ND, out.handle))
                links.append((dispatch.link.tx_bytes, combine.link.tx_bytes))
            least = [min(of_operation) for of_operation in zip(*links, strict=True)]
            link = dict(zip(("dispatch(F)", "combine(F)"), least, strict=True))
            found[way] = {
                "link": link if rank % ranks_per_host == 0 else dict.fromkeys(link, 0),
                "sent": {name: sum(d.sent_bytes[name][r] for r in away) for name in link},
            }
    return found
