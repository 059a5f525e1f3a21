"""Errors of transfers between ranks."""

from __future__ import annotations

from collections.abc import Sequence


class CommError(RuntimeError):
    """A transfer ended because a peer died or did not answer in time.

    Args:
        message: names this rank, the operation and the peers, and what the backend said.
        peers: global ranks that were waited for.
    """

    def __init__(self, message: str, *, peers: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.peers = tuple(peers)


def backend_reason(error: RuntimeError, limit_s: float | None = None) -> str:
    """One line of what a communication backend said, without its source locations and advice.

    Args:
        error: raised by torch.distributed.
        limit_s: the limit of the wait, seconds, named where it expired.
    """
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    text = text.split("] ", 1)[1] if text.startswith("[/") and "] " in text else text
    if "timed out" in text.lower() or "timeout after" in text.lower():
        return (
            "no answer within the limit" if limit_s is None else f"no answer within {limit_s:g} s"
        )
    return text.split(". This is typically")[0]
