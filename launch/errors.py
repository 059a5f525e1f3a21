"""Errors that end a rank and are no mistake of its user's, and mistakes that several ranks find."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from .life.status import FAILED, MISTAKE

_QUIET_S = 3.0  # in which rank 0 tells what most likely all have found, and its end ends the others


class SaveError(RuntimeError):
    """What a run has trained could not be saved; what to do stands in it."""


class ReadError(RuntimeError):
    """A checkpoint could not be read now, which does not mean that it is damaged."""


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
    """Within this context a mistake is one that every rank finds, from what they have exchanged.

    Rank 0 alone tells it.

    Raises:
        ToldError: in the stead of ValueError, SaveError and ReadError, on the other ranks.
    """
    try:
        yield
    except (ValueError, SaveError, ReadError) as error:
        if rank == 0:
            raise
        status = MISTAKE if isinstance(error, ValueError) else FAILED
        raise ToldError(str(error), status) from error


@contextmanager
def rank_0_first(rank: int) -> Iterator[None]:
    """Within this context a mistake is one that the others most likely find too, by themselves.

    They wait a moment before they tell it.
    """
    try:
        yield
    except ValueError:
        if rank:
            time.sleep(_QUIET_S)
        raise
