"""The checkpoints of a run: saved beside its training, found again, loaded into any layout."""

from __future__ import annotations

import json
import shutil
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_saver import save

from ...comm.collectives import gather
from ...comm.errors import CommError, backend_reason
from ...comm.waiting import WaitBoard
from .errors import CheckpointError, told
from .folders import checkpoints_in, clear_leftovers, part_folder, step_folder, step_of
from .pieces import Piece, State
from .plan import SaveStretches, by_name, check
from .reader import Found, Reader, first_failure
from .retention import Retention
from .staging import HostCopies
from .stand import Stand
from .storage import PartWriter

__all__ = ["Checkpoints", "Found", "Saved"]

# A wait's own error, which knows more, comes before that of whoever waits for the whole save.
_LATER_S = 5.0
_LOOK_S = 0.5  # between looks at how far a save is that is waited for


class Saved(NamedTuple):
    """The end of a save: `error` is "" where the checkpoint is whole and on disk.

    `seconds` from the call on; `num_bytes` of all tensors in it, replicas once.
    """

    step: int
    path: Path
    seconds: float
    num_bytes: int
    error: str


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
        self._stand = Stand(0, self._board)
        self._retention = Retention(folder, keep)
        self._raise_first(gather(self._prepare(), self._group, "the folder", board=self._board))

    def save(self, step: int, state: State) -> None:
        """Save `state` as the checkpoint of `step`; a collective.

        Waits for the save before it. If asynchronous, returns as soon as the pieces are copied, or
        on a GPU as soon as the copies are queued on the current stream; else when all is done. How
        it ended is told by `poll`.

        Raises:
            CommError: nothing can be saved any more, as ranks have lost each other in an earlier
                save, or it hangs; this start of the run must end.
        """
        started = time.monotonic()
        path = step_folder(self._folder, step)
        self._require_idle()
        self._stand = Stand(step, self._board)
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
            with self._stand.waiting(f"the checkpoint of step {step}", range(self._world)):
                run()

    def poll(self) -> list[Saved]:
        """The saves that have ended since the last call; never waits.

        Raises:
            CommError: as of `save`, once all that has ended was told.
        """
        told: list[Saved] = []
        while self._finished:
            told.append(self._finished.popleft())
        if not told and self._broken:
            raise CommError(self._broken, peers=self._others)
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
            CheckpointError: there are some, but each is damaged; on all ranks.
            ReadError: the folder, or a file of the newest that is not known to be damaged, cannot
                be read now; on all ranks.
            CommError: another rank is gone or did not answer in time.
        """
        self._require_idle()
        reader = self._reader()
        return reader.newest(
            reader.agreed_paths(lambda: checkpoints_in(self._folder), self._folder),
            note=lambda path, good: self._retention.note(step_of(path), good),
            remedy="repair one, or move them away to begin anew",
        )

    def load(self, found: Found, pieces: Iterable[Piece]) -> None:
        """Fill pieces from a checkpoint, whatever the layout that saved it; a collective.

        Every rank names what it holds; the checkpoint may have more. Values of another dtype than
        the piece's are converted as Tensor.copy_ does; equal dtypes keep every bit.

        Raises:
            CheckpointError: a name is missing or of another shape; on all ranks.
            ReadError: a file cannot be read now; on all ranks.
            CommError: another rank is gone or did not answer in time.
        """
        self._require_idle()
        self._reader().load(found, pieces)

    def _reader(self) -> Reader:
        return Reader(self._group, timeout_s=self._timeout_s, board=self._board)

    def close(self) -> None:
        """Wait for a save under way, and give its memory back."""
        self.wait()
        if self._idle():
            self._copies.release()

    @property
    def _others(self) -> tuple[int, ...]:
        return tuple(rank for rank in range(self._world) if rank != self._rank)

    def _idle(self) -> bool:
        """Wait for the thread, as long as it gets on; whether it has ended."""
        thread, stand = self._thread, self._stand
        if thread is not None and thread.is_alive():
            limit_s = self._timeout_s + _LATER_S
            with stand.waiting(f"the checkpoint of step {stand.step}", range(self._world)):
                while thread.is_alive() and time.monotonic() < stand.since + limit_s:
                    stand.show()
                    left_s = stand.since + limit_s - time.monotonic()
                    thread.join(min(max(0.0, left_s), _LOOK_S))
        return thread is None or not thread.is_alive()

    def _late(self) -> str:
        return (
            f"the checkpoint of step {self._stand.step} is still {self._stand.doing} after "
            f"{self._timeout_s:g} s; look at the disk, or raise run.timeout_s"
        )

    def _require_idle(self) -> None:
        if not self._idle():
            raise CommError(f"rank {self._rank}: {self._late()}", peers=self._others)
        if self._broken:
            raise CommError(self._broken, peers=self._others)

    def _break_off(self, reason: str) -> None:
        """Leave the group: what ranks say to each other would no longer fit together.

        Its connections close, so that ranks that wait for this one are told at once.
        """
        self._broken = f"{reason}; nothing can be saved any more: the run must be started again"
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
            problem = first_failure(error)
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

    def _raise_first(self, problems: Sequence[str]) -> None:
        for problem in problems:
            if problem:
                raise CheckpointError(problem)


def _num_bytes(metadata: Metadata) -> int:
    total = 0
    for stored in metadata.state_dict_metadata.values():
        assert isinstance(stored, TensorStorageMetadata)
        total += stored.size.numel() * stored.properties.dtype.itemsize
    return total
