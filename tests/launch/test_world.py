"""How one rank finds its place among the others, and what it says when they do not come."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from counterflow.launch.settings import ConfigError
from counterflow.launch.world import Place
from tests.ranks import free_port

WHOLE = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}
_TRAIN = [
    *(sys.executable, "-m", "counterflow", "train", "--schedule.name", "1f1b"),
    *("--mesh.pp", "1", "--mesh.ep", "1", "--run.device", "cpu"),
]


def test_a_place_is_read_from_the_environment_and_one_machine_is_assumed_if_not_told() -> None:
    assert Place.of(WHOLE) == Place(5, 8, 1, 4, "node1", 29500)
    few = {key: text for key, text in WHOLE.items() if not key.startswith("LOCAL")}
    assert Place.of(few) == Place(5, 8, 0, 8, "node1", 29500)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"WORLD_SIZE": None}, "has RANK, as for one rank of a run, but no WORLD_SIZE; start"),
        ({"MASTER_ADDR": None, "MASTER_PORT": ""}, "but no MASTER_ADDR, MASTER_PORT; start"),
        ({"RANK": ""}, "RANK='' is not a whole number from 0 to 7"),
        ({"RANK": "8"}, "RANK='8' is not a whole number from 0 to 7 (WORLD_SIZE - 1)"),
        ({"RANK": "-1"}, "RANK='-1'"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE='many' is not a whole number from 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK='4' is not a whole number from 0 to 3"),
        ({"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE='9' is not a whole number from 1 to 8"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT='65536' is not a whole number from 1 to 65535"),
    ],
)
def test_an_environment_that_is_no_ranks_is_refused_in_one_line(
    changes: dict[str, str | None], words: str
) -> None:
    environ = {key: text for key, text in (WHOLE | changes).items() if text is not None}
    with pytest.raises(ConfigError) as caught:
        Place.of(environ)
    assert words in str(caught.value)
    assert "torchrun" in str(caught.value)
    assert "\n" not in str(caught.value)


def rank(number: int, size: int, port: int, folder: Path, limit_s: float) -> subprocess.Popen[str]:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("LOCAL_")}
    environ |= {"RANK": str(number), "WORLD_SIZE": str(size)}
    environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.Popen(
        [*_TRAIN, "--mesh.dp", str(size), "--run.timeout_s", str(limit_s)],
        cwd=folder,
        env=environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_rank_without_a_world_size_is_told_in_one_line(tmp_path: Path) -> None:
    environ = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "MASTER_ADDR")}
    run = subprocess.run(
        _TRAIN, cwd=tmp_path, env=environ | {"RANK": "0"}, capture_output=True, text=True
    )
    assert run.returncode == 2
    assert run.stderr.startswith("counterflow: error: the environment has RANK")
    assert run.stderr.count("\n") == 1


@pytest.mark.alone
@pytest.mark.parametrize("present", [[0], [1], [0, 1]])
def test_ranks_that_wait_for_others_in_vain_say_so_in_one_line_within_the_limit(
    tmp_path: Path, present: list[int]
) -> None:
    port = free_port()
    # Where two are there, the second has to come before the first has waited long enough.
    limit_s = 2.0 if len(present) == 1 else 12.0
    size = len(present) + 1
    began = time.monotonic()
    processes = [rank(number, size, port, tmp_path, limit_s) for number in present]
    ended = [process.communicate(timeout=120)[1] for process in processes]
    # Most of it is importing torch on a loaded machine; the default limit is 300.
    assert time.monotonic() - began < 120
    assert [process.returncode for process in processes] == [1] * len(present)
    tellers = [(n, errors) for n, errors in zip(present, ended, strict=True) if errors]
    assert len(tellers) == 1  # the others know that one says it for all
    for number, errors in tellers:
        others = "rank" if size == 2 else "2 ranks"
        assert errors.startswith(
            f"counterflow: error: rank {number}: waiting for the other {others} to join at "
            f"127.0.0.1:{port}: "
        )
        assert errors.count("\n") == 1
        assert f"no answer within {limit_s:g} s" in errors
        if present != [1]:  # who has a store knows who has come to it
            assert f"s from rank {size - 1}; start all {size} ranks" in errors
