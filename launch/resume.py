"""Whether a run goes on from what an earlier start of its name has left. No torch."""

from __future__ import annotations

import json
import os
import shutil
import socket
import tomllib
from collections.abc import Iterator, Mapping
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

from .check import step_schedules
from .checkpoint.folders import checkpoints_in, step_of
from .checkpoint.section import Resume
from .config import Config, with_absolute_paths
from .folder import BEGUN_FILE, RESULT
from .outputs import write_whole
from .ramps import microbatches
from .settings import ConfigError, Given, apply, to_toml

CHECKPOINTS = "checkpoints"
_PREVIOUS = "checkpoints.previous"
_SHOWN = 5

# Keys that may change from start to start without changing what is trained.
_FREE = (
    *("run.name", "run.folder", "run.nproc", "run.port", "run.device", "run.timeout_s"),
    *("run.max_restarts", "run.logs", "mesh", "schedule", "dispatch", "overlap", "recompute"),
    *("profile", "zero", "checkpoint", "guard", "metrics", "preflight"),
    *("train.sequences", "train.log_every", "train.eval_every", "train.eval_batches"),
)


Decision = Literal["begin", "go on", "done"]


def as_values(config: Config) -> dict[str, Any]:
    """A configuration as a checkpoint keeps it: plain JSON, paths absolute."""
    return tomllib.loads(to_toml(with_absolute_paths(config)))


def config_of(saved: Mapping[str, Any], where: str) -> Config:
    """The configuration that `as_values` told.

    Raises:
        ConfigError: there is no such configuration; names the key.
    """
    return apply(Config(), {key: Given(value, where) for key, value in _flat(saved)})


def started_again(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun or Slurm has started this launch before, and now starts it again."""
    names = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(environ.get(name, "").isdecimal() and int(environ[name]) > 0 for name in names)


def launch_name(environ: Mapping[str, str] = os.environ) -> str:
    """Names this launch, the same for all its starts: the job, or torchrun's process here."""
    job = environ.get("SLURM_JOB_ID", "")
    return f"Slurm job {job}" if job else f"process {os.getppid()} on {socket.gethostname()}"


def has_begun(folder: Path, launch: str) -> bool:
    """Whether what lies in a run's folder is of this launch: an earlier start of it left it.

    Without that a start which was lost before it had begun would be followed by one that takes the
    run before for its own.
    """
    try:
        told = json.loads((folder / BEGUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(told, dict) and told.get("launch") == launch


def leave_begun(folder: Path, launch: str) -> None:
    """Leave word that the run in `folder` is this launch's; the one before is out of its way."""
    text = json.dumps({"launch": launch}) + "\n"
    write_whole(folder / BEGUN_FILE, lambda part: part.write_text(text, encoding="utf-8"))


def decide(
    resume: Resume,
    *,
    saved: Mapping[str, Any] | None,
    step: int = 0,
    finished: bool,
    again: bool,
    config: Config,
) -> Decision:
    """What this start of a run does.

    Args:
        resume: checkpoint.resume. A run that is started again by its launcher goes on whatever it
            says: that was for the first start.
        saved: what the newest checkpoint tells of its configuration; None where there is none.
        step: of that checkpoint.
        finished: whether the earlier start left a result.
        again: whether this launch has begun the run before, see `started_again` and `has_begun`.
        config: of this start.

    Raises:
        ConfigError: an unfinished run of this name trains something else; names what differs.
    """
    if again:
        return "done" if finished else "go on" if saved is not None else "begin"
    if saved is None or resume == "never":
        return "begin"
    if resume == "latest":
        return "go on"
    if finished:
        return "begin"
    different = list(differences(saved, config, step))
    if different:
        listed = "; ".join(different[:_SHOWN]) + ("; ..." if len(different) > _SHOWN else "")
        raise ConfigError(
            f"{config.run.path}: an unfinished run of this name trains something else: {listed}. "
            "Go on with it all the same by --checkpoint.resume latest, begin anew by "
            "--checkpoint.resume never, or give another run.name"
        )
    return "go on"


def differences(saved: Mapping[str, Any], config: Config, step: int = 0) -> Iterator[str]:
    """Keys that change what is trained after `step`, with both values."""
    before, after = dict(_flat(saved)), dict(_flat(as_values(config)))
    for key in sorted(before.keys() | after.keys()):
        if _is_free(key) or before.get(key) == after.get(key):
            continue
        yield f"{key} was {_shown(before, key)}, is {_shown(after, key)}"
    batches = zip(_batches(config_of(saved, "the checkpoint")), _batches(config), strict=False)
    for index, (was, now) in enumerate(batches):
        if index >= step and was != now:
            names = "train.sequences x schedule.microbatches x mesh.dp, and train.ramp_start"
            yield f"the batch of step {index + 1} ({names}) was {was} sequences, is {now}"
            break


def _batches(config: Config) -> Iterator[int]:
    """Sequences of each step's batch."""
    train = config.train
    if not train.ramp_steps:
        yield from repeat(config.global_batch, train.steps)
        return
    full = step_schedules(config)[config.schedule.microbatches]
    for index in range(train.steps):
        count = microbatches(index, train, config.schedule, len(full.placement.routes))
        yield count * train.sequences * config.mesh.dp


def set_aside(folder: Path) -> str:
    """Make room for the checkpoints of a new run: the last one's stay in checkpoints.previous.

    Returns:
        What went wrong, "" if nothing did.
    """
    old, kept = folder / CHECKPOINTS, folder / _PREVIOUS
    try:
        if old.is_dir() and checkpoints_in(old):
            if kept.exists():
                shutil.rmtree(kept)
            old.rename(kept)
    except OSError as error:
        reason = f"{error.filename or old}: {error.strerror}"
        return f"the checkpoints of the run before cannot be moved to {kept}: {reason}"
    return ""


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in _FREE)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _shown(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "not set"


def saved_config(values: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """The configuration among a checkpoint's values.

    Raises:
        CheckpointError: it has none: weights alone, say.
    """
    from .checkpoint.errors import CheckpointError

    config = values.get("config")
    if not isinstance(config, Mapping) or "history" not in values:
        raise CheckpointError(
            f"{path}: is no checkpoint of a run, which could go on from it; to begin with its "
            "weights, name it by checkpoint.weights"
        )
    return config


def require_resumable(config: Config) -> None:
    """Raise where this start of a run could not go on from what an earlier one has left.

    Looks at the newest checkpoint's own account only; the ranks verify what they read.

    Raises:
        ConfigError: as `decide`.
    """
    from .checkpoint.errors import CheckpointError
    from .checkpoint.read import open_checkpoint

    if not config.checkpoint.enabled:
        return
    folder = config.run.path
    try:
        paths = checkpoints_in(folder / CHECKPOINTS)
    except OSError:
        return  # what is wrong with the folder is told by whoever makes it
    for path in paths:
        try:
            saved = saved_config(open_checkpoint(path).values, path)
        except CheckpointError:
            continue
        decide(
            config.checkpoint.resume,
            saved=saved,
            step=step_of(path),
            finished=(folder / RESULT).exists(),
            again=started_again() and has_begun(folder, launch_name()),
            config=config,
        )
        return
