"""Starts the ranks of a run on this machine, its folder kept from other runs meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

from .config import Config, with_absolute_paths
from .folder import claim
from .life.status import DONE
from .settings import ConfigError, to_toml
from .torchrun import choose_device, free_port, num_gpus, set_threads, start


def start_here(config: Config, *, preflight: bool = False) -> int:
    """Start the ranks and wait for their end; the exit status.

    Args:
        config: of the run, checked.
        preflight: first look whether this machine can run it, by the section [preflight].

    Raises:
        ConfigError: the folder or the port cannot be used; nothing was started.
    """
    nproc = config.run.nproc or config.mesh.world_size
    free_port(config.run.port)
    device = choose_device(config.run.device, nproc)
    if device == "cpu" and config.run.device == "auto" and (gpus := num_gpus()):
        print(
            f"this machine has {gpus} GPU{'s' if gpus > 1 else ''} for {nproc} processes: training "
            "on the CPU; a mesh of as many processes as GPUs trains on them"
        )
    set_threads(device, nproc)
    with claim(config.run.path):
        try:
            path = write_config(config)
        except OSError as error:
            raise ConfigError(
                f"{config.run.path}: cannot be written: {error.strerror}; make room, or choose "
                "another run.folder"
            ) from None
        if preflight:
            from .preflight.run import before_training

            status = before_training(
                config,
                path,
                nproc=nproc,
                gpus_wanted=nproc if device == "cuda" else 0,
                environ=os.environ,
                start=lambda arguments, *, nproc: start(
                    arguments, nproc=nproc, port=0, nothing_to_lose=True
                ),
            )
            if status != DONE:
                return status
        return start(
            ["train", str(path)],
            nproc=nproc,
            port=config.run.port,
            max_restarts=config.run.max_restarts,
            folder=config.run.path,
            # Without checkpoints there is nothing to wait for.
            grace_s=config.checkpoint.grace_s if config.checkpoint.enabled else 0.0,
            timeout_s=config.run.timeout_s,
        )


def write_config(config: Config) -> Path:
    """Write the whole configuration into the run's folder, unless it is there already."""
    path = config.run.path / "config.toml"
    text = to_toml(with_absolute_paths(config))
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        part = path.with_name("config.toml.part")
        part.write_text(text, encoding="utf-8")
        part.replace(path)  # at once: another rank may be reading it
    return path
