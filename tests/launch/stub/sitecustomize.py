"""On PYTHONPATH, puts a small stand-in in the place of the trainer, so that tests of how ranks are
started and ended need no training: it does what the environment's STUB says.
"""

import os
import sys
import time
import types
from pathlib import Path
from typing import Any


def _train(config: Any, folder: Path) -> None:
    rank = int(os.environ["RANK"])
    (folder / f"rank{rank}").write_text(f"{os.getpid()} {os.environ['OMP_NUM_THREADS']}")
    match os.environ["STUB"]:
        case "wait":
            time.sleep(120)
        case "refuse":
            raise ValueError(f"stage {config.train.steps} is a view")
        case "die" if rank == 1:
            os.kill(os.getpid(), 9)
        case "die":
            time.sleep(120)
        case "break":
            raise RuntimeError("a bug")


if "STUB" in os.environ:
    trainer = types.ModuleType("counterflow.launch.trainer")
    trainer.train = _train  # pyright: ignore[reportAttributeAccessIssue]
    sys.modules["counterflow.launch.trainer"] = trainer
