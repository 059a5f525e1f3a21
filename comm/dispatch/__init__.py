"""Expert-parallel dispatch and combine: each token's row to its experts' ranks, and back.

`base` has the interface and what every backend shares, `exchange` the all-to-all with a limit,
`autograd` the differentiable form of any backend, `flat` the first backend.
"""

from __future__ import annotations

import difflib
from typing import Any

from ...parallel.mesh import Mesh
from .base import Dispatched, Dispatcher, Handle
from .exchange import Pending
from .flat import Flat

__all__ = ["Dispatched", "Dispatcher", "Handle", "Pending", "dispatcher"]


def dispatcher(
    name: str, mesh: Mesh, *, num_experts: int, timeout_s: float = 300.0
) -> Dispatcher[Any]:
    """The dispatcher called `name`, over the expert-parallel group of `mesh`.

    Args:
        name: "flat": one all-to-all over the whole group, a row for each (token, expert).
        mesh: made by `Mesh.create` where ep > 1.
        num_experts: routed experts, spread evenly and contiguously over the ep ranks.
        timeout_s: limit of every wait for peers, seconds.

    Raises:
        ValueError: unknown name, or experts that do not spread evenly.
    """
    backends = {"flat": Flat}
    if name not in backends:
        nearest = difflib.get_close_matches(name, backends, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"there is no dispatcher {name!r}; did you mean {nearest!r}? "
            f"(known: {', '.join(backends)})"
        )
    return backends[name](mesh, num_experts=num_experts, timeout_s=timeout_s)
