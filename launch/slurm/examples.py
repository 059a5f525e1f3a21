"""The example scripts of docs/examples, made by the launcher itself.

python -m counterflow.launch.slurm.examples docs/examples
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from .options import parse
from .script import Stamp, Task, job_script
from .section import SlurmConfig

_RUN = PurePosixPath("/shared/runs/v3")
COMMANDS: Mapping[str, str] = {
    "plain.sh": "--nodes 16 --gpus-per-node 8 --partition h100 --account research --time 24:00:00 "
    "--exclusive --interface ib0 --setup 'module load cuda/12.8' -- train v3.toml",
    "container.sh": "--nodes 16 --gpus-per-node 8 --partition h100 --time 24:00:00 --exclusive "
    "--container-image /shared/images/counterflow.sqsh --container-mounts /data:/data:ro "
    "--env NCCL_IB_HCA=mlx5 -- train v3.toml",
    "array.sh": "--nodes 2 --ranks-per-node 4 --time 2:00:00 --signal-seconds 300 "
    "--array low.toml --array high.toml -- train --train.steps 2000",
}


def examples() -> dict[str, str]:
    """Each script by its file's name; its date, version and paths are the same on every machine."""
    return {name: _script(shlex.split(command)) for name, command in COMMANDS.items()}


def _script(arguments: Sequence[str]) -> str:
    slurm: SlurmConfig = parse(arguments, SlurmConfig(), {}, "").config
    runs = [_RUN.with_name(Path(path).stem) for path in slurm.array] or [_RUN]
    tasks = [Task(run.name, run, run / "slurm" / "train-0123456789ab.toml") for run in runs]
    command = ["counterflow", "launch", "slurm", *arguments]
    python = "python3" if slurm.container_image else "/shared/venv/bin/python"
    return job_script(
        slurm, tasks, python=python, stamp=Stamp(command, "/shared/home", "VERSION", "DATE")
    )


def main(folder: Path) -> None:
    """Write every example to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in examples().items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
