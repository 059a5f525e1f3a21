"""What `counterflow traffic --json` prints."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np

from ..comm.cost import Cost
from ..comm.dispatch.balance import imbalance
from ..comm.traffic import Ints, across_nodes, node_matrix

if TYPE_CHECKING:
    from .traffic_command import Answer

# So many of the tokens that go beyond the limit are named.
_NAMED = 10


def to_json(answer: Answer) -> dict[str, object]:
    """One object; bytes as whole numbers, times in milliseconds."""
    options, routes = answer.options, answer.routes
    limit = options.checked_limit
    beyond = routes.beyond(routes.grid.num_nodes if limit is None else limit)
    return {
        "routing": options.routing or str(options.file),
        "skew": options.skew if options.routing == "random" else None,
        "seed": options.seed if options.routing == "random" else None,
        "groups": options.groups if options.routing in ("random", "balanced") else None,
        "ranks": routes.grid.num_ranks,
        "nodes": routes.grid.num_nodes,
        "ranks_per_node": routes.grid.ranks_per_node,
        "experts": routes.layout.num_experts,
        "slots": routes.layout.num_slots,
        "tokens": len(routes.source_T),
        "top_k": routes.slots_TK.shape[1],
        "hidden": options.sizes.hidden,
        "payload": options.sizes.payload.name,
        "links": asdict(options.links),
        "chunks": options.chunks,
        "pieces": answer.pieces,
        "node_limit": limit,
        "beyond_node_limit": len(beyond),
        "first_beyond": [{"rank": r, "token": t} for r, t in beyond[:_NAMED].tolist()],
        "nodes_per_token": _spread(routes.nodes_per_token),
        "remote_nodes_per_token": _spread(routes.remote_nodes_per_token),
        "ranks_per_token": _spread(routes.ranks_per_token),
        "rows_per_rank": routes.rows_per_rank.tolist(),
        "rows_per_slot": routes.rows_per_slot.tolist(),
        "rank_imbalance": imbalance(routes.rows_per_rank),
        "slot_imbalance": imbalance(routes.rows_per_slot),
        "matrix_phase": options.phase,
        "backends": {backend: _backend(answer, backend) for backend in answer.traffics},
    }


def _spread(counts: Ints) -> dict[str, object]:
    return {
        "histogram": np.bincount(counts).tolist(),
        "mean": float(counts.mean()) if len(counts) else 0.0,
        "max": int(counts.max(initial=0)),
    }


def _backend(answer: Answer, backend: str) -> dict[str, object]:
    traffic = answer.traffics[backend]
    sent = answer.bytes_of(backend)
    hops = range(1, len(traffic.hops) + 1)
    return {
        "phases": {
            phase: _phase(answer, backend, phase, cost)
            for phase, cost in answer.costs[backend].items()
        },
        "rank_bytes": sent.tolist(),
        "node_bytes": node_matrix(sent, traffic.grid).tolist(),
        "hops": [
            {"name": traffic.hops[i - 1].name, "rank_bytes": answer.bytes_of(backend, i).tolist()}
            for i in hops
        ],
    }


def _phase(answer: Answer, backend: str, phase: str, cost: Cost) -> dict[str, object]:
    traffic, sizes = answer.traffics[backend], answer.options.sizes
    sent = traffic.rank_bytes(phase, sizes)
    away = across_nodes(traffic.grid)
    return {
        "record_bytes": traffic.record_bytes(phase, sizes),
        "across_bytes": int(sent[away].sum()),
        "inside_bytes": int(sent[~away].sum()),
        "local_bytes": int(traffic.local_bytes(phase, sizes).sum()),
        "most_sent_bytes": int(sent.sum(axis=1).max()),
        "most_received_bytes": int(sent.sum(axis=0).max()),
        "ms": cost.ms,
        "latency_ms": cost.latency_ms,
        "transfer_ms": cost.transfer_ms,
        "hop_ms": [hop.transfer_ms for hop in cost.hops],
        "bound_by": cost.bound_by,
    }
