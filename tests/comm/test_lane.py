"""The lane on the CPU: a thread that does moves in order, and none where a rank is alone."""

from __future__ import annotations

import gc
import threading
import time

import pytest
import torch

from counterflow.comm.dispatch.lane import Lane
from counterflow.comm.waiting import WaitBoard

CPU = torch.device("cpu")


def lane(*others: int) -> Lane:
    return Lane(0, others, WaitBoard(), 5.0)


def test_moves_run_in_the_order_of_their_starts_beside_the_caller() -> None:
    given, done = lane(1), []
    hold = threading.Event()
    first = given.start(lambda: hold.wait(5), CPU, "first")
    later = [given.start(lambda i=i: done.append(i), CPU, "later") for i in range(5)]
    assert done == []  # the caller was not held up, and nothing overtook the first
    hold.set()
    for pending in reversed(later):
        pending.finish()
    assert done == [0, 1, 2, 3, 4]
    assert first.finish() is True


def test_a_rank_that_is_alone_moves_at_once_and_needs_no_thread() -> None:
    threads = threading.active_count()
    pending = lane().start(threading.get_ident, CPU, "alone")
    assert pending.finish() == threading.get_ident()
    assert threading.active_count() == threads


@pytest.mark.parametrize("others", [(), (1,)])
def test_moves_run_without_autograd(others: tuple[int, ...]) -> None:
    with torch.enable_grad():
        assert lane(*others).start(torch.is_grad_enabled, CPU, "move").finish() is False


def test_after_one_move_has_failed_all_later_ones_do() -> None:
    given, done = lane(1), []

    def fail() -> None:
        raise ValueError("broken")

    pending = [
        given.start(fail, CPU, "first"),
        given.start(lambda: done.append(1), CPU, "second"),
    ]
    for started in [*pending, given.start(lambda: done.append(2), CPU, "third")]:
        with pytest.raises(ValueError, match="broken"):
            started.finish()
    assert done == []


def test_the_board_says_what_the_caller_waits_for() -> None:
    board = WaitBoard()
    given, hold = Lane(0, (1, 2), board, 5.0), threading.Event()
    pending = given.start(lambda: hold.wait(5), CPU, "dispatch(F)")
    waiter = threading.Thread(target=pending.finish)
    waiter.start()
    end = time.monotonic() + 5
    while not board.now and time.monotonic() < end:
        time.sleep(0.01)
    said = board.now
    hold.set()
    waiter.join(5)
    assert said == "waiting for dispatch(F) from ranks 1, 2"
    assert board.now == ""


def test_the_thread_ends_with_its_lane() -> None:
    given = lane(1)
    thread = given.start(threading.current_thread, CPU, "move").finish()
    assert thread.name == "dispatch-0"
    del given
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()
