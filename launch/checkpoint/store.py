"""The checkpoints of a run: saved beside its training, found again, loaded into any layout."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ...comm.collectives import gather
from ...comm.errors import CommError, backend_reason
from ...comm.waiting import WaitBoard
from .errors import CheckpointError, told
from .folders import (
    MANIFEST,
    checkpoints_in,
    clear_leftovers,
    part_folder,
    step_folder,
    step_of,
)
from .manifest import Content
from .pieces import Piece, State
from .plan import LoadStretches, SaveStretches, by_name, check
from .read import verified_share
from .retention import Retention
from .staging import HostCopies
from .storage import WAITING, ManifestReader, PartWriter

_log = logging.getLogger(__name__)

# A wait's own error, which knows more, comes before that of whoever waits for the whole save.
_LATER_S = 5.0


class Saved(NamedTuple):
    """The end of a save: `error` is "" where the checkpoint is whole and on disk.

    `seconds` from the call on; `num_bytes` of all tensors in it, replicas once.
    """

    step: int
    path: Path
    seconds: float
    num_bytes: int
    error: str


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


class _Stand:
    """What a save is doing, and since when; written by its thread, read by who waits for it."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.say(WAITING)

    def say(self, doing: str) -> None:
        self.doing, self.since = doing, time.monotonic()


