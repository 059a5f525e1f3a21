"""What the ranks of a case tell each other through the world's store, whatever their groups do."""

from __future__ import annotations

from datetime import timedelta

from torch.distributed.distributed_c10d import _get_default_store


def tell(what: str) -> None:
    """Let those go on who wait for `what`. Afterwards this rank may end, and the store with it."""
    store = _get_default_store()
    store.set(what, "told")
    store.get(what)  # is answered after those who wait were


def hear(*what: str, limit_s: float = 60.0) -> None:
    """Wait until each of `what` was told."""
    _get_default_store().wait(list(what), timedelta(seconds=limit_s))
