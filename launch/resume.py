"""Whether a run goes on from what an earlier start of its name has left. No torch."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from .checkpoint.section import Resume
from .config import Config, with_absolute_paths
from .folder import RESULT
from .settings import ConfigError, to_toml

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


def started_again(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun or Slurm has started this run before, and now starts it again."""
    names = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(environ.get(name, "").isdecimal() and int(environ[name]) > 0 for name in names)


def decide(
    resume: Resume, *, saved: Mapping[str, Any] | None, finished: bool, again: bool, config: Config
) -> Decision:
    """What this start of a run does.

    Args:
        resume: checkpoint.resume. A run that is started again by its launcher goes on whatever it
            says: that was for the first start.
        saved: what the newest checkpoint tells of its configuration; None where there is none.
        finished: whether the earlier start left a result.
        again: see `started_again`.
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
    different = list(differences(saved, as_values(config), config.global_batch))
    if different:
        listed = "; ".join(different[:_SHOWN]) + ("; ..." if len(different) > _SHOWN else "")
        raise ConfigError(
            f"{config.run.path}: an unfinished run of this name trains something else: {listed}. "
            "Go on with it all the same by --checkpoint.resume latest, begin anew by "
            "--checkpoint.resume never, or give another run.name"
        )
    return "go on"


def differences(
    saved: Mapping[str, Any], now: Mapping[str, Any], global_batch: int
) -> Iterator[str]:
    """Keys that change what is trained, with both values."""
    before, after = dict(_flat(saved)), dict(_flat(now))
    for key in sorted(before.keys() | after.keys()):
        if _is_free(key) or before.get(key) == after.get(key):
            continue
        yield f"{key} was {_shown(before, key)}, is {_shown(after, key)}"
    parts = ("train.sequences", "schedule.microbatches", "mesh.dp")
    if all(isinstance(before.get(key), int) for key in parts):
        batch = before[parts[0]] * before[parts[1]] * before[parts[2]]
        if batch != global_batch:
            names = " x ".join(parts)
            yield f"the batch of a step ({names}) was {batch} sequences, is {global_batch}"


def set_aside(folder: Path) -> None:
    """Make room for the checkpoints of a new run: the last one's stay in checkpoints.previous."""
    import shutil

    if (folder / CHECKPOINTS).is_dir():
        shutil.rmtree(folder / _PREVIOUS, ignore_errors=True)
        (folder / CHECKPOINTS).rename(folder / _PREVIOUS)


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


def require_resumable(config: Config) -> None:
    """Raise where this start of a run could not go on from what an earlier one has left.

    Looks at the newest checkpoint's own account only; the ranks verify what they read.

    Raises:
        ConfigError: as `decide`.
    """
    from .checkpoint.errors import CheckpointError
    from .checkpoint.read import checkpoints_in, open_checkpoint

    if not config.checkpoint.enabled:
        return
    folder = config.run.path
    for path in checkpoints_in(folder / CHECKPOINTS):
        try:
            saved = open_checkpoint(path).values["config"]
        except CheckpointError:
            continue
        decide(
            config.checkpoint.resume,
            saved=saved,
            finished=(folder / RESULT).exists(),
            again=started_again(),
            config=config,
        )
        return
