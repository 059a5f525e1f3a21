"""`counterflow launch`: checks a run, then submits it to Slurm or starts it here."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from counterflow import __version__  # the root package is no room, so no relative import finds it

from ..settings import ConfigError
from .options import Request, flags, parse, wants_help
from .script import Stamp, Task, job_script
from .section import LocalConfig, SlurmConfig, is_plain

if TYPE_CHECKING:
    from ..config import Config

USAGE = "counterflow launch local|slurm [options] -- train [CONFIG.toml] [--dotted.key VALUE ...]"
_DRY_RUN = "dry_run"
_SWITCHES = {
    "local": {
        _DRY_RUN: "check the run and print this command with every option, and start nothing"
    },
    "slurm": {
        _DRY_RUN: "print the script that would be submitted, and nothing else",
        "wait": "wait until the job has ended, and end as it did",
    },
}
_CONTAINER_PYTHON = "python3"


def run(arguments: Sequence[str]) -> int:
    """The command; the exit status is returned.

    Raises:
        ValueError: one line, or one for each bad configuration of an array.
    """
    where, rest = (arguments[0], list(arguments[1:])) if arguments else ("", [])
    if wants_help(arguments):
        print(_help(where))
        return 0
    if where not in _SWITCHES:
        got = f"got {where!r}" if where else "nothing is given"
        raise ConfigError(f"launch local or launch slurm: {got} (usage: {USAGE})")
    for text in arguments:
        if not is_plain(text):
            raise ConfigError(f"{text!r}: a line break or another control character")
    default = LocalConfig() if where == "local" else SlurmConfig()
    request = parse(rest, default, _SWITCHES[where], f"usage: {USAGE}")
    if where == "local":
        from .local import launch_local

        return launch_local(request.config, request.train, dry_run=_DRY_RUN in request.switches)
    return _slurm(request, without_dry_run(rest))


def without_dry_run(arguments: Sequence[str]) -> list[str]:
    """The arguments that submit what a dry run shows: those before `--` without --dry-run."""
    at = list(arguments).index("--")
    own = [word for word in arguments[:at] if word != "--dry-run"]
    return [*own, *arguments[at:]]


def _slurm(request: Request[SlurmConfig], arguments: Sequence[str]) -> int:
    slurm = request.config
    configs = checked_configs(slurm, request.train)
    tasks = [_task(config) for config in configs]
    python = slurm.python or (_CONTAINER_PYTHON if slurm.container_image else sys.executable)
    command = ["counterflow", "launch", "slurm", *arguments]
    stamp = Stamp(command, str(Path.cwd()), __version__, date_of(os.environ))
    script = job_script(slurm, tasks, python=python, stamp=stamp)
    if _DRY_RUN in request.switches:
        print(script, end="")
        return 0
    return _submit(script, configs, tasks, wait="wait" in request.switches)


def checked_configs(slurm: SlurmConfig, train: Sequence[str]) -> list[Config]:
    """The configuration of each task, checked; all that is wrong with any is told at once.

    Raises:
        ValueError: nothing is to be submitted.
    """
    from ..cli import split_arguments

    file, overrides = split_arguments(train)
    if not slurm.array:
        return [_checked(slurm, file, overrides)]
    if file is not None:
        raise ConfigError(f"both --array and {file}: give each configuration with --array alone")
    configs: list[Config] = []
    wrong: list[str] = []
    for path in slurm.array:
        try:
            configs.append(_checked(slurm, path, overrides))
        except (ValueError, OSError) as error:
            text = str(error)
            wrong.append(text if text.startswith(path) else f"{path}: {text}")
    if wrong:
        raise ConfigError(
            "\n  ".join(
                [f"{len(wrong)} of {len(slurm.array)} configurations; nothing submitted:", *wrong]
            )
        )
    taken: dict[Path, str] = {}
    for config, path in zip(configs, slurm.array, strict=True):
        if (other := taken.setdefault(config.run.path, path)) is not path:
            raise ConfigError(
                f"{other} and {path} have the same run {config.run.path}; give each its run.name"
            )
    return configs


def _checked(slurm: SlurmConfig, file: str | None, overrides: Sequence[tuple[str, str]]) -> Config:
    """One configuration as the ranks are to have it, checked as `counterflow train` does.

    Whether this machine has GPUs says nothing about the nodes: what hangs on that is checked there.

    Raises:
        ValueError: see there.
    """
    from ..check import check, check_sizes, open_data
    from ..config import load
    from ..resume import require_resumable
    from ..tokens import require_ids
    from .resolved import for_launch

    config = load(file, overrides)
    slurm.require_world_size(config.mesh.world_size)
    if config.run.nproc:
        raise ConfigError(
            f"run.nproc={config.run.nproc} is for one machine; leave it out, --gpus-per-node or "
            "--ranks-per-node says it for each node"
        )
    wanted = config.run.device
    if wanted == "cuda" and slurm.ranks_per_node:
        raise ConfigError(
            "run.device=cuda with --ranks-per-node: ranks on GPUs are asked for with "
            "--gpus-per-node"
        )
    if wanted == "auto":
        device = "cuda" if slurm.gpus_per_node else "cpu"
        config = replace(config, run=replace(config.run, device=device))
    config = for_launch(config, max_restarts=slurm.max_restarts)
    _require_folder(config, slurm)
    if config.run.device == "cuda":
        check_sizes(config)
        open_data(config)
        if config.data.kind == "tokens":
            require_ids(config.data.path)
    else:
        check(config)
    require_resumable(config)
    return config


def _require_folder(config: Config, slurm: SlurmConfig) -> None:
    """Raise ConfigError if sbatch or the container could not be told of the run's folder."""
    folder = config.run.path
    if not is_plain(str(folder)) or "\\" in str(folder):
        # sbatch takes no pattern (%j) in a file name that has a backslash.
        raise ConfigError(
            f"{str(folder)!r}: sbatch cannot write to a folder with a backslash or a control "
            "character in its name; choose another run.folder or run.name"
        )
    if slurm.container_image and {":", ","} & set(str(folder)):
        raise ConfigError(
            f"{folder}: a folder with ':' or ',' cannot be mounted into a container; choose "
            "another run.folder or run.name"
        )


