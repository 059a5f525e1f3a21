"""A signal ends a process with one line and 128 + its number, wherever its main thread is."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from counterflow.launch.watch import SignalWatch

PREAMBLE = """
import ctypes, io, os, signal, socket, sys, threading, time
from counterflow.launch.watch import SignalWatch

def block():  # in a C call that no signal interrupts
    libc = ctypes.CDLL(None)
    mutex = ctypes.create_string_buffer(256)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)

def where():
    return "rank 3, step 7"
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
        _, errors = process.communicate(timeout=10)
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_process_whose_main_thread_is_blocked_in_c(number: signal.Signals) -> None:
    process = start("""
        with SignalWatch(where):
            print("ready", flush=True)
            block()
    """)
    before = time.monotonic()
    status, errors = end(process, number)
    assert time.monotonic() - before < 5  # a loaded machine; blocked for ever otherwise
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
        with SignalWatch(where):
            sys.stderr.write("progress")
            sys.stderr.flush()
    """)
    assert end(process, signal.SIGTERM) == (143, LINE)


def test_a_position_that_cannot_be_told_still_ends_in_a_line() -> None:
    process = start("""
        with SignalWatch(lambda: str({}["step"])):
            print("ready", flush=True)
            block()
    """)
    line = "counterflow: error: position unknown (KeyError): ended by SIGTERM\n"
    assert end(process, signal.SIGTERM) == (143, line)


def test_a_process_without_stderr_ends_as_well() -> None:
    process = start("""
        with SignalWatch(where):
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
            with SignalWatch(where):
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
            watch = SignalWatch(where)
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
    assert len(printed.split()) == 3


def test_a_handler_that_python_did_not_set_becomes_the_default_one() -> None:
    printed = run("""
        real = signal.signal  # gives None where the handler before was set by C
        signal.signal = lambda *given: (real(*given), None)[1]
        with SignalWatch(where):
            pass
        print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
    """)
    assert printed == "True\n"


def test_only_the_main_thread_can_open_it() -> None:
    raised: list[BaseException] = []

    def opens() -> None:
        try:
            SignalWatch(str).__enter__()
        except ValueError as error:
            raised.append(error)

    thread = threading.Thread(target=opens)
    thread.start()
    thread.join()
    assert "main thread" in str(raised[0])
