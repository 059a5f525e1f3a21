"""On PYTHONPATH, puts a small stand-in in the place of the trainer, so that tests of how ranks are
started and ended need no training: it does what the environment's STUB says.
"""

import atexit
import os
import sys
import time
import types
from pathlib import Path
from typing import Any


def _train(config: Any, folder: Path) -> int:
    rank = int(os.environ["RANK"])
    from counterflow.comm import CommError
    from counterflow.launch.life.stop import StopRequests
    from counterflow.launch.life.watchdog import Watchdog
    from counterflow.launch.world import Place

    def where() -> str:
        return f"rank {rank}, step 7"

    # As the real one does.
    checkpoint, place = config.checkpoint, Place.of()
    limit_s = config.run.timeout_s * 1.1 + 5
    with (
        StopRequests(where, graceful=checkpoint.enabled, grace_s=checkpoint.grace_s) as requests,
        Watchdog(where, place, limit_s=limit_s) as watchdog,
    ):
        try:
            return _behave(config, folder, rank, requests)
        except CommError as error:
            if watchdog.report(str(error), error.peers):
                os._exit(1)
            raise


def _behave(config: Any, folder: Path, rank: int, requests: Any) -> int:
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    world = int(os.environ["WORLD_SIZE"])
    (folder / f"rank{rank}").write_text(f"{os.getpid()} {os.environ['OMP_NUM_THREADS']}")
    with (folder / f"starts{rank}").open("a") as starts:  # last: others look for it
        starts.write(f"{attempt}\n")
    behaviour = os.environ["STUB"]
    if behaviour.startswith("once "):
        behaviour = behaviour.removeprefix("once ") if attempt == 0 else "return"
    match behaviour:
        case "wait":
            while requests.signal is None:
                time.sleep(0.01)
            if rank == 0:
                (folder / "stopped.json").write_text("{}")
        case "hang":
            while requests.signal is None:
                time.sleep(0.01)
            (folder / f"asked{rank}").touch()
            time.sleep(120)
        case "refuse":
            raise ValueError(f"stage {config.train.steps} is a view")
        case "refuse one" if rank == 1:
            _await_starts(folder, world, attempt)
            raise ValueError("stage 7 is a view")
        case "die" if rank == 1:
            _await_starts(folder, world, attempt)
            os.kill(os.getpid(), 9)
        case "die" | "refuse one":
            time.sleep(120)
        case "abort" if rank == 1:
            _await_starts(folder, world, attempt)
            os.kill(os.getpid(), 9)
        case "abort":  # as a communication library may when its peer is gone
            _await_starts(folder, world, attempt)
            while _alive(int(_first(folder / "rank1"))):
                time.sleep(0.001)
            os.abort()
        case "lose":
            from counterflow.comm import CommError

            atexit.register(os.abort)
            raise CommError(f"rank {rank}, step 7: a peer is gone")
        case "break":
            raise RuntimeError("a bug")
    return 0


def _await_starts(folder: Path, world: int, attempt: int) -> None:
    """Until every rank has begun this attempt: the launcher would end one before it has."""

    def begun(rank: int) -> bool:
        try:
            return (folder / f"starts{rank}").read_text().split()[-1] == str(attempt)
        except (FileNotFoundError, IndexError):
            return False

    while not all(begun(rank) for rank in range(world)):
        time.sleep(0.01)


def _first(file: Path) -> str:
    return (file.read_text().split() or ["1"])[0]


def _alive(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


if "STUB" in os.environ:
    trainer = types.ModuleType("counterflow.launch.trainer")
    trainer.train = _train  # pyright: ignore[reportAttributeAccessIssue]
    sys.modules["counterflow.launch.trainer"] = trainer
