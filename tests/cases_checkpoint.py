"""What ranks do in the tests of checkpoints."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import random
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from counterflow.comm.errors import CommError
from counterflow.comm.waiting import WaitBoard
from counterflow.launch.checkpoint import files, storage
from counterflow.launch.checkpoint.pieces import Held, Piece, State
from counterflow.launch.checkpoint.read import checkpoints_in, open_checkpoint, verify
from counterflow.launch.checkpoint.store import Checkpoints, Saved

TENSORS: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
    "matrix": (torch.float32, (13, 7)),
    "low": (torch.bfloat16, (64, 3)),
    "wide": (torch.float64, (31,)),
    "count": (torch.int64, ()),
    "none": (torch.float32, (0, 4)),
    "with spaces / and @ signs": (torch.bfloat16, (5, 2, 3)),
}


def whole(name: str, salt: int = 0) -> Tensor:
    """Any bits, NaNs among them: what is saved is bytes, not numbers."""
    dtype, shape = TENSORS[name]
    generator = torch.Generator().manual_seed(salt * 1000 + list(TENSORS).index(name))
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 256, (num_bytes,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype)


def layout(seed: int, world: int) -> list[list[tuple[str, int, int]]]:
    """For each rank stretches (name, offset, length): all is on some rank, much on several.

    Some stretches overlap others in part, some are empty, and a rank has many of one name.
    """
    draw = random.Random(seed)
    ranks: list[list[tuple[str, int, int]]] = [[] for _ in range(world)]
    for name, (_, shape) in TENSORS.items():
        numel = torch.Size(shape).numel()
        inner = sorted(draw.randrange(numel + 1) for _ in range(draw.randrange(6)))
        edges = [0, *inner, numel]
        for start, end in itertools.pairwise(edges):
            for rank in draw.sample(range(world), draw.randint(1, world)):
                ranks[rank].append((name, start, end - start))
        for _ in range(draw.randrange(3)):  # beside the others, cutting through them
            start = draw.randrange(numel + 1)
            length = draw.randrange(numel + 1 - start)
            ranks[draw.randrange(world)].append((name, start, length))
    for of in ranks:
        draw.shuffle(of)
    return ranks


def pieces(stretches: list[tuple[str, int, int]], salt: int = 0) -> list[Piece]:
    return [
        Piece(name, TENSORS[name][1], offset, whole(name, salt)[offset : offset + length].clone())
        for name, offset, length in stretches
    ]


def everything(salt: int = 0) -> list[Piece]:
    """A rank's pieces if it has all there is."""
    return pieces(
        [(name, 0, torch.Size(shape).numel()) for name, (_, shape) in TENSORS.items()], salt
    )


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def store(folder: str | Path, **changes: Any) -> Checkpoints:
    options: dict[str, Any] = {"keep": 2, "asynchronous": True, "timeout_s": 60.0}
    return Checkpoints(Path(folder), **(options | changes))


def saved_well(checkpoints: Checkpoints) -> list[Saved]:
    checkpoints.wait()
    told = checkpoints.poll()
    assert not [of.error for of in told if of.error], told
    return told


def save_layouts(rank: int, world: int, folder: str, seeds: list[int]) -> None:
    for seed in seeds:
        checkpoints = store(Path(folder) / f"{world}-{seed}", asynchronous=seed % 2 == 0)
        state = State(pieces(layout(seed, world)[rank]), {"seed": seed}, {"rank": rank})
        checkpoints.save(seed, state)
        saved_well(checkpoints)
        checkpoints.close()


