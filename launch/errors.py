"""Errors that end a rank and that are not told by it as its own mistake."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .life.status import FAILED, MISTAKE


class SaveError(RuntimeError):
    """A run that was asked to stop could not save where it stood; what to do stands in it."""


class ToldError(RuntimeError):
    """What ends this rank has been printed already, or is by another one.

    Attributes:
        status: with which this rank ends.
    """

    def __init__(self, message: str, status: int = FAILED) -> None:
        super().__init__(message)
        self.status = status


@contextmanager
def alike_on_all(rank: int) -> Iterator[None]:
    """Within this context a ValueError is one that every rank raises: rank 0 alone tells it.

    Raises:
        ToldError: in its stead, on the other ranks.
    """
    try:
        yield
    except ValueError as error:
        if rank == 0:
            raise
        raise ToldError(str(error), MISTAKE) from error
