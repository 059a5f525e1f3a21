"""Ranks that are asked to stop, lost, started again; on one machine, and on two (played by two
launchers here). Real processes, a stand-in for the training.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from counterflow.launch.life.status import DONE, FAILED, MISTAKE, STOPPED
from tests.ranks import free_port

STUB = Path(__file__).with_name("stub")
LAUNCHER = """
import os
import sys
from pathlib import Path
from counterflow.launch.life.nodes import Nodes
from counterflow.launch.life.stop import hold
from counterflow.launch.torchrun import start

if "--hold" in sys.argv:
    hold()
    print("held", flush=True)
    while not Path("go").exists():
        pass
if "--look-late" in sys.argv:  # a rank is lost between the agent's looks at ranks and machines
    from counterflow.launch.life.nodes import Council

    def is_over(council, attempt, asked=Council.is_over):
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        return asked(council, attempt)

    Council.is_over = is_over
node, port, restarts, grace_s, timeout_s, address = sys.argv[1:7]
nproc = 2 if node == "alone" else 1
nodes = None if node == "alone" else Nodes(2, int(node), address)
arguments = ["train", "--run.device", "cpu", "--mesh.dp", "1", "--mesh.ep", "1"]
arguments += ["--checkpoint.enabled", "true" if float(grace_s) else "false"]
sys.exit(start(arguments, nproc=nproc, port=int(port), nodes=nodes, max_restarts=int(restarts),
               folder=Path("runs/small"), grace_s=float(grace_s), timeout_s=float(timeout_s),
               nothing_to_lose="--nothing-to-lose" in sys.argv,
               on_missing=lambda nodes: Path("missing").write_text(str(nodes))))
"""
EARLY = (("0", "--at-once"), ("1", "--hold"))  # the second machine is asked before it begins


class Launcher:
    """One machine's launcher, and what it says."""

    def __init__(
        self,
        folder: Path,
        behaviour: str,
        node: str = "alone",
        *flags: str,
        port: int = 0,
        restarts: int = 0,
        grace_s: float = 60,
        timeout_s: float = 60,
        address: str = "127.0.0.1",
    ) -> None:
        self.folder = folder / "runs" / "small"
        self._errors = folder / f"errors-{node}"
        environ = {k: v for k, v in os.environ.items() if k != "RANK"}
        environ |= {"STUB": behaviour, "PYTHONPATH": str(STUB), "OMP_NUM_THREADS": "1"}
        arguments = map(str, (node, port, restarts, grace_s, timeout_s, address))
        with self._errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", LAUNCHER, *arguments, *flags],
                cwd=folder,
                env=environ,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def pids(self, attempt: int = 0, ranks: tuple[int, ...] = (0, 1)) -> list[int]:
        """Process ids of ranks, when they have begun their `attempt`-th start."""
        end = time.monotonic() + 120
        while not all(self.starts(rank)[-1:] == [str(attempt)] for rank in ranks):
            assert time.monotonic() < end, self.errors()
            assert self.process.poll() is None, self.errors()
            time.sleep(0.02)
        return [int((self.folder / f"rank{rank}").read_text().split()[0]) for rank in ranks]

    def starts(self, rank: int) -> list[str]:
        """The numbers of a rank's starts so far."""
        file = self.folder / f"starts{rank}"
        return file.read_text().split() if file.exists() else []

    def wait_for(self, *names: str) -> None:
        """Until there are these files in the folder."""
        end = time.monotonic() + 120
        while not all((self.folder / name).exists() for name in names):
            assert time.monotonic() < end, self.errors()
            time.sleep(0.02)

    def end(self) -> int:
        return self.process.wait(120)

    def errors(self) -> list[str]:
        return self._errors.read_text().splitlines()


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launcher]]:
    made: list[Launcher] = []

    def start(*given: object, **options: object) -> Launcher:
        made.append(Launcher(tmp_path, *given, **options))  # pyright: ignore[reportArgumentType]
        return made[-1]

    yield start
    for launcher in made:
        launcher.process.kill()
        launcher.process.wait()


