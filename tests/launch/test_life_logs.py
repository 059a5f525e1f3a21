"""Each rank's output lies in its log, however it ended; the console shows errors."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.alone

PREAMBLE = """
import ctypes, os, signal, sys, time
from pathlib import Path
from counterflow.launch.life.logs import log_path, rank_logs
libc = ctypes.CDLL(None)
"""


def run(
    folder: Path, rank: int, body: str, environ: dict[str, str] | None = None
) -> tuple[int, str, str, list[str]]:
    """Exit status, stdout and stderr of a rank that does `body`; and its log, without headers."""
    code = f"with rank_logs(Path({str(folder)!r}), {rank}):\n" + textwrap.indent(
        textwrap.dedent(body), "    "
    )
    # Its own session, as torchrun starts ranks.
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + code],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | (environ or {}),
        start_new_session=True,
    )
    return done.returncode, done.stdout, done.stderr, log(folder, rank)


def log(folder: Path, rank: int) -> list[str]:
    text = (folder / "logs" / f"rank{rank:05d}.log").read_text()
    return [line for line in text.splitlines() if not line.startswith("---")]


MIXED = """
    print("from Python")
    os.write(1, b"to the descriptor\\n")
    libc.puts(b"from C")
    libc.fflush(None)
    os.system("echo from a child")
    sys.stderr.write("a warning\\n")
    sys.stderr.write("counterflow: error: rank 3: lost; where each rank stands:\\n")
    sys.stderr.write("  rank 0: here\\n")
    sys.stderr.write("more\\n")
"""


def test_the_first_ranks_output_reaches_console_and_log(tmp_path: Path) -> None:
    status, out, errors, logged = run(tmp_path, 0, MIXED)
    assert status == 0
    assert sorted(out.splitlines()) == [
        "from C",
        "from Python",
        "from a child",
        "to the descriptor",
    ]
    assert errors.splitlines() == [
        "a warning",
        "counterflow: error: rank 3: lost; where each rank stands:",
        "  rank 0: here",
        "more",
    ]
    assert sorted(logged) == sorted(out.splitlines() + errors.splitlines())


def test_of_other_ranks_the_console_shows_errors_alone(tmp_path: Path) -> None:
    status, out, errors, logged = run(tmp_path, 3, MIXED)
    assert (status, out) == (0, "")
    assert errors.splitlines() == [
        "counterflow: error: rank 3: lost; where each rank stands:",
        "  rank 0: here",
    ]
    assert {"from C", "a warning", "more", "from a child"} <= set(logged)


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "os.killpg(0, 9)", "os._exit(1)"])
def test_a_rank_that_is_killed_loses_nothing_it_had_written(tmp_path: Path, end: str) -> None:
    body = f"""
        for number in range(20000):
            os.write(2, f"counterflow: error: {{number}}\\n".encode())
        {end}
    """
    status, _, errors, logged = run(tmp_path, 1, body)
    assert status in (-signal.SIGKILL, 1)
    assert logged == [f"counterflow: error: {number}" for number in range(20000)]
    assert errors.splitlines() == logged


def test_every_start_appends_with_a_line_that_tells_which_it_is(tmp_path: Path) -> None:
    run(tmp_path, 2, "print(1)")
    slurm = {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "4", "TORCHELASTIC_RESTART_COUNT": "2"}
    run(tmp_path, 2, "print(2)", slurm)
    first, one, second, two = (tmp_path / "logs" / "rank00002.log").read_text().splitlines()
    assert (one, two) == ("1", "2")
    start = r"--- \d{4}-\d\d-\d\d [\d:]{8}[+-]\d{4}, rank 2, host \S+, process \d+, attempt "
    assert re.fullmatch(start + "0", first)
    assert re.fullmatch(start + "2, Slurm job 77, requeued 4 times", second)


def test_afterwards_output_goes_where_it_went_before(tmp_path: Path) -> None:
    code = f"""
with rank_logs(Path({str(tmp_path)!r}), 1):
    print("inside")
print("after")
"""
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + code], capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("after\n", "")
    assert log(tmp_path, 1) == ["inside"]


def test_on_a_terminal_a_live_bar_stays_live_and_its_frames_are_not_logged(tmp_path: Path) -> None:
    import pty

    body = f"""
with rank_logs(Path({str(tmp_path)!r}), 0):
    assert sys.stdout.isatty() and os.get_terminal_size(1).columns == 93
    for frame in ("bar 1", "note\\nbar 2", "bar 3", "\\x1b[1mdone\\x1b[0m\\n"):
        sys.stdout.write("\\r\\x1b[2K" + frame)
        sys.stdout.flush()
"""
    import termios

    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (40, 93))
    process = subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + body], stdout=slave, stderr=subprocess.PIPE
    )
    os.close(slave)
    seen = b""
    try:
        while data := os.read(master, 4096):
            seen += data
    except OSError:  # the other end is closed
        pass
    os.close(master)
    assert process.communicate(timeout=60)[1] == b""
    assert seen == (
        b"\r\x1b[2Kbar 1\r\x1b[2Knote\r\nbar 2\r\x1b[2Kbar 3\r\x1b[2K\x1b[1mdone\x1b[0m\r\n"
    )
    assert log(tmp_path, 0) == ["note", "done"]


def test_a_log_that_can_no_longer_be_written_does_not_harm_the_rank(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    os.mkfifo(tmp_path / "logs" / "rank00001.log")
    reader = os.open(tmp_path / "logs" / "rank00001.log", os.O_RDONLY | os.O_NONBLOCK)
    code = f"""
with rank_logs(Path({str(tmp_path)!r}), 1):
    print("before", flush=True)
    time.sleep(0.3)
    Path({str(tmp_path / "go")!r}).touch()
    time.sleep(0.7)
    print("after" * 100000, flush=True)
print("well")
"""
    process = subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + code], stdout=subprocess.PIPE, text=True
    )
    while not (tmp_path / "go").exists():
        assert process.poll() is None
    os.close(reader)  # from here on writing fails
    assert process.communicate(timeout=60)[0] == "well\n"
    assert process.returncode == 0


def test_a_log_that_cannot_be_made_is_a_mistake_told_in_one_line(tmp_path: Path) -> None:
    from counterflow.launch.life.logs import rank_logs
    from counterflow.launch.settings import ConfigError

    (tmp_path / "logs").write_text("a file")
    words = r"logs: cannot be written: .*run\.logs"
    with pytest.raises(ConfigError, match=words), rank_logs(tmp_path, 0):
        raise AssertionError
