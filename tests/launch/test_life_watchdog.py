"""A hang ends in one table of where every rank stands, and so does the loss of a rank."""

from __future__ import annotations

import multiprocessing as mp
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from counterflow.comm.waiting import WaitBoard
from counterflow.launch.life import alarm
from counterflow.launch.life.watchdog import Watchdog
from counterflow.launch.world import Place
from tests.ranks import free_port

pytestmark = pytest.mark.alone

LIMIT_S = 1.5
LOADED_S = 60.0  # for a rank that moves, which a loaded machine may not let run for long


class Position:
    """What the real trainer tells of a rank."""

    def __init__(self, rank: int, port: int) -> None:
        self.rank, self.port = rank, port
        self.step, self.board = 0, WaitBoard()

    def line(self) -> str:
        return ", ".join(filter(None, (f"rank {self.rank}, step {self.step}", self.board.now)))

    def moves(self, while_true: Callable[[], bool] = lambda: True) -> None:
        while while_true():
            self.step += 1
            time.sleep(0.05)


def stuck_in_python(at: Position, peers: list[int]) -> None:
    while True:
        pass


def stuck_in_c(at: Position, peers: list[int]) -> None:
    with at.board.waiting("rows", peers):
        time.sleep(1000)


def stopped(at: Position, peers: list[int]) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def waits_in_gloo(at: Position, peers: list[int]) -> None:
    import torch

    with at.board.waiting("activations", peers):
        dist.recv(torch.zeros(1), src=peers[0])


def moves(at: Position, peers: list[int]) -> None:
    at.moves()


def reads(at: Position, peers: list[int]) -> None:
    """A wait for a disk that gives bytes, longer than a rank may stand still."""
    end = time.monotonic() + 2 * LIMIT_S
    while time.monotonic() < end:
        at.board.now = f"reading: {time.monotonic_ns()} bytes"
        time.sleep(0.02)


def ends_well(at: Position, peers: list[int]) -> None:
    pass


def killed(at: Position, peers: list[int]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fails(at: Position, peers: list[int]) -> None:
    raise RuntimeError(f"rank {at.rank}, step 0: the connection was closed")


def stuck_without_store(at: Position, peers: list[int]) -> None:
    await_no_store(at)
    stuck_in_c(at, peers)


def fails_without_store(at: Position, peers: list[int]) -> None:
    await_no_store(at)
    fails(at, peers)


def await_no_store(at: Position) -> None:
    while True:
        at.step += 1
        try:
            alarm.Lifeline("127.0.0.1", at.port).close()
        except OSError:
            at.step = 0
            return
        time.sleep(0.02)


def serve_then_die(port: int) -> None:
    """Holds the store, as rank 0 does that has no launcher's; gone when told."""
    store = make_store(port, True)
    while not store.check(["die"]):
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGKILL)


def make_store(port: int, host: bool) -> Any:
    return dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        "127.0.0.1", port, is_master=host, wait_for_workers=False, timeout=timedelta(seconds=30)
    )


def rank_main(
    rank: int, world: int, port: int, errors: str, act: str, peers: list[int], limit_s: float
) -> None:
    os.dup2(os.open(errors, os.O_WRONLY | os.O_APPEND | os.O_CREAT), 2)
    acts = {f.__name__: f for f in ACTS}
    at = Position(rank, port)
    store = make_store(port, False)
    if act == "waits_in_gloo":
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore("gloo", store),  # pyright: ignore[reportPrivateImportUsage]
            rank=rank,
            world_size=world,
        )
    place = Place(rank, world, rank, world, "127.0.0.1", port)
    with Watchdog(at.line, place, limit_s=limit_s, answer_s=5) as watchdog:
        store.add("ready", 1)
        while store.add("ready", 0) < world:
            time.sleep(0.01)
        store.add("begun", 1)  # the last that it asks
        try:
            acts[act](at, peers)
        except RuntimeError as error:
            if not watchdog.report(str(error), tuple(peers)):
                os.write(2, f"counterflow: error: {error}\n".encode())
            os._exit(1)


ACTS = (
    stuck_in_python,
    stuck_in_c,
    stopped,
    waits_in_gloo,
    moves,
    reads,
    ends_well,
    killed,
    fails,
    stuck_without_store,
    fails_without_store,
)


class Ranks:
    """Processes that watch each other, and the file that they write errors to."""

    def __init__(self, folder: Path) -> None:
        self.errors = folder / "errors"
        self.errors.touch()
        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload(["torch", "torch.distributed"])
        self.port = free_port()
        self.store: Any = None
        self.processes: list[Any] = []

    def start(self, *acts: tuple[Any, ...], limit_s: float = LIMIT_S, host: bool = True) -> None:
        """Each act: a function above, and the ranks that it waits for."""
        if host:
            self.store = make_store(self.port, True)
        for rank, (act, *peers) in enumerate(acts):
            own_s = max(limit_s, LOADED_S) if act in (moves, ends_well) else limit_s
            given = (rank, len(acts), self.port, str(self.errors), act.__name__, peers, own_s)
            self.processes.append(self._context.Process(target=rank_main, args=given))
            self.processes[-1].start()

    def host(self) -> Any:
        process = self._context.Process(target=serve_then_die, args=(self.port,))
        process.start()
        return process

    def statuses(self, *ranks: int) -> list[int | None]:
        for rank in ranks:
            self.processes[rank].join(60)
        return [self.processes[rank].exitcode for rank in ranks]

    def lines(self) -> list[str]:
        text = re.sub(r" \([^)]*\): ", ": ", self.errors.read_text())  # hosts
        return [line.strip() for line in text.splitlines()]


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Ranks]:
    ranks = Ranks(tmp_path)
    yield ranks
    for process in ranks.processes:
        process.kill()
        process.join()


