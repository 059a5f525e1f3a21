"""A run that is lost at a random moment, again and again, against one that was not.

Each trial trains a small model on two ranks, ends it as its kind says at a moment drawn from the
trial's seed, starts it again until it reaches its last step, and holds every number of its metrics
and every bit of its last checkpoint against an uninterrupted run's.

    python -m bench.survival [--trials 24] [--seed 0]

Exits with 1 if any trial ends otherwise. Full disks: a file system in memory, filled up while
training goes on (root may mount one; else these kinds are left out, and said so).
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from bench.machine import write_result
from bench.survivor import EVERY, STEPS, Outcome, Survivor, clear, damage
from counterflow.launch.life.status import FAILED

DISK_MB = 64
_FOR_LINES = 1 << 20  # of metrics; a checkpoint is larger
LAST = STEPS - 3  # step at which a run is lost; later it might end before it is


def one_rank(run: Survivor, rng: random.Random) -> str:
    """SIGKILL of one rank."""
    step, rank = rng.randrange(1, LAST + 1), rng.randrange(2)
    run.start()
    run.wait_for_step(step)
    time.sleep(rng.random() * 0.2)
    run.kill_rank(rank)
    return f"rank {rank} after step {step}"


def all_ranks(run: Survivor, rng: random.Random) -> str:
    """SIGKILL of all ranks."""
    step = rng.randrange(1, LAST + 1)
    run.start()
    run.wait_for_step(step)
    time.sleep(rng.random() * 0.2)
    run.kill_all_ranks()
    return f"after step {step}"


def launcher(run: Survivor, rng: random.Random) -> str:
    """SIGKILL of torchrun."""
    step = rng.randrange(1, LAST + 1)
    run.start()
    run.wait_for_step(step)
    time.sleep(rng.random() * 0.2)
    run.kill_launcher()
    return f"after step {step}"


def during_checkpoint(run: Survivor, rng: random.Random) -> str:
    """SIGKILL of all while a checkpoint is being written."""
    number = rng.randrange(1, 4)
    run.start()
    begun: set[str] = set()

    def writing() -> bool:
        begun.update(_parts(run))
        return len(begun) >= number

    run.wait(writing, f"checkpoint {number}", pause_s=0.0)
    time.sleep(rng.random() * 0.003)
    run.kill_launcher()
    return f"checkpoint {number}, {'half written' if _parts(run) else 'just finished'}"


def _parts(run: Survivor) -> list[str]:
    """Checkpoints that are being written; names come and go meanwhile."""
    try:
        names = os.listdir(run.checkpoints)
    except FileNotFoundError:
        return []
    return [name for name in names if fnmatch(name, ".step-*.part")]


def damaged(run: Survivor, rng: random.Random) -> str:
    """The newest checkpoint cut short, or a bit of it turned, after a kill."""
    run.start()
    run.wait(lambda: len(run.steps_saved()) >= 2, "a second checkpoint")
    run.kill_launcher()
    file = rng.choice(sorted(run.newest().iterdir()))
    return damage(file, rng)


def full_disk(run: Survivor, _: random.Random) -> str:
    """No space left for a checkpoint, then SIGKILL of all, then space again."""
    with filled(run, _FOR_LINES):
        run.wait(lambda: any(li["kind"] == "save_failed" for li in run.lines()), "a failed save")
        run.kill_launcher()
    return _left(run)


def no_byte_left(run: Survivor, _: random.Random) -> str:
    """No space left for anything: the run ends by itself, as its last state cannot be saved."""
    with filled(run, 0):
        status = run.end()
        assert status == FAILED, f"status {status}: {run.said[-1]}"
    return _left(run)


@contextmanager
def filled(run: Survivor, room: int) -> Iterator[None]:
    """Start a run and fill its disk but for `room` bytes when it has a checkpoint, for a while."""
    run.start()
    run.wait(lambda: bool(run.steps_saved()), "a first checkpoint")
    filler = run.folder / "filler"
    fill(filler, room)
    yield
    filler.unlink()


def _left(run: Survivor) -> str:
    saved = run.steps_saved()
    assert saved, "the checkpoint that was there is gone"
    return f"the checkpoint of step {saved[0]} was left"


KINDS: dict[str, Callable[[Survivor, random.Random], str]] = {
    "one rank": one_rank,
    "all ranks": all_ranks,
    "torchrun": launcher,
    "during a checkpoint": during_checkpoint,
    "damaged file": damaged,
    "full disk": full_disk,
    "no byte left": no_byte_left,
}
ON_SMALL_DISK = ("full disk", "no byte left")


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """A file system of its own in memory at `folder`; its content is gone afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(file: Path, room: int) -> None:
    """Write to `file` until there is no space left but for `room` bytes."""
    with file.open("wb", buffering=0) as opened:
        with suppress(OSError):
            while True:
                opened.write(bytes(1 << 16))
        opened.truncate(max(0, opened.tell() - room))


def may_mount(folder: Path) -> bool:
    """Whether this process may make a file system."""
    try:
        with small_disk(folder / "probe", 1):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def trial(kind: str, seed: int, folder: Path, uninterrupted: Outcome) -> dict[str, Any]:
    """One run of a kind, ended and started again; whether it ended like the other."""
    run, rng = Survivor(folder), random.Random(seed)
    disk = small_disk(folder, DISK_MB) if kind in ON_SMALL_DISK else nullcontext()
    with disk, run:
        began = time.perf_counter()
        happened = KINDS[kind](run, rng)
        before = run.steps_saved()
        run.finish()
        difference = uninterrupted.difference(Outcome.of(run))
        resumed = [line["step"] for line in run.lines() if line["kind"] == "resume"]
        seconds = time.perf_counter() - began
    clear(run)
    return {
        "kind": kind,
        "seed": seed,
        "happened": happened,
        "saved_before": before,
        "resumed_at": resumed,
        "seconds": round(seconds, 1),
        "difference": difference,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="losing runs, and starting them again")
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kinds = list(KINDS)
        if not may_mount(folder):
            kinds = [kind for kind in KINDS if kind not in ON_SMALL_DISK]
            print("full disks are left out: this process may not mount a file system")
        with Survivor(folder / "uninterrupted") as whole:
            whole.finish()
        uninterrupted = Outcome.of(whole)
        for number in range(options.trials):
            kind = kinds[number % len(kinds)]
            row = trial(kind, options.seed + number, folder / str(number), uninterrupted)
            found.append(row)
            end = row["difference"] or "the same to the last bit"
            at = f"went on from {row['resumed_at']}"
            print(f"{number:3} {kind:20} {row['happened']:45} {at}: {end}", flush=True)
    same = sum(not row["difference"] for row in found)
    print(f"{same} of {len(found)} ended like the run that was not interrupted")
    write_result("survival", {"steps": STEPS, "every": EVERY, "same": same, "trials": found})
    sys.exit(same != len(found))


if __name__ == "__main__":
    main()