def load_layouts(rank: int, world: int, folder: str, seeds: list[int]) -> int:
    """Load what other numbers of ranks have saved into stretches of this one's; how many."""
    count = 0
    for path in sorted(Path(folder).iterdir()):
        checkpoints = store(path)
        found = checkpoints.newest()
        assert found is not None
        assert found.values == {"seed": found.step}
        same_world = path.name.startswith(f"{world}-")
        assert found.own == ({"rank": rank} if same_world else None)
        for seed in seeds:
            wanted = pieces(layout(1000 + seed, world)[rank])
            into = [Piece(p.name, p.shape, p.offset, torch.zeros_like(p.data)) for p in wanted]
            checkpoints.load(found, into)
            for want, got in zip(wanted, into, strict=True):
                assert same_bits(want.data, got.data), (path, want.name, want.offset)
                count += 1
        checkpoints.close()
    return count


def save_everything(rank: int, world: int, folder: str) -> list[Saved]:
    checkpoints = store(folder)
    checkpoints.save(5, State(everything()))
    return saved_well(checkpoints)


def load_other_dtype(rank: int, world: int, folder: str) -> None:
    checkpoints = store(folder)
    values = torch.linspace(-3, 3, 257)
    low = values.bfloat16()
    state = State(
        [*Held.entire(values).pieces("high", values), *Held.entire(low).pieces("low", low)]
    )
    checkpoints.save(1, state)
    saved_well(checkpoints)
    found = checkpoints.newest()
    assert found is not None
    into_low, into_high = torch.zeros_like(low), torch.zeros_like(values)
    checkpoints.load(
        found, [Piece("high", (257,), 0, into_low), Piece("low", (257,), 0, into_high)]
    )
    assert torch.equal(into_low, values.bfloat16())
    assert torch.equal(into_high, low.float())


def newest_and_warnings(
    rank: int, world: int, folder: str
) -> tuple[int | None, int, list[str], float]:
    """The newest checkpoint's step and a value of its tensors, and what was logged."""
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logger = logging.getLogger("counterflow")
    logger.addHandler(handler)
    opened: list[str] = []
    real = files.problem_of

    def counted(path: Path, *rest: Any) -> str:
        opened.append(str(path))
        return real(path, *rest)

    try:
        with mock.patch("counterflow.launch.checkpoint.read.problem_of", counted):
            checkpoints = store(folder)
            found = checkpoints.newest()
        if found is None:
            return None, len(opened), heard, 0.0
        target = torch.zeros(1)
        checkpoints.load(found, [Piece("value", (64,), 7, target)])
        return found.step, len(opened), heard, float(target)
    finally:
        logger.removeHandler(handler)


def save_values(rank: int, world: int, folder: str, steps: list[int], keep: int = 9) -> None:
    """A checkpoint per step, whose elements are the step; rank r has every world-th element."""
    checkpoints = store(folder, keep=keep)
    for step in steps:
        checkpoints.save(step, State(value_pieces(rank, world, step)))
    saved_well(checkpoints)
    checkpoints.close()


def value_pieces(rank: int, world: int, value: float) -> list[Piece]:
    return [Piece("value", (64,), i, torch.full((1,), value)) for i in range(rank, 64, world)]


def load_misfit(rank: int, world: int, folder: str) -> list[str]:
    """What loading says where one rank asks for what is not there, and where a shape differs."""
    checkpoints = store(folder)
    found = checkpoints.newest()
    assert found is not None
    errors: list[str] = []
    for wrong in (
        Piece("absent", (2,), 0, torch.zeros(2)),
        Piece("value", (65,), 0, torch.ones(2)),
    ):
        try:
            checkpoints.load(found, [wrong] if rank == 1 else value_pieces(rank, world, 0.0))
        except ValueError as error:
            errors.append(str(error))
    return errors


def _refusal(code: int) -> Callable[..., Any]:
    def refuse(path: Path, *_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code), str(path))

    return refuse


