"""A signal asks a rank to stop, or ends it with one line, wherever its main thread is."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from counterflow.launch.life.stop import StopRequests

pytestmark = pytest.mark.alone

PREAMBLE = """
import ctypes, io, os, signal, socket, sys, threading, time
from counterflow.launch.life.stop import StopRequests, hold

def block():  # in a C call that no signal interrupts
    libc = ctypes.CDLL(None)
    mutex = ctypes.create_string_buffer(256)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)

def where():
    return "rank 3, step 7"
"""
EARLY = """
import os, signal, time
from counterflow.launch.life.stop import StopRequests
os.kill(os.getpid(), signal.SIGUSR1)
with StopRequests(str) as requests:
    end = time.monotonic() + 10
    while requests.signal is None and time.monotonic() < end:
        time.sleep(0.001)
    print(requests.signal.name)
"""
LINE = "counterflow: error: rank 3, step 7: ended by SIGTERM\n"


def start(body: str, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
    """A process that runs `body`, which has printed "ready"."""
    process = subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + textwrap.dedent(body)],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen[str], number: signal.Signals) -> tuple[int, str]:
    """Exit status and stderr after the signal."""
    # It says "ready" just before it blocks; a signal in between would end it as well.
    time.sleep(0.1)
    process.send_signal(number)
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, errors


def run(body: str) -> str:
    """What `body` prints; it must end well."""
    code = PREAMBLE + textwrap.dedent(body)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_ends_a_process_whose_main_thread_is_blocked_in_c(number: signal.Signals) -> None:
    process = start("""
        with StopRequests(where, graceful=False):
            print("ready", flush=True)
            block()
    """)
    before = time.monotonic()
    status, errors = end(process, number)
    assert time.monotonic() - before < 30  # a loaded machine; blocked for ever otherwise
    assert status == 128 + number
    assert errors == LINE.replace("SIGTERM", number.name)


def test_the_line_is_written_while_the_main_thread_holds_the_lock_of_stderr() -> None:
    process = start("""
        class Stuck(io.RawIOBase):
            def writable(self):
                return True
            def write(self, data):
                print("ready", flush=True)
                block()

        sys.stderr = io.TextIOWrapper(io.BufferedWriter(Stuck()), write_through=True)
        with StopRequests(where, graceful=False):
            sys.stderr.write("progress")
            sys.stderr.flush()
    """)
    assert end(process, signal.SIGTERM) == (143, LINE)


def test_a_position_that_cannot_be_told_still_ends_in_a_line() -> None:
    process = start("""
        with StopRequests(lambda: str({}["step"]), graceful=False):
            print("ready", flush=True)
            block()
    """)
    line = "counterflow: error: position unknown (KeyError): ended by SIGTERM\n"
    assert end(process, signal.SIGTERM) == (143, line)


def test_a_process_without_stderr_ends_as_well() -> None:
    process = start("""
        with StopRequests(where, graceful=False):
            os.close(2)
            print("ready", flush=True)
            block()
    """)
    assert end(process, signal.SIGTERM) == (143, "")


def test_after_exit_the_handlers_and_the_wakeup_descriptor_of_before_work() -> None:
    printed = run("""
        caught = []
        signal.signal(signal.SIGTERM, lambda number, frame: caught.append(number))
        reader, writer = socket.socketpair()
        reader.settimeout(10)
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno())
        interrupt = signal.getsignal(signal.SIGINT)
        for _ in range(2):
            with StopRequests(where, graceful=False):
                pass
            os.kill(os.getpid(), signal.SIGTERM)
            print(*reader.recv(1), *caught)
        assert signal.set_wakeup_fd(-1) == writer.fileno()
        assert signal.getsignal(signal.SIGINT) == interrupt
    """)
    assert printed == "15 15\n15 15 15\n"


def test_a_signal_at_any_moment_of_exit_ends_the_process() -> None:
    # Forked: the n-th call that changes handlers or descriptor in __exit__ is followed by SIGTERM.
    printed = run("""
        def attempt(n):
            watch = StopRequests(where, graceful=False)
            watch.__enter__()
            calls = 0

            def then_signal(function):
                def call(*args, **kwargs):
                    nonlocal calls
                    result = function(*args, **kwargs)
                    calls += 1
                    if calls == n:
                        os.kill(os.getpid(), signal.SIGTERM)
                    return result
                return call

            signal.signal = then_signal(signal.signal)
            signal.set_wakeup_fd = then_signal(signal.set_wakeup_fd)
            watch.__exit__(None, None, None)
            os._exit(100 if calls < n else 101)  # too few calls, or a signal swallowed

        for n in range(1, 100):
            child = os.fork()
            if child == 0:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                attempt(n)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if status == 100:
                break
            print(status)
    """)
    assert set(printed.split()) <= {"143", "-15"}
    # Four handlers, the mask, the descriptor.
    assert len(printed.split()) == 5


def test_a_handler_that_python_did_not_set_becomes_the_default_one() -> None:
    printed = run("""
        real = signal.signal  # gives None where the handler before was set by C
        signal.signal = lambda *given: (real(*given), None)[1]
        with StopRequests(where, graceful=False):
            pass
        print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
    """)
    assert printed == "True\n"


def test_only_the_main_thread_can_open_it() -> None:
    raised: list[BaseException] = []

    def opens() -> None:
        try:
            StopRequests(str).__enter__()
        except ValueError as error:
            raised.append(error)

    thread = threading.Thread(target=opens)
    thread.start()
    thread.join()
    assert "main thread" in str(raised[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_request_is_heard_while_the_main_thread_is_blocked_and_does_not_end_it(
    number: signal.Signals,
) -> None:
    process = start("""
        with StopRequests(where) as requests:
            def tell():
                while requests.signal is None:
                    time.sleep(0.001)
                time.sleep(0.2)  # it has not ended
                print(requests.signal.name, requests.asked, flush=True)
                os._exit(0)

            threading.Thread(target=tell).start()
            print("ready", flush=True)
            block()
    """)
    process.send_signal(number)
    printed, errors = process.communicate(timeout=60)
    assert (printed, errors, process.returncode) == (f"{number.name} 1\n", "", 0)


def test_signals_that_come_several_ways_at_once_are_one_request() -> None:
    printed = run("""
        from counterflow.launch.life import stop
        stop.ONE_REQUEST_S = 60  # a loaded machine
        with StopRequests(where) as requests:
            for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGUSR2):
                os.kill(os.getpid(), number)
                time.sleep(0.05)
            while requests.signal is None:
                time.sleep(0.001)
            time.sleep(0.2)  # it goes on
        print(requests.signal.name, requests.asked)
    """)
    assert printed == "SIGUSR1 1\n"


def test_a_second_sigterm_later_ends_a_rank_that_was_asked_to_stop() -> None:
    process = start("""
        from counterflow.launch.life import stop
        stop.ONE_REQUEST_S = 0.3
        with StopRequests(where) as requests:
            def tell():
                while requests.signal is None:
                    time.sleep(0.001)
                print("heard", flush=True)

            threading.Thread(target=tell).start()
            print("ready", flush=True)
            block()
    """)
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    assert process.stdout.readline() == "heard\n"
    time.sleep(0.4)
    assert process.poll() is None
    assert end(process, signal.SIGTERM) == (143, LINE)


def test_interrupt_ends_a_rank_at_once_even_one_that_is_stopping() -> None:
    process = start("""
        with StopRequests(where):
            print("ready", flush=True)
            block()
    """)
    process.send_signal(signal.SIGUSR1)
    assert end(process, signal.SIGINT) == (130, LINE.replace("SIGTERM", "SIGINT"))


def test_a_rank_that_comes_to_no_boundary_says_where_it_is_and_ends_when_its_time_is_up() -> None:
    process = start("""
        with StopRequests(where, tell_after_s=0.2, grace_s=0.9):
            print("ready", flush=True)
            block()
    """)
    before = time.monotonic()
    status, errors = end(process, signal.SIGUSR1)
    assert time.monotonic() - before > 0.9
    assert status == 128 + signal.SIGUSR1
    assert errors.splitlines() == [
        "counterflow: error: rank 3, step 7: asked to stop by SIGUSR1 0 s ago, still here",
        "counterflow: error: rank 3, step 7: ended by SIGUSR1 1 s after it asked to stop",
    ]


def test_a_rank_that_is_saving_says_nothing_until_its_time_is_up() -> None:
    process = start("""
        with StopRequests(where, tell_after_s=0.2, grace_s=0.9) as requests:
            print("ready", flush=True)
            while requests.signal is None:
                pass
            requests.granted()
            block()
    """)
    status, errors = end(process, signal.SIGUSR2)
    assert status == 128 + signal.SIGUSR2
    assert errors.count("\n") == 1
    assert "ended by SIGUSR2 1 s after" in errors


def test_a_signal_before_the_rank_is_ready_waits_until_it_is() -> None:
    printed = run(
        """
        import subprocess
        from counterflow.launch.life.stop import hold
        hold()  # as the launcher does, before it starts a rank
        code = """
        + repr(EARLY)
        + """
        subprocess.run([sys.executable, "-c", code], check=True)
    """
    )
    assert printed == "SIGUSR1\n"
