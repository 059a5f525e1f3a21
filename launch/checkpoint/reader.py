"""Checkpoints found and loaded by the ranks of a run together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load

from ...comm.collectives import gather
from ...comm.errors import CommError, backend_reason
from ...comm.waiting import WaitBoard
from ..errors import ReadError
from .errors import CheckpointError, unreadable
from .folders import MANIFEST
from .manifest import Content
from .pieces import Piece
from .plan import LoadStretches, by_name
from .read import Share, verified_share
from .stand import Stand
from .storage import ManifestReader

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """A checkpoint whose every file has been verified.

    Attributes:
        step: after which it was saved.
        path: its folder.
        values: the run's, plain JSON.
        own: this rank's own, if as many ranks saved it as there are now.
        content: where its tensors lie.
    """

    step: int
    path: Path
    values: Mapping[str, Any]
    own: Mapping[str, Any] | None
    content: Content = field(repr=False)


class Reader:
    """Finds and loads checkpoints; each method is a collective of all ranks.

    Args:
        group: of all ranks; None stands for this rank alone.
        timeout_s: limit of each wait in `group`.
        board: where waits, and what this rank does in them, are announced.
    """

    def __init__(
        self, group: dist.ProcessGroup | None, *, timeout_s: float | None, board: WaitBoard
    ) -> None:
        self._group, self._timeout_s, self._board = group, timeout_s, board
        self._rank, self._world = 0, 1
        if group is not None:
            self._rank, self._world = dist.get_rank(group), group.size()

    def agreed_paths(self, look: Callable[[], Sequence[Path]], where: Path) -> Sequence[Path]:
        """What rank 0 sees by `look`, on all ranks.

        Raises:
            CheckpointError: rank 0 did.
            ReadError: it could not look now; on all ranks.
            CommError: another rank is gone or did not answer in time.
        """
        paths: Sequence[Path] = ()
        error: CheckpointError | ReadError | None = None
        if self._rank == 0:
            try:
                paths = look()
            except CheckpointError as mistake:
                error = mistake
            except OSError as fault:
                error = ReadError(f"rank 0: {unreadable(fault, where)}")
        told = gather((paths, error), self._group, "the checkpoints there", board=self._board)
        paths, error = told[0]
        if error is not None:
            raise error
        return paths

    def newest(
        self,
        paths: Iterable[Path],
        *,
        remedy: str,
        note: Callable[[Path, bool], object] = lambda *_: None,
    ) -> Found | None:
        """The first of `paths` that is undamaged, every byte of it read; ranks share its files out.

        Damaged ones are passed over, with one warning from rank 0.

        Args:
            paths: newest first, the same on all ranks.
            remedy: of an error, what to do where all are damaged.
            note: is told of each whether it is good.

        Returns:
            None if there are no paths.

        Raises:
            CheckpointError: each is damaged; on all ranks.
            ReadError: one cannot be read now, so nobody knows whether it is damaged; on all ranks.
            CommError: another rank is gone or did not answer in time.
        """
        problems: list[str] = []
        for path in paths:
            content, wrong = self._verified(path)
            note(path, not wrong)
            if not wrong:
                assert content is not None
                if problems and self._rank == 0:
                    _log.warning("%s; the older %s is used", "; ".join(problems), path)
                own = content.own[self._rank] if len(content.own) == self._world else None
                return Found(content.step, path, content.values, own, content)
            problems.append(wrong[0] + (f" (and {len(wrong) - 1} more)" if wrong[1:] else ""))
        if problems:
            raise CheckpointError(f"no checkpoint is undamaged: {'; '.join(problems)}; {remedy}")
        return None

    def load(self, found: Found, pieces: Iterable[Piece]) -> None:
        """Fill pieces from a checkpoint; see `Checkpoints.load`."""
        stand = Stand(found.step, self._board)
        shapes = {name: record.shape for name, record in found.content.records.items()}
        try:
            with stand.waiting(f"{found.path.name} to be read", range(self._world)):
                load(
                    by_name(pieces),
                    storage_reader=ManifestReader(found.path, found.content, stand.say),
                    planner=LoadStretches(shapes, found.path),
                    process_group=self._group,
                    no_dist=self._group is None,
                )
        except CheckpointException as error:
            causes = [cause for cause, _ in error.failures.values()]
            fault = any(isinstance(cause, ReadError) for cause in causes)
            raise (ReadError if fault else CheckpointError)(first_failure(error)) from None
        except RuntimeError as error:
            reason = backend_reason(error, self._timeout_s)
            raise CommError(
                f"rank {self._rank}: reading {found.path}: {stand.doing}: {reason}",
                peers=tuple(rank for rank in range(self._world) if rank != self._rank),
            ) from error

    def _verified(self, path: Path) -> tuple[Content | None, list[str]]:
        """What a checkpoint's manifest says, and all that is wrong with it."""
        what = f"the files of {path.name} to be verified"
        stand = Stand(0, self._board)
        share, fault = Share(None, "", []), ""
        with stand.waiting(what, range(self._world)):
            try:
                share = verified_share(path, self._rank, self._world, stand.say)
            except OSError as error:
                fault = f"rank {self._rank}: {unreadable(error, path)}"
        told = gather((share.digest, share.problems, fault), self._group, what, board=self._board)
        for _, _, fault in told:
            if fault:
                raise ReadError(fault)
        wrong = [problem for _, problems, _ in told for problem in problems]
        if len({digest for digest, _, _ in told}) > 1 and not wrong:
            wrong = [f"{path / MANIFEST}: ranks read different content; is it shared by all?"]
        return share.content, wrong


def first_failure(error: CheckpointException) -> str:
    """What the first rank that failed says, as one line."""
    rank, (cause, _) = min(error.failures.items())
    kind = "" if isinstance(cause, CheckpointError | ReadError) else f"{type(cause).__name__}: "
    more = len(error.failures) - 1
    rest = f" (and on {more} more ranks)" if more else ""
    return f"rank {rank}: {kind}{cause}{rest}"
