"""Two processes of tests: what runs beside what, and what does not."""

from __future__ import annotations

import pytest

from tests import beside
from tests.inner_pytest import conftest_of, run_pytest

pytest.importorskip("xdist", reason="needs pytest-xdist")

# As tests/conftest.py has them, of the very file that is tested here.
CONFTEST = conftest_of(
    beside,
    pytest_configure="configure",
    pytest_configure_node="configure_node",
    pytest_xdist_make_scheduler="scheduler",
)
PREAMBLE = """
import os, time
from pathlib import Path
import pytest

@pytest.fixture(autouse=True)
def told(request):
    def tell(what):
        with open("log", "a") as log:
            log.write(f"{what} {request.node.name} {os.environ['PYTEST_XDIST_WORKER']}\\n")
    tell("begin")
    yield
    tell("end")

def meet(mine, other):
    Path(mine).touch()
    end = time.monotonic() + 60
    while not Path(other).exists():
        assert time.monotonic() < end, "nothing runs beside this"
        time.sleep(0.01)
"""
FILES = {
    "tests/slurm/test_one.py": "def test_one(): meet('a', 'b')",
    "tests/slurm/test_two.py": "def test_two(): pass",
    # Of those that come first, or the other process might want to be alone before they meet.
    "tests/launch/test_survival.py": "def test_other(): meet('b', 'a')",
    **{
        f"tests/test_{name}.py": "\n".join(
            f"def test_{name}_{i}(): time.sleep(0.02)\n"
            f"@pytest.mark.alone\ndef test_alone_{name}_{i}(): time.sleep(0.05)"
            for i in range(8)
        )
        for name in ("left", "right")
    },
}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """What tests in two processes told: begin or end, of which one, in which process."""
    folder = tmp_path_factory.mktemp("two")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{PREAMBLE}\n{text}\n")
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = alone\n")
    ran = run_pytest(folder, "-n", "2", "--import-mode=importlib", "tests", timeout_s=200)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return [line.split() for line in (folder / "log").read_text().splitlines()]


def test_two_tests_run_at_once_and_every_one_runs_once(log: list[list[str]]) -> None:
    begun = [name for what, name, _ in log if what == "begin"]
    assert len(begun) == len(set(begun)) == 3 + 2 * 16
    # Each of the two that meet began before the other had ended.
    places = {(what, name): i for i, (what, name, _) in enumerate(log)}
    assert places["begin", "test_other"] < places["end", "test_one"]
    assert places["begin", "test_one"] < places["end", "test_other"]


def test_nothing_runs_beside_a_test_marked_alone(log: list[list[str]]) -> None:
    alone = [i for i, (what, name, _) in enumerate(log) if what == "begin" and "alone" in name]
    assert len(alone) == 16
    assert {log[i][2] for i in alone} == {"gw0", "gw1"}, "of both processes"
    for i in alone:
        assert log[i + 1] == ["end", *log[i][1:]]


def test_the_tests_of_a_file_and_those_of_the_cluster_run_in_one_process(
    log: list[list[str]],
) -> None:
    where = {name: worker for _, name, worker in log}
    assert where["test_one"] == where["test_two"] != where["test_other"]
    for side in ("left", "right"):
        of_file = [name for name in where if side in name]
        assert len({where[name] for name in of_file}) == 1
        assert len(of_file) == 16
