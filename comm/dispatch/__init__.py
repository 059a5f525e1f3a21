"""Expert-parallel dispatch and combine: each token's row to its experts' ranks, and back.

`base` has the interface and what every backend shares, `autograd` its differentiable form, `choice`
makes one. `hops` is the engine of flat, dedup and two_hop; `route`, `pieces`, `moves` and `expand`
are its steps, and `reference` says plainly what it computes. `layout`, `grid` and `balance` say
where experts are, and where they should be; they need no torch, so names are imported on first use.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .balance import balanced_layout, balanced_layouts
    from .base import Arrived, Dispatched, Dispatcher, Handle
    from .choice import dispatcher
    from .exchange import Pending
    from .layout import ExpertLayout

_HOMES = {
    "Arrived": "base",
    "Dispatched": "base",
    "Dispatcher": "base",
    "ExpertLayout": "layout",
    "Handle": "base",
    "Pending": "exchange",
    "balanced_layout": "balance",
    "balanced_layouts": "balance",
    "dispatcher": "choice",
}
__all__ = [
    "Arrived",
    "Dispatched",
    "Dispatcher",
    "ExpertLayout",
    "Handle",
    "Pending",
    "balanced_layout",
    "balanced_layouts",
    "dispatcher",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