def test_a_signal_to_the_launcher_asks_every_rank_to_stop(
    launch: Callable[..., Launcher], tmp_path: Path
) -> None:
    run = launch("wait", "alone", "--hold")  # as `counterflow node` holds signals at first
    (tmp_path / "go").touch()
    run.pids()
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGTERM):  # at once: one request
        run.process.send_signal(number)
    assert run.end() == STOPPED
    assert run.errors() == []


def test_a_run_that_ends_by_itself_is_not_told_as_stopped_for_what_an_earlier_one_left(
    tmp_path: Path, launch: Callable[..., Launcher]
) -> None:
    (tmp_path / "runs" / "small").mkdir(parents=True)
    (tmp_path / "runs" / "small" / "stopped.json").write_text("{}")
    assert launch("return").end() == DONE


def test_a_second_sigterm_ends_ranks_that_do_not_stop(launch: Callable[..., Launcher]) -> None:
    run = launch("hang")
    run.pids()
    run.process.send_signal(signal.SIGTERM)
    run.wait_for("asked0", "asked1")
    time.sleep(2.5)  # later than what counts as the same request
    assert run.process.poll() is None
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 128 + signal.SIGTERM
    assert sorted(run.errors()) == [
        f"counterflow: error: rank {rank}, step 7: ended by SIGINT" for rank in range(2)
    ]


def test_a_request_before_the_ranks_are_started_stops_all_machines_and_none_fails(
    launch: Callable[..., Launcher], tmp_path: Path
) -> None:
    port = free_port()
    first, second = (launch("wait", node, flag, port=port) for node, flag in EARLY)
    assert second.process.stdout is not None
    assert second.process.stdout.readline() == "held\n"
    second.process.send_signal(signal.SIGUSR1)
    (tmp_path / "go").touch()
    assert (first.end(), second.end()) == (STOPPED, STOPPED), first.errors()
    assert second.errors() == []


def test_a_request_ends_ranks_that_have_nothing_to_lose_at_once_as_stopped(
    launch: Callable[..., Launcher],
) -> None:
    run = launch("hang", "alone", "--nothing-to-lose", grace_s=0)
    run.pids()
    run.process.send_signal(signal.SIGUSR1)
    assert run.end() == STOPPED


def test_after_a_lost_rank_all_start_again(launch: Callable[..., Launcher]) -> None:
    run = launch("once die", restarts=3)
    assert run.end() == DONE
    assert run.starts(0) == run.starts(1) == ["0", "1"]
    assert run.errors()[-1] == (
        "counterflow: error: rank 1 was ended by SIGKILL; starting again from the last "
        "checkpoint, restart 1 of 3"
    )


def test_a_rank_that_is_lost_while_others_are_asked_is_told_with_every_ranks_place(
    launch: Callable[..., Launcher],
) -> None:
    run = launch("die", "alone", "--look-late")
    assert run.end() == FAILED
    headline, *rows = run.errors()[:-1]
    assert "rank 1 was ended by SIGKILL; where each rank stands" in headline
    assert re.fullmatch(r"rank 0 \(.*\): step 7", rows[0].strip())


def test_the_last_rank_of_a_machine_that_is_lost_while_others_are_asked_is_told(
    launch: Callable[..., Launcher],
) -> None:
    port = free_port()
    first, second = (launch("die", node, "--look-late", port=port) for node in ("0", "1"))
    assert (first.end(), second.end()) == (FAILED, FAILED)
    assert "counterflow: error: rank 1 was ended by SIGKILL" in "".join(second.errors())


