"""The lane on the CPU: a thread that does moves in order, and none where a rank is alone."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time

import pytest
import torch

from counterflow.comm.dispatch.lane import Lane
from counterflow.comm.errors import CommError
from counterflow.comm.waiting import WaitBoard

pytestmark = pytest.mark.alone

CPU = torch.device("cpu")


def lane(*others: int) -> Lane:
    return Lane(0, others, WaitBoard())


def test_moves_run_in_the_order_of_their_starts_beside_the_caller() -> None:
    given, done = lane(1), []
    hold = threading.Event()
    first = given.start(lambda: hold.wait(60), CPU, "first")
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

    first = given.start(fail, CPU, "combine(F)")
    later = [given.start(lambda: done.append(1), CPU, "second")]
    with pytest.raises(ValueError, match="broken"):
        first.finish()
    later.append(given.start(lambda: done.append(2), CPU, "third"))
    reason = r"rank 0: not started, because an earlier combine\(F\) failed: broken"
    for started in later:
        with pytest.raises(CommError, match=reason):
            started.finish()
    assert done == []


def test_the_board_says_what_the_caller_waits_for() -> None:
    board = WaitBoard()
    given, hold = Lane(0, (1, 2), board), threading.Event()
    pending = given.start(lambda: hold.wait(60), CPU, "dispatch(F)")
    waiter = threading.Thread(target=pending.finish)
    waiter.start()
    end = time.monotonic() + 60
    while not board.now and time.monotonic() < end:
        time.sleep(0.01)
    said = board.now
    hold.set()
    waiter.join(60)
    assert said == "waiting for dispatch(F) from ranks 1, 2"
    assert board.now == ""


def test_the_thread_ends_with_its_lane() -> None:
    given = lane(1)
    thread = given.start(threading.current_thread, CPU, "move").finish()
    assert thread.name == "dispatch-0"
    del given
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()


def test_moves_make_ordinary_tensors_in_inference_mode() -> None:
    for given in (lane(), lane(1)):
        with torch.inference_mode():
            pending = given.start(lambda: torch.zeros(1), CPU, "move")
        assert not pending.finish().is_inference()


def test_the_interpreter_ends_well_with_moves_under_way() -> None:
    code = (
        "import time, torch;"
        "from counterflow.comm.dispatch import lane as module;"
        "from counterflow.comm.dispatch.lane import Lane;"
        # A busy machine may need longer than the limit of a real run.
        "module._LAST_MOMENTS_S = 60;"
        "from counterflow.comm.waiting import WaitBoard;"
        "lane = Lane(0, (1,), WaitBoard());"
        "lane.start(lambda: (time.sleep(0.3), print('moved')), torch.device('cpu'), 'move')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"moved\n", b"")