def _half_written(path: Path, *_: Any, **__: Any) -> Any:
    path.write_bytes(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a write says it: without a name


FAILURES: Mapping[str, tuple[int, str, Callable[..., Any]]] = {
    "copies": (
        1,
        "counterflow.launch.checkpoint.staging.HostCopies.copies",
        _refusal(errno.ENOMEM),
    ),
    "making the folder": (0, "pathlib.Path.mkdir", _refusal(errno.EACCES)),
    "a file": (1, "counterflow.launch.checkpoint.storage.write_file", _refusal(errno.EROFS)),
    "half a file": (1, "counterflow.launch.checkpoint.storage.write_file", _half_written),
    "the manifest": (0, "counterflow.launch.checkpoint.storage.write_bytes", _half_written),
    "the new name": (0, "counterflow.launch.checkpoint.storage.put_in_place", _refusal(errno.EIO)),
}
"""Of each stage: the rank on which it fails, what fails, and how."""


def fail_at(rank: int, world: int, folder: str, asynchronous: bool) -> dict[str, Any]:
    """By stage: what all is told of a save that failed there, and what lies there afterwards."""
    checkpoints = store(folder, asynchronous=asynchronous, keep=2)
    checkpoints.save(1, State(value_pieces(rank, world, 1)))
    saved_well(checkpoints)
    found: dict[str, Any] = {}
    for number, (name, (who, target, effect)) in enumerate(FAILURES.items()):
        if name == "copies" and not asynchronous:
            continue
        begun = time.monotonic()
        with mock.patch(target, effect) if rank == who else mock.patch.dict({}):
            checkpoints.save(100 + number, State(value_pieces(rank, world, -1)))
            checkpoints.wait()
        told = checkpoints.poll()
        dist.barrier()
        found[name] = ([of.error for of in told], sorted(os.listdir(folder)))
        dist.barrier()
        assert time.monotonic() - begun < 30  # of a limit of 60
    checkpoints.save(2, State(value_pieces(rank, world, 2)))
    saved_well(checkpoints)
    newest = checkpoints.newest()
    assert newest is not None
    found["then"] = newest.step
    return found


def file_too_large(rank: int, world: int, folder: str) -> list[str]:
    """Rank 1 reaches its limit on sizes of files in the middle of one."""
    checkpoints = store(folder)
    data = torch.arange(1 << 20, dtype=torch.float32)
    mine = Piece("large", (world << 20,), rank << 20, data)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        checkpoints.save(1, State([mine]))
        checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    errors = [of.error for of in checkpoints.poll()]
    dist.barrier()
    errors += os.listdir(folder)
    dist.barrier()  # all have looked before one makes something there
    checkpoints.save(1, State([mine]))
    saved_well(checkpoints)
    return errors


def disk_full(rank: int, world: int, folder: str) -> list[str]:
    """What is said where the disk is known to be too small, and where that shows midway."""
    checkpoints = store(folder)
    mine = Piece("large", (world << 18,), rank << 18, torch.ones(1 << 18))
    checkpoints.save(1, State([mine]))
    checkpoints.wait()
    with mock.patch.object(storage.PartWriter, "_free_bytes", return_value=1 << 40):
        checkpoints.save(2, State([mine]))
        checkpoints.wait()
    errors = [of.error for of in checkpoints.poll()]
    dist.barrier()
    assert not os.listdir(folder)
    dist.barrier()  # all have looked before one makes something there
    small = Piece("small", (world,), rank, torch.ones(1))
    checkpoints.save(3, State([small]))
    saved_well(checkpoints)
    return errors


@contextmanager
def held_back() -> Iterator[tuple[threading.Event, threading.Event]]:
    """Files wait until the first event is set; the second is set when a write is asked for."""
    go, due = threading.Event(), threading.Event()
    real = storage.write_file

    def late(*arguments: Any) -> Any:
        due.set()
        assert go.wait(30)
        return real(*arguments)

    with mock.patch.object(storage, "write_file", late):
        yield go, due


def change_after_save(rank: int, world: int, folder: str) -> tuple[float, list[int]]:
    """Training goes on while a checkpoint is written, and what is written is what was saved."""
    checkpoints = store(folder)
    mine = value_pieces(rank, world, 1.0)
    with held_back() as (go, _):
        checkpoints.save(1, State(mine))
        assert checkpoints.poll() == []
        for piece in mine:
            piece.data.fill_(2.0)
        total = torch.ones(1)
        dist.all_reduce(total)  # training's own collectives pass the save that is under way
        go.set()
        checkpoints.save(2, State(mine))  # waits for the first
    steps = [of.step for of in saved_well(checkpoints)]
    target = open_checkpoint(Path(folder) / "step-00000001").read("value")
    assert torch.equal(target, torch.ones(64))
    return float(total), steps


def one_stays_away(rank: int, world: int, folder: str) -> tuple[list[str], list[str], float]:
    """Rank 1 does not save; the other is told so within its limit, and that its run must end."""
    checkpoints = store(folder, timeout_s=8.0)
    begun = time.monotonic()
    if rank == 0:
        checkpoints.save(3, State(value_pieces(rank, world, 1)))
        checkpoints.wait()
    seconds = time.monotonic() - begun
    dist.barrier()  # the world's own group is whole
    told = [of.error for of in checkpoints.poll()]
    ends: list[str] = []
    for _ in range(2):  # rank 1 comes to know by its first save
        try:
            checkpoints.save(4, State(value_pieces(rank, world, 1)))
        except CommError as error:
            ends.append(str(error))
        checkpoints.wait()
        told += [of.error for of in checkpoints.poll()] if rank == 1 and not told else []
    try:
        checkpoints.poll()
    except CommError as error:
        ends.append(str(error))
    return told, ends, seconds


def one_dies(rank: int, world: int, folder: str, told: str) -> None:
    """Rank 1 is gone in the middle of a save; the others write down what they are told."""
    checkpoints = store(folder)
    checkpoints.save(1, State(value_pieces(rank, world, 1)))
    saved_well(checkpoints)
    if rank == 1:
        storage.write_file = lambda *_: os._exit(1)
    begun = time.monotonic()
    checkpoints.save(2, State(value_pieces(rank, world, 2)))
    checkpoints.wait()
    [saved] = checkpoints.poll()
    Path(f"{told}{rank}").write_text(
        f"{time.monotonic() - begun}\n{saved.error}\n{os.listdir(folder)}\n"
    )


def stuck_disk(rank: int, world: int, folder: str) -> list[str]:
    """A file that is never written: waiting ends, later saves are refused, and all is told."""
    checkpoints = store(folder, timeout_s=1.0)
    with (
        held_back() as (go, due),
        mock.patch("counterflow.launch.checkpoint.store._LATER_S", 0.2),
    ):
        checkpoints.save(1, State(value_pieces(rank, world, 1)))
        assert due.wait(30)
        checkpoints.wait()
        told = checkpoints.poll()
        refused = ""
        try:
            checkpoints.save(2, State(value_pieces(rank, world, 1)))
        except CommError as error:
            refused = str(error)
        go.set()
        limit = time.monotonic() + 30
        while told[-1].error != "" and time.monotonic() < limit:
            time.sleep(0.01)
            told += checkpoints.poll()
    first, *rest = [of.error for of in told]
    return [first, refused, *rest]


class Lines(WaitBoard):
    """A board that remembers every line."""

    def __init__(self) -> None:
        self.all: list[str] = []
        super().__init__()

    def __setattr__(self, name: str, value: object) -> None:
        if name == "now":
            self.all.append(str(value))
        super().__setattr__(name, value)


def lines_of_waits(rank: int, world: int, folder: str, asynchronous: bool) -> dict[str, list[str]]:
    """What the board shows of a save, of verifying and of loading, which move a few slices."""
    board, shown = Lines(), dict[str, list[str]]()
    checkpoints = store(folder, board=board, asynchronous=asynchronous)
    data = torch.ones(1 << 20)
    mine = Piece("large", (world << 20,), rank << 20, data)

    def slow(*arguments: Any) -> None:
        """Waits until the thread that shows progress has shown this slice."""
        shown_before, end = len(board.all), time.monotonic() + 1
        real(*arguments)
        # Two lines: the first may have been made up before this slice moved, and come only now.
        while len(board.all) < shown_before + 2 and time.monotonic() < end:
            time.sleep(0.002)

    real = files.Progress.moved
    with (
        mock.patch.object(files, "SLICE", 1 << 20),
        mock.patch.object(files.Progress, "moved", slow),
        mock.patch("counterflow.launch.checkpoint.store._LOOK_S", 0.005),
    ):
        board.all.clear()
        checkpoints.save(1, State([mine]))
        saved_well(checkpoints)
        shown["saving"] = list(dict.fromkeys(board.all))
        board.all.clear()
        found = checkpoints.newest()
        assert found is not None
        shown["verifying"] = list(dict.fromkeys(board.all))
        board.all.clear()
        checkpoints.load(found, [mine])
        shown["reading"] = list(dict.fromkeys(board.all))
    return shown


def unreadable(rank: int, world: int, folder: str) -> list[tuple[str, str]]:
    """What finding and loading say where rank 1 cannot read a file now; then, what is found."""
    checkpoints = store(folder)
    found = checkpoints.newest()
    assert found is not None
    told: list[tuple[str, str]] = []
    into = value_pieces(rank, world, 0.0)
    fault = OSError(errno.EIO, os.strerror(errno.EIO))
    with mock.patch("pathlib.Path.open", side_effect=fault) if rank == 1 else nullcontext():
        for run in (checkpoints.newest, lambda: checkpoints.load(found, into)):
            try:
                run()
            except Exception as error:
                told.append((type(error).__name__, str(error)))
    again = checkpoints.newest()
    assert again is not None
    return [*told, ("found", str(again.step))]


class Killed(BaseException):
    """Stands for the end of the process: after it, nothing changes on disk any more."""


class Killing:
    """Lets only so many changes of the file system below a folder happen, then raises Killed."""

    def __init__(self) -> None:
        self.folder, self.left = "", 0
        sys.addaudithook(self._watch)  # which stays as long as the process, so it has a switch

    def _watch(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.folder or event not in (
            "open",
            "os.mkdir",
            "os.rename",
            "os.remove",
            "os.rmdir",
            "shutil.rmtree",
        ):
            return
        if event == "open" and "r" in str(arguments[1] or "r"):
            return
        # Within rmtree, names are relative to a descriptor.
        if os.path.isabs(str(arguments[0])) and not str(arguments[0]).startswith(self.folder):
            return
        self.left -= 1
        if self.left < 0:
            raise Killed


def kill_everywhere(rank: int, world: int, folder: str) -> list[float]:
    """What the newest checkpoint holds if saving was ended before the 1st, 2nd, ... change.

    Step 2 is saved where there are checkpoints of steps 1 and 2 with their numbers as values, of
    which one is to be kept; the new values are 3.
    """
    first = Path(folder) / "first"
    save_values(rank, world, str(first), [1, 2])
    killing = Killing()
    values: list[float] = []
    for number in itertools.count():
        path = Path(folder) / f"{number}"
        shutil.copytree(first, path)
        checkpoints = store(path, keep=1, asynchronous=False)
        killing.folder, killing.left = str(path), number
        with suppress(Killed):
            checkpoints.save(2, State(value_pieces(rank, world, 3.0)))
        survived, killing.folder = killing.left >= 0, ""
        assert all(verify(whole) == [] for whole in checkpoints_in(path))
        again = store(path, keep=1, asynchronous=False)
        found = again.newest()
        assert found is not None
        assert found.step == 2
        values.append(float(open_checkpoint(found.path).read("value")[0]))
        assert all(name.startswith("step-") for name in os.listdir(path))
        again.save(3, State(value_pieces(rank, world, 4.0)))
        saved_well(again)
        assert os.listdir(path) == ["step-00000003"]
        if survived:
            return values
    raise AssertionError
