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


def _train(config: Any, folder: Path) -> None:
    rank = int(os.environ["RANK"])
    (folder / f"rank{rank}").write_text(f"{os.getpid()} {os.environ['OMP_NUM_THREADS']}")
    from counterflow.comm import CommError

    match os.environ["STUB"]:
        case "wait":
            time.sleep(120)
        case "refuse":
            raise ValueError(f"stage {config.train.steps} is a view")
        case "die" if rank == 1:
            while not (folder / "rank0").exists():  # torchrun would end it before it has begun
                time.sleep(0.01)
            os.kill(os.getpid(), 9)
        case "die":
            time.sleep(120)
        case "abort" if rank == 1:
            os.kill(os.getpid(), 9)
        case "abort":  # as a communication library may when its peer is gone
            while not (folder / "rank1").exists() or _alive(int(_first(folder / "rank1"))):
                time.sleep(0.001)
            os.abort()
        case "lose":
            atexit.register(os.abort)
            raise CommError(f"rank {rank}, step 7: a peer is gone")
        case "break":
            raise RuntimeError("a bug")


def _first(file: Path) -> str:
    return (file.read_text().split() or ["1"])[0]


def _alive(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


if "STUB" in os.environ:
    trainer = types.ModuleType("counterflow.launch.trainer")
    trainer.train = _train  # pyright: ignore[reportAttributeAccessIssue]
    sys.modules["counterflow.launch.trainer"] = trainer
