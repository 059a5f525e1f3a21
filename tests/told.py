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


def part(rank: int, world: int) -> None:
    """Wait until each of the first `world` ranks has come here; then all may end.

    Rank 0 goes last: it holds the store, where a late one has yet to tell and to hear.
    """
    tell(f"done {rank}")
    hear(*(f"done {other}" for other in range(world)))
    if rank == 0:
        hear(*(f"left {other}" for other in range(1, world)))
    else:
        # Without the answer for which `tell` waits: rank 0 may be gone before it comes.
        _get_default_store().set(f"left {rank}", "told")