class Checkpoints:
    """A folder of checkpoints. Making one is a collective of all ranks.

    What an earlier process left half written is removed. After each save the newest `keep` stay;
    what is damaged does not count. Checkpoints of later steps than the one just saved are of a
    course that the run has left, and are removed.

    Args:
        folder: of this run's checkpoints, the same on all ranks; made if it is not there.
        keep: how many stay.
        asynchronous: write from a copy in CPU memory, by a thread, while training goes on.
        timeout_s: limit of each wait for other ranks; so a rank's file must be written, and its
            share of a checkpoint verified, within that time.
        board: where waits are announced.

    Raises:
        CheckpointError: the folder cannot be written to; on all ranks.
        CommError: another rank is gone or did not answer in time.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        asynchronous: bool,
        timeout_s: float,
        board: WaitBoard | None = None,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep must be 1 or more, not {keep}")
        self._folder, self._asynchronous = folder, asynchronous
        self._timeout_s, self._board = timeout_s, board or WaitBoard()
        self._group: dist.ProcessGroup | None = None
        self._rank, self._world = 0, 1
        self._broken = ""  # why ranks can no longer talk to each other about checkpoints
        if dist.is_available() and dist.is_initialized():
            # Of its own: writing in the background must not mix with training's collectives.
            limit = timedelta(seconds=timeout_s)
            group = dist.new_group(backend="gloo", timeout=limit)
            assert isinstance(group, dist.ProcessGroup)  # of all ranks, so of this one
            self._group = group
            self._rank, self._world = dist.get_rank(), dist.get_world_size()
        else:  # which is what no_dist asks for
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        self._copies = HostCopies()
        self._finished: deque[Saved] = deque()
        self._thread: threading.Thread | None = None
        self._stand = _Stand(0)
        self._retention = Retention(folder, keep)
        self._raise_first(gather(self._prepare(), self._group, "the folder", board=self._board))

    def save(self, step: int, state: State) -> None:
        """Save `state` as the checkpoint of `step`; a collective.

        Waits for the save before it. If asynchronous, returns as soon as the pieces are copied, or
        on a GPU as soon as the copies are queued on the current stream; else when all is done. How
        it ended is told by `poll`.
        """
        started = time.monotonic()
        path = step_folder(self._folder, step)
        reason = self._broken if self._idle() else self._late()
        if reason:
            error = f"rank {self._rank}: step {step} is not saved: {reason}"
            self._finished.append(Saved(step, path, 0.0, 0, error))
            return
        self._stand = _Stand(step)
        failed: CheckpointError | None = None
        pieces, values, own = list[Piece](), "", ""
        try:
            values, own = json.dumps(dict(state.values)), json.dumps(dict(state.own))
            pieces = list(state.pieces)
            check(pieces)
            if self._asynchronous:
                pieces = self._copies.copies(pieces)
        except CheckpointError as error:
            failed = error
        except Exception as error:  # the other ranks are waiting to be told
            failed = CheckpointError(f"cannot be copied: {type(error).__name__}: {error}")

        def ready() -> None:
            if failed is not None:
                raise failed
            self._copies.finish()

        planner = SaveStretches(own, ready)
        writer = PartWriter(self._folder, step, values, self._stand.say)

        def run() -> None:
            num_bytes, error = self._write(pieces, planner, writer)
            seconds = time.monotonic() - started
            self._finished.append(Saved(step, path, seconds, num_bytes, error))

        if self._asynchronous:
            self._thread = threading.Thread(target=run, name=f"checkpoint-{step}", daemon=True)
            self._thread.start()
        else:
            with self._waiting(f"the checkpoint of step {step}"):
                run()

    def poll(self) -> list[Saved]:
        """The saves that have ended since the last call; never waits."""
        told: list[Saved] = []
        while self._finished:
            told.append(self._finished.popleft())
        return told

    def wait(self) -> None:
        """Wait until no save is under way; how it ended is told by `poll`."""
        if not self._idle():
            step = self._stand.step
            error = f"rank {self._rank}: {self._late()}"
            self._finished.append(Saved(step, step_folder(self._folder, step), 0.0, 0, error))

    def newest(self) -> Found | None:
        """The newest checkpoint that is undamaged, every byte of it read; a collective.

        Ranks share its files out. Damaged ones are passed over, with one warning from rank 0.

        Returns:
            None if there is no checkpoint at all.

        Raises:
            CheckpointError: there are some, but each is damaged; or the folder cannot be read.
            CommError: another rank is gone or did not answer in time.
        """
        self._require_idle()
        problems: list[str] = []
        for path in self._listed():
            what = f"the files of {path.name} to be verified"
            content, digest, mine = verified_share(path, self._rank, self._world)
            found = gather((digest, mine), self._group, what, board=self._board)
            wrong = [problem for _, of in found for problem in of]
            if len({digest for digest, _ in found}) > 1 and not wrong:
                wrong = [f"{path / MANIFEST}: ranks read different content; is it shared by all?"]
            self._retention.note(step_of(path), not wrong)
            if not wrong:
                assert content is not None
                if problems and self._rank == 0:
                    _log.warning("%s; the older %s is used", "; ".join(problems), path)
                own = content.own[self._rank] if len(content.own) == self._world else None
                return Found(content.step, path, content.values, own, content)
            problems.append(wrong[0] + (f" (and {len(wrong) - 1} more)" if wrong[1:] else ""))
        if problems:
            raise CheckpointError(
                f"{self._folder}: no checkpoint is undamaged: {'; '.join(problems)}; repair one, "
                "or move them away to begin anew"
            )
        return None

    def load(self, found: Found, pieces: Iterable[Piece]) -> None:
        """Fill pieces from a checkpoint, whatever the layout that saved it; a collective.

        Every rank names what it holds; the checkpoint may have more. Values of another dtype than
        the piece's are converted as Tensor.copy_ does; equal dtypes keep every bit.

        Raises:
            CheckpointError: a name is missing or of another shape, or a file cannot be read; on
                all ranks.
            CommError: another rank is gone or did not answer in time.
        """
        self._require_idle()
        self._stand = _Stand(found.step)
        shapes = {name: record.shape for name, record in found.content.records.items()}
        try:
            with self._waiting(f"{found.path.name} to be read"):
                load(
                    by_name(pieces),
                    storage_reader=ManifestReader(found.path, found.content, self._stand.say),
                    planner=LoadStretches(shapes, found.path),
                    process_group=self._group,
                    no_dist=self._group is None,
                )
        except CheckpointException as error:
            raise CheckpointError(_first_failure(error)) from None
        except RuntimeError as error:
            raise CommError(self._lost("reading", error), peers=self._others) from error

    def close(self) -> None:
        """Wait for a save under way, and give its memory back."""
        self.wait()
        if self._idle():
            self._copies.release()

    @property
    def _others(self) -> tuple[int, ...]:
        return tuple(rank for rank in range(self._world) if rank != self._rank)

    @contextlib.contextmanager
    def _waiting(self, what: str) -> Iterator[None]:
        with self._board.waiting(what, range(self._world)):
            yield

    def _idle(self) -> bool:
        """Wait for the thread, as long as it gets on; whether it has ended."""
        thread = self._thread
        if thread is not None and thread.is_alive():
            with self._waiting(f"the checkpoint of step {self._stand.step}"):
                limit_s = self._timeout_s + _LATER_S
                while thread.is_alive() and time.monotonic() < self._stand.since + limit_s:
                    thread.join(max(0.0, self._stand.since + limit_s - time.monotonic()))
        return thread is None or not thread.is_alive()

    def _late(self) -> str:
        return (
            f"the checkpoint of step {self._stand.step} is still {self._stand.doing} after "
            f"{self._timeout_s:g} s; look at the disk, or raise run.timeout_s"
        )

    def _require_idle(self) -> None:
        if not self._idle():
            raise CheckpointError(f"rank {self._rank}: {self._late()}")
        if self._broken:
            raise CommError(self._broken, peers=self._others)

    def _break_off(self, reason: str) -> None:
        """Leave the group: what ranks say to each other would no longer fit together.

        Its connections close, so that ranks that wait for this one are told at once.
        """
        self._broken = f"an earlier save failed ({reason}), and the run must be started again"
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _write(
        self, pieces: Sequence[Piece], planner: SaveStretches, writer: PartWriter
    ) -> tuple[int, str]:
        """Write a checkpoint; bytes of its tensors, and what went wrong."""
        step = self._stand.step
        try:
            metadata = save(
                by_name(pieces),
                storage_writer=writer,
                planner=planner,
                process_group=self._group,
                no_dist=self._group is None,
            )
        except CheckpointException as error:
            problem = _first_failure(error)
        except RuntimeError as error:
            problem = self._lost("saving", error)
            self._break_off(problem)
        except Exception as error:
            problem = f"rank {self._rank}: {type(error).__name__}: {error}"
        else:
            if self._rank == 0:
                self._stand.say("removing older checkpoints")
                self._retention.tidy(step)
            return _num_bytes(metadata), ""
        if self._rank == 0:
            shutil.rmtree(part_folder(self._folder, step), ignore_errors=True)
        return 0, problem

    def _lost(self, doing: str, error: RuntimeError) -> str:
        reason = backend_reason(error, self._timeout_s)
        return (
            f"rank {self._rank}: {doing} the checkpoint of step {self._stand.step}: "
            f"{self._stand.doing}: {reason}"
        )

    def _prepare(self) -> str:
        """Make the folder and clear it, on rank 0; what went wrong."""
        if self._rank:
            return ""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            clear_leftovers(self._folder)
        except OSError as error:
            return str(told(error, self._folder, "cannot be written"))
        return ""

    def _listed(self) -> list[Path]:
        """The checkpoints that rank 0 sees, newest first."""
        paths: list[Path] = []
        problem = ""
        if self._rank == 0:
            try:
                paths = checkpoints_in(self._folder)
            except OSError as error:
                problem = str(told(error, self._folder, "cannot be read"))
        told_of = gather((paths, problem), self._group, "the checkpoints there", board=self._board)
        self._raise_first([problem for _, problem in told_of])
        return told_of[0][0]

    def _raise_first(self, problems: Sequence[str]) -> None:
        for problem in problems:
            if problem:
                raise CheckpointError(problem)


def _first_failure(error: CheckpointException) -> str:
    """What the first rank that failed says, as one line."""
    rank, (cause, _) = min(error.failures.items())
    kind = "" if isinstance(cause, CheckpointError) else f"{type(cause).__name__}: "
    more = len(error.failures) - 1
    rest = f" (and on {more} more ranks)" if more else ""
    return f"rank {rank}: {kind}{cause}{rest}"


def _num_bytes(metadata: Metadata) -> int:
    total = 0
    for stored in metadata.state_dict_metadata.values():
        assert isinstance(stored, TensorStorageMetadata)
        total += stored.size.numel() * stored.properties.dtype.itemsize
    return total