def _task(config: Config) -> Task:
    from .resolved import resolved_path

    folder = config.run.path
    path = resolved_path(config, folder / "slurm")
    return Task(config.run.name, PurePosixPath(folder), PurePosixPath(path))


def _submit(script: str, configs: Sequence[Config], tasks: Sequence[Task], *, wait: bool) -> int:
    """Write what the job needs, submit it, and say where to look."""
    from .resolved import write_resolved
    from .submit import submit, wait_for

    for config in configs:
        folder = config.run.path / "slurm"
        try:
            write_resolved(config, folder)
        except OSError as error:
            raise ConfigError(
                f"{error.filename or folder}: cannot be written: {error.strerror}; choose another "
                "run.folder or run.name, or make it writable"
            ) from None
    job = submit(script)
    folder = configs[0].run.path / "slurm"
    output = folder / (f"job-{job}.out" if len(tasks) == 1 else f"job-{job}_*.out")
    shown = str(output) if len(tasks) > 1 else shlex.quote(str(output))
    # At once: a job whose number nobody has is hard to stop.
    print(f"submitted job {job}: run {', '.join(task.name for task in tasks)}")
    print(f"  results  {', '.join(str(task.run) for task in tasks)}")
    print(f"  follow   tail -F {shown}")
    print(f"  state    squeue{job.flag} --jobs={job}")
    print(
        f"  stop     scancel{job.flag} {job}   (a checkpoint first: --signal=USR1 {job})",
        flush=True,
    )
    kept = folder / str(job) / "submit.sh"
    try:
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(script, encoding="utf-8")
        print(f"  script   {kept}", flush=True)
    except OSError as error:
        print(f"  script   not kept: {kept}: {error.strerror}", flush=True)
    return wait_for(job) if wait else 0


def date_of(environ: Mapping[str, str]) -> str:
    """Now, or what SOURCE_DATE_EPOCH says for scripts that are to be the same again."""
    epoch = environ.get("SOURCE_DATE_EPOCH", "")
    moment = datetime.fromtimestamp(int(epoch), UTC) if epoch.isdecimal() else datetime.now(UTC)
    return f"{moment:%Y-%m-%d %H:%M} UTC"


def _help(where: str) -> str:
    if where not in _SWITCHES:
        return "\n".join(
            [
                f"usage: {USAGE}",
                "",
                "local: starts a run on this machine. slurm: submits it as a job, which looks at",
                "its nodes first, starts ranks in the order of the network, saves a checkpoint",
                "when its time is up, queues itself again and goes on. The options: counterflow",
                "launch local --help, counterflow launch slurm --help; a guide: docs/slurm.md.",
            ]
        )
    default = LocalConfig() if where == "local" else SlurmConfig()
    first = f"usage: {USAGE.replace('local|slurm', where)}"
    return "\n".join([first, "", *flags(default, _SWITCHES[where])])