def test_a_store_that_does_not_answer_names_its_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    from counterflow.launch.life import nodes

    monkeypatch.setattr(nodes, "_STORE_S", 0.2)
    monkeypatch.setattr(nodes, "_QUIET_S", 0.2)
    council = nodes.Council(nodes.Nodes(1, 0, "127.0.0.1"), 0, limit_s=60)
    monkeypatch.setattr(council, "_lifeline", nodes.Lifeline("127.0.0.1", council.port))
    with (
        pytest.raises(nodes.NodeError, match=r"node 0 \(127.0.0.1\) gives no answer: "),
        council.naming_the_lost(),
    ):
        council.store.get("nobody sets this")
    council.close()


def test_when_restarts_are_used_up_the_run_fails_and_says_why(
    launch: Callable[..., Launcher],
) -> None:
    run = launch("die", restarts=1)
    assert run.end() == FAILED
    assert run.starts(0) == run.starts(1) == ["0", "1"]
    assert run.errors()[-1] == (
        "counterflow: error: rank 1 was ended by SIGKILL; started again once before, so the run "
        "ends"
    )


def test_ranks_of_two_machines_start_again_together_and_one_says_why(
    launch: Callable[..., Launcher],
) -> None:
    port = free_port()
    first, second = (launch("once die", node, port=port, restarts=2) for node in ("0", "1"))
    assert (first.end(), second.end()) == (DONE, DONE)
    assert first.starts(0) == first.starts(1) == ["0", "1"]
    told = [*first.errors(), *second.errors()]
    assert sum("starting again" in line for line in told) == 1
    assert "rank 1 was ended by SIGKILL; starting again" in second.errors()[-1]
    assert sum("where each rank stands" in line for line in told) == 1


def test_a_users_mistake_ends_the_ranks_of_all_machines_and_is_not_tried_again(
    launch: Callable[..., Launcher],
) -> None:
    port = free_port()
    runs = [launch("refuse one", node, port=port, restarts=2) for node in ("0", "1")]
    assert [run.end() for run in runs] == [MISTAKE, MISTAKE]
    assert runs[1].errors() == ["counterflow: error: rank 1: stage 7 is a view"]
    assert runs[0].starts(0) == runs[0].starts(1) == ["0"]


def test_machines_stop_together_and_each_knows_that_the_run_was_stopped(
    launch: Callable[..., Launcher],
) -> None:
    port = free_port()
    first, second = (launch("wait", node, port=port) for node in ("0", "1"))
    first.pids()
    for run in (first, second):
        run.process.send_signal(signal.SIGUSR1)
    assert (first.end(), second.end()) == (STOPPED, STOPPED)
    assert first.errors() == second.errors() == []


@pytest.mark.parametrize("asked", [False, True])
def test_a_machine_whose_first_one_is_gone_ends_with_its_ranks(
    launch: Callable[..., Launcher], asked: bool
) -> None:
    port = free_port()
    first, second = (launch("wait", node, port=port) for node in ("0", "1"))
    first.pids()
    if asked:  # the second is in the midst of a question when the first goes
        first.process.send_signal(signal.SIGSTOP)
        time.sleep(2)
    first.process.kill()
    assert second.end() == FAILED
    assert second.errors()[-1] == "counterflow: error: node 1: node 0 (127.0.0.1) is gone"


@pytest.mark.parametrize(
    ("node", "address", "words"),
    [
        ("0", "127.0.0.1", r"node 0: node 1 has not come to 127.0.0.1:{port} within 0.5 s"),
        ("1", "127.0.0.1", r"node 1: node 0 cannot be reached at 127.0.0.1:{port} within 0.5 s: "),
        ("1", "no-such-host.invalid", r"node 0 cannot be reached at no-such-host.invalid:{port}"),
    ],
)
def test_machines_that_do_not_come_are_named_in_one_line(
    launch: Callable[..., Launcher], tmp_path: Path, node: str, address: str, words: str
) -> None:
    port = free_port()
    run = launch("return", node, port=port, timeout_s=0.5, address=address)
    assert run.end() == FAILED
    (line,) = run.errors()
    assert words.format(port=port) in line
    assert (tmp_path / "missing").read_text() == f"({1 - int(node)},)"
