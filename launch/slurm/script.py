"""The sbatch script: from values to text, with no effects.

Every text of a user's is quoted, for the shell by shlex and for sbatch's own reading of #SBATCH
lines in its own way; only `setup` lines reach the shell as they are. The script is bash and
scontrol alone, because it may run outside the container that has Python.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from ..settings import ConfigError
from .jobscript import BODY
from .section import SlurmConfig, is_plain

_PLAIN = re.compile(r"[A-Za-z0-9_./:=,@%+-]+")
# What an earlier launcher, or the shell of the person who submits, may have left: none of it is
# about this job.
STALE = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK"),
    *("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"),
)


@dataclass(frozen=True)
class Task:
    """One run of a job: of a job array, one for each task.

    Attributes:
        name: run.name.
        run: the run's folder, absolute.
        config: its whole configuration on file, absolute.
    """

    name: str
    run: PurePosixPath
    config: PurePosixPath


@dataclass(frozen=True)
class Stamp:
    """What made a script.

    Attributes:
        command: the command line.
        folder: where it was given.
        version: of counterflow.
        date: when, as text.
    """

    command: Sequence[str]
    folder: str
    version: str
    date: str


def job_script(slurm: SlurmConfig, tasks: Sequence[Task], *, python: str, stamp: Stamp) -> str:
    """The script that sbatch is given.

    Args:
        slurm: what the job asks for.
        tasks: the run, or those of a job array.
        python: the interpreter on the nodes, or in the container.
        stamp: what made it, for its first lines.

    Raises:
        ConfigError: a text has a line break or another control character, such as the name of the
            current folder; behind it a shell would read a comment as a command.
    """
    assert len(tasks) == max(1, len(slurm.array)), (tasks, slurm.array)
    _require_plain(tasks, python, stamp)  # those of `slurm` are
    parts = [
        "#!/bin/bash",
        f"# counterflow {stamp.version}, {stamp.date}, in {shlex.quote(stamp.folder)}:",
        f"#   {shlex.join(stamp.command)}",
        *(f"#SBATCH {line}" for line in sbatch_lines(slurm, tasks)),
        "",
        *environment_lines(slurm),
        "",
        *task_lines(tasks),
        f"max_requeues={slurm.max_requeues}",
        "",
        *step_lines(slurm, python),
        "",
        BODY.rstrip("\n"),
    ]
    return "\n".join(parts) + "\n"


def _require_plain(tasks: Sequence[Task], python: str, stamp: Stamp) -> None:
    texts = [*stamp.command, stamp.folder, stamp.version, stamp.date, python]
    for task in tasks:
        texts += [task.name, str(task.run), str(task.config)]
    for text in texts:
        if not is_plain(text):
            raise ConfigError(
                f"{text!r}: a line break or another control character, which no script can have; "
                "choose another name or folder"
            )


def sbatch_lines(slurm: SlurmConfig, tasks: Sequence[Task]) -> list[str]:
    """The options of the job, without "#SBATCH"."""
    many = len(tasks) > 1
    # Not in a folder of the job's own: Slurm makes none, and a job whose output cannot be opened
    # fails without a word.
    output = output_pattern(tasks)
    options = {
        "job-name": slurm.job_name or tasks[0].name,
        "nodes": str(slurm.nodes),
        "ntasks-per-node": "1",
        "gpus-per-node": str(slurm.gpus_per_node or ""),
        "cpus-per-task": str(slurm.cpus_per_task or ""),
        "mem": slurm.mem,
        "time": slurm.time,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "reservation": slurm.reservation,
        "nodelist": slurm.nodelist,
        "exclude": slurm.exclude,
        "switches": slurm.switches,
        "signal": f"USR1@{slurm.signal_seconds}" if slurm.signal_seconds else "",
        "array": f"0-{len(tasks) - 1}" if many else "",
    }
    lines = [f"--{name}={sbatch_quote(value)}" for name, value in options.items() if value]
    if slurm.exclusive:
        lines.append("--exclusive")
    lines += [f"--output={output}", "--open-mode=append", "--requeue"]
    return [*lines, *(sbatch_quote(option) for option in slurm.sbatch)]


def output_pattern(tasks: Sequence[Task]) -> str:
    """Where the job's output goes, as sbatch reads it: quoted, %j being the job's number."""
    name = "job-%A_%a.out" if len(tasks) > 1 else "job-%j.out"
    folder = str(tasks[0].run / "slurm")
    return sbatch_quote(f"{folder.replace('%', '%%')}/{name}")


def sbatch_quote(text: str) -> str:
    """`text` so that sbatch reads it out of an #SBATCH line as one word, as it is.

    By its own rules, not the shell's: a space ends a word in spite of a backslash, so there are
    double quotes, and in them a backslash before another and before a quote.
    """
    if _PLAIN.fullmatch(text):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def environment_lines(slurm: SlurmConfig) -> list[str]:
    """Variables and the user's own lines; before any strictness of ours, which could break them."""
    lines = [f"unset {' '.join(STALE)}"]
    for pair in slurm.env:
        name, _, value = pair.partition("=")
        lines.append(f"export {name}={shlex.quote(value)}")
    if slurm.setup:
        lines += ["# As given with --setup:", *slurm.setup]
    return lines


