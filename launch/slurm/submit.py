"""Hands a script to sbatch, reads what that says, and waits for the job."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..settings import ConfigError

_ID = re.compile(r"([0-9]+)(?:;([A-Za-z0-9._-]+))?")
# sbatch takes SBATCH_ variables before the script's own lines. These always mean something else
# than the script does; another one counts only where the script does not have its option.
_OVERRIDING = (
    *("OUTPUT", "ERROR", "OPEN_MODE", "REQUEUE", "NO_REQUEUE", "SIGNAL", "ARRAY_INX"),
    *("JOB_NAME", "WAIT"),
)
# Names of the variables that say what an option does, where they are not the option's own.
_VARIABLES = {
    "time": ("TIMELIMIT",),
    "switches": ("REQ_SWITCH", "WAIT4SWITCH"),
    "mem": ("MEM_PER_NODE", "MEM_PER_CPU", "MEM_PER_GPU"),
    "mem-per-cpu": ("MEM_PER_NODE", "MEM_PER_CPU", "MEM_PER_GPU"),
    "mem-per-gpu": ("MEM_PER_NODE", "MEM_PER_CPU", "MEM_PER_GPU"),
    "gpus-per-node": ("GPUS_PER_NODE", "GPUS", "GPUS_PER_TASK", "GPUS_PER_SOCKET"),
    "cpu-freq": ("CPU_FREQ_REQ",),
}
_SHORT = {
    "A": "account",
    "p": "partition",
    "q": "qos",
    "C": "constraint",
    "t": "time",
    "M": "clusters",
    "G": "gpus",
    "B": "extra-node-info",
    "m": "distribution",
    "S": "core-spec",
    "k": "no-kill",
    "O": "overcommit",
    "D": "chdir",
    "s": "oversubscribe",
}
_OPTION = re.compile(r"#SBATCH +\"?(?:--([a-z][a-z0-9-]*)|-([A-Za-z]))", re.MULTILINE)
_SUBMIT_S = 300.0  # a controller with much to do lets sbatch wait
_ASK_S = 60.0
_MOST_FAILURES = 6  # to answer, in a row: three to four minutes, in which a controller starts again
_GOING = frozenset(
    (
        *("PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED", "RESIZING"),
        *("REQUEUE_HOLD", "REQUEUE_FED", "SIGNALING", "STAGE_OUT", "STOPPED"),
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
    try:
        done = subprocess.run(
            ["sbatch", "--parsable"],
            input=script,
            env=clean(environ, script),
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=_SUBMIT_S,
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"sbatch gave no answer within {_SUBMIT_S:g} s; see with `squeue --me` whether "
            "there is a job before submitting again"
        ) from None
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    if done.returncode != 0:
        reason = "; ".join(line.removeprefix("sbatch: error: ") for line in said)
        raise ConfigError(
            f"sbatch refuses the job: {reason or f'exit status {done.returncode}'}; change what it "
            "names (--partition, --account, --time, ...); --dry-run shows the script"
        )
    return parse_job_id(done.stdout)


def wait_for(job: JobId, *, poll_s: float = 2.0) -> int:
    """Wait until a job has ended for good; its exit status, 1 where a signal or Slurm ended it.

    Args:
        job: or all tasks of a job array.
        poll_s: between two questions, seconds; many more after one without an answer.

    Raises:
        ConfigError: Slurm's controller does not answer, or knows nothing of the job.
    """
    command = ["scontrol", *job.flag.split(), "show", "job", "--oneliner", str(job)]
    failures = 0
    while True:
        told, problem = _ask(command)
        if problem:
            failures += 1
            if failures > _MOST_FAILURES:
                raise ConfigError(
                    f"scontrol tells nothing of job {job} ({problem}); see its output for how it "
                    "ends"
                )
            time.sleep(failures * 5 * poll_s)
            continue
        failures = 0
        states = re.findall(r"\bJobState=(\w+)", told)
        ends = re.findall(r"\bExitCode=([0-9]+):([0-9]+)", told)
        if not _GOING & set(states):
            worst = max((int(code) for code, _ in ends), default=1)
            well = all(state == "COMPLETED" for state in states)
            return 0 if well else worst or 1
        time.sleep(poll_s)


def _ask(command: Sequence[str]) -> tuple[str, str]:
    """What a command of Slurm's says, and why it says nothing."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, timeout=_ASK_S
        )
    except subprocess.TimeoutExpired:
        return "", f"no answer within {_ASK_S:g} s"
    except OSError as error:
        return "", error.strerror or str(error)
    if done.returncode != 0:
        return "", done.stderr.strip() or f"exit status {done.returncode}"
    return done.stdout, ""


def clean(environ: Mapping[str, str], script: str) -> dict[str, str]:
    """The environment for sbatch, without what would change the job behind the script's back.

    Inside another job, also without that job's own variables, which srun would take for its own.
    """
    inside = "SLURM_JOB_ID" in environ
    dropped = {f"SBATCH_{name}" for name in (*_OVERRIDING, *_variables(script))}
    return {
        name: value
        for name, value in environ.items()
        if name not in dropped
        and not (inside and name.startswith(("SLURM_", "SLURMD_")) and name != "SLURM_CONF")
    }


def _variables(script: str) -> Iterator[str]:
    """The variables, without SBATCH_, that say what the script's own lines do."""
    for long, short in _OPTION.findall(script):
        option = long or _SHORT.get(short, "")
        yield from _VARIABLES.get(option, (option.upper().replace("-", "_"),))
