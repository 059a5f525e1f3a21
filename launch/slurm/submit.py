"""Hands a script to sbatch, and reads what that says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from ..settings import ConfigError

_ID = re.compile(r"([0-9]+)(?:;([A-Za-z0-9._-]+))?")
# sbatch takes these before the script's own lines, which have what they would change.
_OVERRIDING = frozenset(
    f"SBATCH_{name}"
    for name in (
        *("OUTPUT", "ERROR", "OPEN_MODE", "REQUEUE", "NO_REQUEUE", "SIGNAL", "ARRAY_INX"),
        *("JOB_NAME", "WAIT"),
    )
)


@dataclass(frozen=True)
class JobId:
    """A job's number, and its cluster where there are several."""

    number: int
    cluster: str = ""

    def __str__(self) -> str:
        return str(self.number)

    @property
    def flag(self) -> str:
        """What Slurm's commands need besides the number, with a space before it."""
        return f" --clusters={self.cluster}" if self.cluster else ""


def parse_job_id(text: str) -> JobId:
    """The job that `sbatch --parsable` names: "123" or "123;cluster".

    Raises:
        ConfigError: it names none.
    """
    found = _ID.fullmatch(text.strip())
    if found is None:
        raise ConfigError(
            f"sbatch answered {text.strip()!r}, which is no job's number; see with `squeue --me` "
            "whether there is a job"
        )
    return JobId(int(found[1]), found[2] or "")


def submit(script: str, environ: Mapping[str, str] = os.environ) -> JobId:
    """Submit a script.

    Raises:
        ConfigError: there is no sbatch, or it refuses; with its own words.
    """
    if shutil.which("sbatch", path=environ.get("PATH")) is None:
        raise ConfigError(
            "sbatch is not on PATH: submit from a login node of a Slurm cluster, or see the script "
            "with --dry-run"
        )
    done = subprocess.run(
        ["sbatch", "--parsable"],
        input=script,
        env=clean(environ),
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    if done.returncode != 0:
        reason = "; ".join(line.removeprefix("sbatch: error: ") for line in said)
        raise ConfigError(
            f"sbatch refuses the job: {reason or f'exit status {done.returncode}'}; change what it "
            "names (--partition, --account, --time, ...); --dry-run shows the script"
        )
    return parse_job_id(done.stdout)


def clean(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for sbatch, without what would change the job behind the script's back.

    Inside another job, also without that job's own variables, which srun would take for its own.
    """
    inside = "SLURM_JOB_ID" in environ
    return {
        name: value
        for name, value in environ.items()
        if name not in _OVERRIDING
        and not (inside and name.startswith(("SLURM_", "SLURMD_")) and name != "SLURM_CONF")
    }
