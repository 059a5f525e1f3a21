"""How bytes move: expert-parallel dispatch and combine, and the errors of a transfer that failed.

May import torch, `fp8` and `parallel.mesh`; knows nothing of the model.
The names below are imported on first use, so that this package alone needs no torch.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .dispatch import (
        Dispatched,
        Dispatcher,
        ExpertLayout,
        Handle,
        Pending,
        balanced_layout,
        balanced_layouts,
        dispatcher,
    )
    from .errors import CommError

_HOMES = {
    "CommError": "errors",
    "Dispatched": "dispatch",
    "Dispatcher": "dispatch",
    "ExpertLayout": "dispatch",
    "Handle": "dispatch",
    "Pending": "dispatch",
    "balanced_layout": "dispatch",
    "balanced_layouts": "dispatch",
    "dispatcher": "dispatch",
}
__all__ = [
    "CommError",
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
