"""What ranks do in tests/comm/test_traffic.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from counterflow.comm import dispatcher
from counterflow.comm.dispatch import ExpertLayout
from counterflow.parallel.mesh import Mesh, MeshShape

NODES = (0, 1, 0, 1)
LAYOUT = ExpertLayout(6, 4, (5, 0, 1, 2, 0, 3, 4, 0))  # expert 0 has three slots
HIDDEN, TOP_K = 130, 3


def experts_of(rank: int) -> Any:
    """[T, K] of a rank; T differs by rank and is 0 on one; some choices are no expert."""
    rng = np.random.default_rng(rank)
    return rng.integers(-1, LAYOUT.num_experts, (7 * rank, TOP_K))


def bytes_sent(rank: int, world: int, name: str, payloads: list[Any]) -> list[dict[str, list[int]]]:
    """For each payload, what the dispatcher says that it sent to each rank, forward and back."""
    mesh = Mesh.create(MeshShape(1, world, world), nodes=NODES)
    experts_TK = torch.from_numpy(experts_of(rank))
    found: list[dict[str, list[int]]] = []
    for payload in payloads:
        exchange = dispatcher(
            name, mesh, num_experts=LAYOUT.num_experts, layout=LAYOUT, payload=payload
        )
        x_TD = torch.randn(len(experts_TK), HIDDEN, requires_grad=True)
        weights_TK = torch.rand(len(experts_TK), TOP_K, requires_grad=True)
        arrived = exchange.dispatch(x_TD, experts_TK, weights_TK)
        rows_ND = arrived.rows_ND * arrived.weights_N.unsqueeze(1)
        exchange.combine(rows_ND, arrived.handle).square().sum().backward()
        found.append(exchange.sent_bytes)
    return found
