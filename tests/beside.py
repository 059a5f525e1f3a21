"""Tests in two processes at once, `pytest -n 2`: what runs beside what.

Most tests wait much of their time, for processes to start, for ranks, for Slurm; two at a time make
better use of a machine. A file's tests run in one process, in their order, so that what they share
is made once, and all tests of the one Slurm cluster run in one process. A test marked `alone` reads
clocks closely, or looks at what all processes of the machine share; none runs beside it.
"""

from __future__ import annotations

import fcntl
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from xdist.scheduler import LoadFileScheduling
    from xdist.workermanage import WorkerController

ONE_CLUSTER = "tests/slurm/"
# They take minutes: begun first, so that in the end no process waits long for the other.
FIRST = (ONE_CLUSTER, "tests/launch/test_survival.py", "tests/launch/test_engine.py")
_FOLDER = pytest.StashKey[TemporaryDirectory[str]]()
_INPUT = "counterflow_turns"  # what tells the processes where the files of `Turns` are


class Turns:
    """A lock that many processes may hold together, or one alone; who asked first has it first.

    Args:
        folder: of the files that stand for the lock; the same in all processes.

    The kernel gives back what a process held that has ended, and no child inherits it.
    """

    def __init__(self, folder: Path) -> None:
        self._door = (folder / "door").open("w")
        self._room = (folder / "room").open("w+")

    @contextmanager
    def held(self, *, alone: bool) -> Generator[None]:
        """Hold it, alone or with others who do not ask to be."""
        # Whoever waits to be alone keeps the door meanwhile, or new ones would come in for ever.
        fcntl.lockf(self._door, fcntl.LOCK_EX)
        try:
            fcntl.lockf(self._room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        finally:
            fcntl.lockf(self._door, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.lockf(self._room, fcntl.LOCK_UN)


def file_group(nodeid: str) -> str:
    """What of a test's id is the same for all that have to run in one process."""
    return ONE_CLUSTER if nodeid.startswith(ONE_CLUSTER) else nodeid.partition("::")[0]


def _place(item: pytest.Item) -> int:
    return next((i for i, name in enumerate(FIRST) if item.nodeid.startswith(name)), len(FIRST))


class BesideEachOther:
    """The plugin of a process that is one of several."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=_place)  # stable: all others stay in their order

    @pytest.hookimpl(wrapper=True, tryfirst=True)  # around pytest-timeout, whose clock starts later
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        with self._turns.held(alone=item.get_closest_marker("alone") is not None):
            return (yield)


def configure(config: pytest.Config) -> None:
    """Make this process one of several, if it is."""
    given: dict[str, Any] | None = getattr(config, "workerinput", None)
    if given is not None:
        config.pluginmanager.register(BesideEachOther(Turns(Path(given[_INPUT]))))


def configure_node(node: WorkerController) -> None:
    """Tell one of the processes where the lock's files are."""
    config = node.config
    if _FOLDER not in config.stash:
        folder = TemporaryDirectory(prefix="counterflow-tests-")
        config.stash[_FOLDER] = folder
        config.add_cleanup(folder.cleanup)
    node.workerinput[_INPUT] = config.stash[_FOLDER].name


def scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    """Gives each process files, and to one of them all files of the one cluster."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return file_group(nodeid)

    config.option.loadscopereorder = False  # in the order in which the tests stand
    return ByFile(config, log)
