"""A rank that is killed ends a run within a bounded time, and one table says where all stood."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# One small step after another, so that a signal comes in the middle of one.
SMALL = {
    "mesh.pp": "2",
    "mesh.dp": "2",
    "mesh.ep": "2",
    "train.steps": "100000",
    "train.eval_every": "0",
    "data.sequence_length": "32",
}
ROW = re.compile(r"  ranks? ([\d, -]+) \([^)]*\): (.*)")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the ranks in /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_when_a_rank_is_killed_one_table_says_where_every_rank_stood(
    tmp_path: Path, number: signal.Signals
) -> None:
    arguments = [f"--{key}={value}" for key, value in SMALL.items()]
    run = subprocess.Popen(
        [
            *(sys.executable, "-m", "counterflow", "train", *arguments),
            *("--run.folder", str(tmp_path), "--run.name", "x", "--run.timeout_s", "60"),
            *("--checkpoint.enabled", "false"),  # else SIGTERM asks all ranks to stop
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    try:
        wait_for_steps(tmp_path / "x" / "metrics.jsonl", 3, run)
        ranks = ranks_of(run.pid)
        assert sorted(ranks) == [0, 1, 2, 3]
        os.kill(ranks[1], number)
        began = time.monotonic()
        _, errors = run.communicate(timeout=60)
        assert time.monotonic() - began < 45
    finally:
        run.kill()
        run.wait()
    assert run.returncode != 0
    (headline,) = [line for line in errors.splitlines() if "where each rank stands:" in line]
    assert headline.startswith("counterflow: error: rank ")
    rows = [match for line in errors.splitlines() if (match := ROW.fullmatch(line))]
    told = {rank: match[2] for match in rows for rank in numbers(match[1])}
    assert sorted(told) == [0, 1, 2, 3], errors
    how = "was ended by SIGKILL" if number == signal.SIGKILL else "ended with exit status 143"
    assert told[1] == how
    for rank in (0, 2, 3):
        assert re.match(r"step \d+, (action \S+|[a-z][^:]*)", told[rank]), errors
    if number == signal.SIGTERM:
        assert re.search("counterflow: error: rank 1, step .*: ended by SIGTERM", errors)
    # Whoever exchanges messages with rank 1 (experts with 0, the pipeline with 3) and was waiting
    # says so; at least one of them was, or the run would have gone on.
    waited_for = [re.findall(r"\branks? (\d[\d, -]*)", told[rank]) for rank in (0, 3)]
    assert any(1 in numbers(text) for texts in waited_for for text in texts), errors
    assert not any(os.path.exists(f"/proc/{pid}") for pid in ranks.values())


def numbers(ranges: str) -> list[int]:
    """Of "0, 2-3": 0, 2, 3."""
    found: list[int] = []
    for part in ranges.strip(" ,-").split(", "):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def wait_for_steps(metrics: Path, count: int, run: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_text().splitlines()) < count:
        assert run.poll() is None, "the run ended before it had begun"
        assert time.monotonic() < limit, "the run did not begin"
        time.sleep(0.2)


def ranks_of(launcher: int) -> dict[int, int]:
    """Process id of every rank, by what its environment says."""
    found: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            environment = (entry / "environ").read_bytes().split(b"\0")
        except (OSError, IndexError):
            continue
        own = [item for item in environment if item.startswith(b"RANK=")]
        if parent == launcher and own:
            found[int(own[0][5:])] = int(entry.name)
    return found