def test_a_hang_is_told_once_with_every_ranks_place_and_the_rank_that_holds_up_the_others(
    watched: Ranks,
) -> None:
    watched.start((stuck_in_c, 1), (stuck_in_python,), (moves,), (stopped,))
    assert watched.statuses(0, 1, 2) == [1, 1, 1]
    lines = watched.lines()
    assert re.fullmatch(
        r"counterflow: error: rank [01], step 0(, waiting for rows from rank 1)?: has not moved "
        r"for \d+ s; where each rank stands:",
        lines[0],
    )
    assert lines[1:3] == ["rank 0: step 0, waiting for rows from rank 1", "rank 1: step 0"]
    assert re.fullmatch(r"rank 2: step [1-9]\d*", lines[3])
    assert lines[4:] == [
        "rank 3: no answer: its process is stopped, gone, or held in C code",
        "rank 0 waits for rank 1, which waits for nobody itself: look there first",
    ]


def test_two_ranks_that_wait_for_each_other_are_shown_as_a_circle(watched: Ranks) -> None:
    watched.start((waits_in_gloo, 1), (waits_in_gloo, 0))
    assert watched.statuses(0, 1) == [1, 1]
    assert watched.lines()[-1] == (
        "every one of them waits for another, in a circle: rank 0 -> 1 -> 0"
    )


def test_a_rank_that_reports_a_failure_ends_all_with_one_message(watched: Ranks) -> None:
    watched.start((fails, 1), (moves,), (fails, 1), limit_s=60)
    assert watched.statuses(0, 1, 2) == [1, 1, 1]
    lines = watched.lines()
    assert re.match(r"counterflow: error: rank [02], step 0: the connection was closed; ", lines[0])
    # A watchdog may answer in the moment before its own rank reports.
    closed = re.compile(r"(rank 0|rank 2|ranks 0, 2): step 0: the connection was closed")
    assert any(closed.fullmatch(line) for line in lines[1:-1])
    assert any(re.fullmatch(r"rank 1: step \d+", line) for line in lines[1:-1])
    assert re.match(
        r"(rank \d waits|ranks 0, 2 wait) for rank 1, which waits for nobody", lines[-1]
    )
    assert len(lines) in (4, 5)


def test_an_alarm_of_the_launcher_names_the_lost_rank_and_nobody_waits_for_its_answer(
    watched: Ranks,
) -> None:
    watched.start((killed,), (moves,), limit_s=60)
    assert watched.statuses(0) == [-signal.SIGKILL]
    board = alarm.board(watched.store, 0)
    alarm.mark_gone(board, 0, "was ended by SIGKILL")
    alarm.ring(board, "rank 0 was ended by SIGKILL")
    assert watched.statuses(1) == [1]
    lines = watched.lines()
    assert lines[0].startswith("counterflow: error: rank 0 was ended by SIGKILL; where")
    assert lines[2] == "rank 0: was ended by SIGKILL"


def test_a_rank_whose_line_counts_what_it_reads_does_not_hang(watched: Ranks) -> None:
    watched.start((reads,), limit_s=LIMIT_S)
    assert watched.statuses(0) == [0]
    assert watched.lines() == []


def test_ranks_that_end_well_are_not_missed_by_those_that_go_on(watched: Ranks) -> None:
    watched.start((ends_well,), (ends_well,))
    assert watched.statuses(0, 1) == [0, 0]
    assert watched.lines() == []


def test_without_the_store_a_rank_that_hangs_says_its_own_line_and_one_that_moves_goes_on(
    watched: Ranks,
) -> None:
    host = watched.host()
    watched.start((stuck_without_store, 2), (fails_without_store, 2), (moves,), host=False)
    store = make_store(watched.port, False)
    while store.add("begun", 0) < 3:
        time.sleep(0.02)
    time.sleep(0.2)  # the last one's answer is on its way
    store.set("die", "")
    host.join(30)
    assert watched.statuses(0, 1) == [1, 1]
    # torch's client logs pages where the store goes in the midst of a question.
    hung, failed = sorted(line for line in watched.lines() if line.startswith("counterflow: "))
    assert re.fullmatch(
        r"counterflow: error: rank 0, step 0, waiting for rows from rank 2: has not moved .* s",
        hung,
    )
    assert failed == "counterflow: error: rank 1, step 0: the connection was closed"
    time.sleep(2 * LIMIT_S)
    assert watched.processes[2].is_alive()
