"""How the ranks of a run are started and ended: real processes, a stand-in for the training."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from counterflow.launch.config import Config, load
from counterflow.launch.folder import claim
from counterflow.launch.life.verdict import verdict
from counterflow.launch.settings import ConfigError
from counterflow.launch.torchrun import choose_device, free_port, set_threads

STUB = Path(__file__).with_name("stub")
_SMALL = ["--run.device", "cpu", "--mesh.dp", "1", "--mesh.ep", "1"]  # two ranks


class Run:
    """`counterflow train` in a folder, with the stand-in doing as it is told."""

    def __init__(self, folder: Path, behaviour: str, *arguments: str) -> None:
        environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "OMP_NUM_THREADS")}
        environ |= {"STUB": behaviour, "PYTHONPATH": str(STUB)}
        self.folder = folder / "runs" / "small"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "counterflow", "train", *_SMALL, *arguments],
            cwd=folder,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def rank_pids(self, count: int = 2) -> list[int]:
        """Wait until every rank is in training, and tell their process ids."""
        deadline = time.monotonic() + 120  # a loaded machine
        while time.monotonic() < deadline:
            files = [self.folder / f"rank{rank}" for rank in range(count)]
            # It writes to the second file when the first is complete.
            if all((self.folder / f"starts{rank}").exists() for rank in range(count)):
                return [int(file.read_text().split()[0]) for file in files]
            time.sleep(0.05)
        raise AssertionError(f"ranks did not start: {self.process.poll()}")

    def end(self) -> tuple[int, str]:
        """Exit status and stderr."""
        _, errors = self.process.communicate(timeout=120)
        return self.process.returncode, errors


@pytest.fixture
def started() -> Iterator[list[Run]]:
    runs: list[Run] = []
    yield runs
    for run in runs:
        if run.process.poll() is None:
            run.process.kill()
            run.process.communicate()


def gone(pids: list[int], within_s: float = 10.0) -> bool:
    """Whether all these processes end in time (a zombie has ended)."""

    def alive(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except FileNotFoundError:
            return False

    deadline = time.monotonic() + within_s
    while any(alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_all_ranks_run_with_the_resolved_configuration_and_share_the_cores(
    tmp_path: Path, started: list[Run]
) -> None:
    started.append(run := Run(tmp_path, "return", "--train.steps", "77"))
    assert run.end() == (0, "")
    threads = {(run.folder / f"rank{rank}").read_text().split()[1] for rank in range(2)}
    assert threads == {str(max(1, len(os.sched_getaffinity(0)) // 2))}
    assert load(run.folder / "config.toml").train.steps == 77


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_every_rank(
    tmp_path: Path, started: list[Run], number: signal.Signals
) -> None:
    started.append(run := Run(tmp_path, "wait", "--checkpoint.enabled", "false"))
    pids = run.rank_pids()
    run.process.send_signal(number)
    assert run.end()[0] == 128 + number
    assert gone(pids)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's")
def test_no_rank_outlives_a_launcher_that_is_killed(tmp_path: Path, started: list[Run]) -> None:
    started.append(run := Run(tmp_path, "wait"))
    pids = run.rank_pids()
    run.process.kill()
    assert run.end()[0] == -signal.SIGKILL
    assert gone(pids)


def test_a_mistake_found_by_the_ranks_is_told_without_a_traceback(
    tmp_path: Path, started: list[Run]
) -> None:
    started.append(run := Run(tmp_path, "refuse", "--train.steps", "66"))
    status, errors = run.end()
    assert status == 2
    lines = errors.splitlines()
    # How many ranks get to say it before torchrun ends them is a matter of time.
    assert 1 <= len(lines) <= 2
    for line in lines:
        rank = line.removeprefix("counterflow: error: rank ")[0]
        assert line == f"counterflow: error: rank {rank}: stage 66 is a view"


def test_a_rank_that_is_killed_is_named_and_takes_the_others_with_it(
    tmp_path: Path, started: list[Run]
) -> None:
    started.append(run := Run(tmp_path, "die"))
    pids = run.rank_pids()
    status, errors = run.end()
    assert status == 1
    first, *table, last = errors.splitlines()
    assert first == "counterflow: error: rank 1 was ended by SIGKILL; where each rank stands:"
    host = socket.gethostname()
    assert table == [f"  rank 0 ({host}): step 7", f"  rank 1 ({host}): was ended by SIGKILL"]
    assert last == "counterflow: error: rank 1 was ended by SIGKILL"
    assert gone(pids)


@pytest.mark.skipif(sys.platform != "linux", reason="the stand-in reads /proc")
def test_a_rank_that_aborts_because_its_peer_was_killed_is_not_blamed(
    tmp_path: Path, started: list[Run]
) -> None:
    started.append(run := Run(tmp_path, "abort"))
    status, errors = run.end()
    assert status == 1
    assert errors.splitlines()[-1] == "counterflow: error: rank 1 was ended by SIGKILL"


def test_a_rank_that_lost_a_peer_ends_with_its_line_and_no_abort_at_exit(
    tmp_path: Path, started: list[Run]
) -> None:
    started.append(run := Run(tmp_path, "lose"))
    status, errors = run.end()
    assert status == 1
    first, *table, last = errors.splitlines()
    lost = "rank [01], step 7: a peer is gone"
    assert re.fullmatch(f"counterflow: error: {lost}; where each rank stands:", first)
    assert any("step 7: a peer is gone" in line for line in table)
    assert re.search("rank [01] ended with exit status 1; what it said is above$", last)


@pytest.mark.parametrize(
    ("failed", "message", "status"),
    [
        # Found in one look: killed, mistaken, lost its peer, aborted, ended by torchrun.
        ({0: (1, 9), 1: (-9, 9)}, "rank 1 was ended by SIGKILL", 1),
        ({0: (-6, 9), 1: (-11, 10)}, "rank 1 was ended by SIGSEGV", 1),
        ({0: (1, 9), 1: (2, 9)}, "", 2),
        ({0: (-6, 9), 1: (1, 9)}, "rank 1 ended with exit status 1; what it said is above", 1),
        ({0: (143, 9), 1: (-15, 9), 2: (-6, 9)}, "rank 2 was ended by SIGABRT", 1),
        ({1: (143, 9), 0: (143, 9)}, "rank 1 ended with exit status 143; what it", 143),
        # The launcher interrupts the others; of two that failed alike, the first.
        ({0: (130, 9), 1: (1, 9.5), 2: (-2, 9)}, "rank 1 ended with exit status 1", 1),
        ({0: (1, 9.5), 1: (1, 9.2)}, "rank 1 ended with exit status 1", 1),
        # Killed 30 s after all were told to end.
        ({0: (1, 9), 1: (-9, 39)}, "above; rank 1 did not answer SIGTERM: stopped, or hung", 1),
        ({0: (2, 9), 1: (-9, 39), 2: (-9, 39)}, "; ranks 1, 2 did not answer SIGTERM", 2),
    ],
)
def test_the_rank_that_failed_by_itself_is_blamed(
    failed: dict[int, tuple[int, float]], message: str, status: int
) -> None:
    _, said, code = verdict(failed)
    assert message in said
    assert bool(message) == bool(said)
    assert code == status


def test_a_bug_keeps_its_traceback(tmp_path: Path, started: list[Run]) -> None:
    started.append(run := Run(tmp_path, "break"))
    status, errors = run.end()
    assert status == 1
    assert "RuntimeError: a bug" in errors
    assert "ended with exit status 1; what it said is above" in errors.splitlines()[-1]


def test_a_second_run_of_a_name_is_refused_until_the_first_has_ended(
    tmp_path: Path, started: list[Run]
) -> None:
    started.append(first := Run(tmp_path, "wait"))
    first.rank_pids()
    config = (first.folder / "config.toml").read_text()
    started.append(second := Run(tmp_path, "return", "--train.steps", "77"))
    status, errors = second.end()
    assert status == 2
    assert errors == (
        "counterflow: error: runs/small: another run is writing its results here (process "
        f"{first.process.pid} on {socket.gethostname()}); wait until it has ended, or give this "
        "run another run.name\n"
    )
    assert (first.folder / "config.toml").read_text() == config
    first.process.kill()  # the kernel, not the process, gives the folder back
    first.end()
    started.append(third := Run(tmp_path, "return"))
    assert third.end() == (0, "")


def test_ranks_of_a_persons_own_torchrun_keep_the_folder_from_other_runs(
    tmp_path: Path, started: list[Run]
) -> None:
    with claim(tmp_path / "runs" / "small"):
        environ = os.environ | {"STUB": "return", "PYTHONPATH": str(STUB), "OMP_NUM_THREADS": "1"}
        environ |= {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
        environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
        # This process, which has the folder, is not the parent: that is a shell.
        command = shlex.join([sys.executable, "-m", "counterflow", "train", *_SMALL]) + "; exit $?"
        run = subprocess.run(
            ["sh", "-c", command], cwd=tmp_path, env=environ, capture_output=True, text=True
        )
    assert run.returncode == 2
    assert run.stderr.startswith("counterflow: error: rank 0: runs/small: another run is writing")
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["metrics.jsonl", "report.html", "loss.svg"])
def test_a_result_that_cannot_be_written_is_found_before_any_rank_starts(
    tmp_path: Path, started: list[Run], name: str
) -> None:
    blocked = tmp_path / "runs" / "small" / name
    blocked.mkdir(parents=True)
    started.append(run := Run(tmp_path, "return"))
    status, errors = run.end()
    assert status == 2
    assert errors == (
        f"counterflow: error: runs/small/{name}: cannot be written: it is a folder; choose "
        "another run.name, or move it away\n"
    )
    assert not (run.folder / "rank0").exists()


def test_a_folder_that_cannot_be_made_is_found_before_any_rank_starts(
    tmp_path: Path, started: list[Run]
) -> None:
    (tmp_path / "runs").write_text("a file")
    started.append(run := Run(tmp_path, "return"))
    status, errors = run.end()
    assert status == 2
    assert errors.startswith("counterflow: error: runs/small: cannot be written: ")
    assert errors.count("\n") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_found_before_any_rank_starts(
    tmp_path: Path, started: list[Run]
) -> None:
    (tmp_path / "runs").mkdir(mode=0o555)
    started.append(run := Run(tmp_path, "return"))
    status, errors = run.end()
    assert status == 2
    assert "runs/small: cannot be written: Permission denied" in errors


def test_a_port_in_use_is_told_in_one_line_before_any_rank_starts(
    tmp_path: Path, started: list[Run]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        started.append(run := Run(tmp_path, "return", "--run.port", str(port)))
        status, errors = run.end()
    assert status == 2
    assert errors.startswith(f"counterflow: error: run.port={port} cannot be used: Address already")
    assert errors.count("\n") == 1
    assert not run.folder.exists()


def test_any_free_port_can_be_had_and_one_just_left_too() -> None:
    port = free_port(0)
    assert port > 0
    assert free_port(port) == port


def test_a_gpu_is_used_by_every_process_or_by_none(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", 2) == choose_device("cuda", 2) == "cuda"
    assert choose_device("auto", 4) == choose_device("cpu", 2) == "cpu"
    with pytest.raises(ConfigError, match="2 GPUs for 4 processes"):
        choose_device("cuda", 4)


def test_threads_that_a_person_chose_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    set_threads("cpu", Config().mesh.world_size)
    assert os.environ["OMP_NUM_THREADS"] == "3"


def test_ranks_started_by_a_persons_own_torchrun_refuse_a_world_that_does_not_fit(
    tmp_path: Path,
) -> None:
    environ = os.environ | {"STUB": "return", "PYTHONPATH": str(STUB)}
    environ |= {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0"}
    environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    command = [sys.executable, "-m", "counterflow", "train"]
    run = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith("counterflow: error: rank 0: mesh pp=2 x dp=2 needs 4 processes")
    assert not (tmp_path / "runs").exists()
