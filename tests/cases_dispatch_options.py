"""What ranks do for the options of a dispatcher, and for its choice."""

from __future__ import annotations

from typing import Any

import torch

from counterflow.comm import dispatcher
from counterflow.parallel.mesh import Mesh, MeshShape

from .cases_dispatch import E, Setting, batch, same_bits
from .cases_dispatch_faults import refused


def chosen(
    rank: int, world: int, places: list[tuple[MeshShape, tuple[int, ...]]]
) -> list[tuple[str, str]]:
    """What "auto" makes, and why; each is used once."""
    found = []
    for shape, nodes in places:
        d = dispatcher("auto", Mesh.create(shape, nodes=nodes), num_experts=E)
        given = batch(rank, "uneven")
        d.dispatch(*given[:3])
        found.append((d.name, d.why))
    return found


def strange_weight(
    rank: int, world: int, setting: Setting, check: bool | None
) -> list[tuple[str, float]]:
    """Weights of all ranks with a NaN, an infinity, and a NaN that belongs to no expert."""
    d: Any = dispatcher(setting.name, setting.mesh(), num_experts=E, check=check)
    found = []
    for expert, value in ((5, torch.nan), (5, torch.inf), (-1, torch.nan)):
        given = batch(rank, "even")
        given.experts_TK[3, 2] = expert
        given.weights_TK[3, 2] = value
        found.append(refused(d, given))
    return found


def rounded(rank: int, world: int, setting: Setting) -> dict[str, bool]:
    """What the formats of a payload do to float32 rows and to their sums."""
    d = setting.make(setting.mesh())
    given = batch(rank, "even", torch.float32)
    x_TD = given.x_TD.requires_grad_()
    out = d.dispatch(x_TD, given.experts_TK, given.weights_TK)
    y_TD = d.combine(out.rows_ND, out.handle)
    y_TD.backward(given.grad_TD)
    rows = out.rows_ND.detach()
    return {
        "rows are float32": rows.dtype == torch.float32,
        "rows were bfloat16": same_bits(rows, rows.bfloat16().float()),
        "rows were E4M3 times a power of two": out.tiles is not None
        and same_bits(rows, out.tiles.values.float() * out.tiles.scales),
        "weights are as they were": bool(
            torch.isin(out.weights_N, torch.cat([batch(r, "even", torch.float32).weights_TK
                                                 for r in range(world)])).all()
        ),
        "sums are near": torch.allclose(y_TD, 3 * x_TD, rtol=0.1, atol=0.1),
        "gradients are near": x_TD.grad is not None
        and torch.allclose(x_TD.grad, 3 * given.grad_TD, rtol=0.1, atol=0.1),
    }  # fmt: skip
