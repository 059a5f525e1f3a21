"""The whole configuration of a launched run on file: what was checked is what runs."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from ..config import Config, with_absolute_paths
from ..settings import to_toml


def for_launch(config: Config, *, max_restarts: int) -> Config:
    """The configuration that a launched run has: paths absolute, logs of each rank."""
    config = with_absolute_paths(config)
    folder = str(Path(config.run.folder).absolute())
    run = replace(config.run, folder=folder, logs=True, max_restarts=max_restarts)
    return replace(config, run=run)


def gpus_wanted(config: Config, per_node: int) -> int:
    """GPUs that a node with so many ranks needs, 0 for a run on the CPU."""
    from ..torchrun import choose_device

    # Of a run that asks for GPUs by name a missing one is for preflight to find, not a mistake.
    wanted = config.run.device
    device = choose_device("auto", per_node) if wanted == "auto" else wanted
    return per_node if device == "cuda" else 0


def resolved_path(config: Config, folder: Path) -> Path:
    """Where `write_resolved` writes: the name follows from the content.

    So a job that waits in the queue keeps its configuration, whatever is submitted after it.
    """
    short = hashlib.sha256(to_toml(config).encode()).hexdigest()[:12]
    return folder / f"train-{short}.toml"


def write_resolved(config: Config, folder: Path) -> Path:
    """Write `config` to `folder`, unless it is there."""
    path = resolved_path(config, folder)
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(to_toml(config), encoding="utf-8")
        part.replace(path)  # at once: another node may be reading it
    return path