def task_lines(tasks: Sequence[Task]) -> list[str]:
    """Which run this is: `name`, `run`, `config`."""

    def of(task: Task) -> list[str]:
        told = {"name": task.name, "run": str(task.run), "config": str(task.config)}
        return [f"{variable}={shlex.quote(value)}" for variable, value in told.items()]

    if len(tasks) == 1:
        return of(tasks[0])
    lines = ["case ${SLURM_ARRAY_TASK_ID:-} in"]
    for index, task in enumerate(tasks):
        lines.append(f"  {index}) {'; '.join(of(task))} ;;")
    return [*lines, "  *) echo 'counterflow: no such task of the array' >&2; exit 2 ;;", "esac"]


def step_lines(slurm: SlurmConfig, python: str) -> list[str]:
    """The function that starts the step: one process a node, which starts that node's ranks.

    What differs from node to node, such as SLURM_PROCID, is read in the step, never here.
    """
    srun = [
        "srun",
        f"--nodes={slurm.nodes}",
        f"--ntasks={slurm.nodes}",
        "--ntasks-per-node=1",
        "--kill-on-bad-exit=1",
        "--wait=300",
        "--cpu-bind=none",
        # A site's or a person's --export=NONE for sbatch would empty the step's environment too.
        "--export=ALL",
    ]
    words = [shlex.quote(word) for word in srun]
    if slurm.container_image:
        words += _container_words(slurm)
    node = [python, "-m", "counterflow", "node", f"--ranks-per-node={slurm.per_node}"]
    if slurm.interface:
        node.append(f"--interface={slurm.interface}")
    if slurm.roll_call_s:
        node.append(f"--roll-call-s={slurm.roll_call_s}")
    words += [shlex.quote(word) for word in node]
    words += ['--folder="$folder"', "--", "train", '"$config"']
    return ["start() {", "  exec " + _wrapped(words), "}"]


def _container_words(slurm: SlurmConfig) -> list[str]:
    """What puts the step's command into the container; its folder is the run's."""
    quoted = ",".join(slurm.container_mounts)
    if slurm.container_runtime == "pyxis":
        mounts = '"$run:$run"' + (shlex.quote("," + quoted) if quoted else "")
        return [
            shlex.quote(f"--container-image={slurm.container_image}"),
            f"--container-mounts={mounts}",
            '--container-workdir="$run"',
        ]
    binds = [word for mount in slurm.container_mounts for word in ("--bind", shlex.quote(mount))]
    nv = ["--nv"] if slurm.gpus_per_node else []
    own = ["--bind", '"$run:$run"', "--pwd", '"$run"']
    return ["apptainer", "exec", *nv, *own, *binds, shlex.quote(slurm.container_image)]


def _wrapped(words: Sequence[str], width: int = 96) -> str:
    """Words of a command on lines that end in a backslash."""
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) + 3 > width:
            lines.append("   ")
        lines[-1] += f" {word}" if lines[-1] else word
    return " \\\n".join(lines)
