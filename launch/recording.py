"""Traces of some training steps, by torch's profiler: a file for each rank and stretch of steps.

    runs/NAME/traces/step5/rank0.json.gz         of step 5
    runs/NAME/traces/steps8-9/rank0.json.gz      of steps 8 and 9

The profiler starts before a stretch and writes after it, between steps; all ranks wait for each
other there, so that no step's time has a share in it.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile

from ..comm.marks import mark
from ..parallel.mesh import Mesh
from .outputs import write_whole
from .profile_folders import FOLDER as FOLDER
from .ranges import Range
from .recording_config import ProfileConfig

_log = logging.getLogger(__name__)


class Recorder:
    """Records this rank's traces.

    Args:
        config: which steps of which ranks.
        mesh: this rank's place among all.
        device: where it computes.
        folder: of the run's traces; made when a trace is written.
        wait_for_all: returns when all ranks of the run have called it; told what is waited for.

    Attributes:
        folders: those of the traces recorded so far, a stretch of steps each.
    """

    def __init__(
        self,
        config: ProfileConfig,
        mesh: Mesh,
        device: torch.device,
        folder: Path,
        wait_for_all: Callable[[str], None],
    ) -> None:
        self.folders: list[Path] = []
        self._stretches = config.stretches
        self._records = config.records(mesh.rank)
        self._rank, self._device, self._folder = mesh.rank, device, folder
        self._place = _place(mesh)
        self._wait_for_all = wait_for_all
        self._profiler: Any = None

    def before(self, step: int) -> None:
        """Start the profiler where this step, counted from 1, is the first of some to record.

        Its first start in a process loads and allocates things, on a GPU for seconds. A recording
        that is thrown away pays for that.
        """
        if all(stretch.first != step for stretch in self._stretches):
            return
        if self._records:
            with _profiler(self._device), mark("warm-up"):
                torch.ones(1, device=self._device).sum().item()
            self._profiler = _profiler(self._device)
            self._profiler.start()
            self._profiler.add_metadata_json("counterflow", self._place)
        self._wait_for_all("the ranks' profilers")

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Within this context the step runs; it is marked as torch's own profiler marks steps."""
        with mark(f"ProfilerStep#{step}"):
            yield
            if self._profiler is not None and self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # or its last kernels were the next step's

    def after(self, step: int) -> Path | None:
        """Write what was recorded up to this step, where it is the last of some to record.

        A trace appears whole or not at all. One that cannot be written is told in the log, and is
        no reason to end a training.

        Returns:
            The folder of the traces of all ranks; None where none ends with this step.
        """
        stretch = next((each for each in self._stretches if each.last == step), None)
        if stretch is None:
            return None
        folder = self._folder / folder_name(stretch)
        if self._profiler is not None:
            profiler, self._profiler = self._profiler, None
            profiler.stop()
            try:
                folder.mkdir(parents=True, exist_ok=True)
                path = folder / f"rank{self._rank}.json.gz"
                write_whole(path, lambda part: _export(profiler, part))
            except OSError as error:
                reason = error.strerror or error
                _log.warning("rank %d: no trace in %s: %s", self._rank, folder, reason)
        self._wait_for_all("the ranks' traces")
        self.folders.append(folder)
        return folder

    def close(self) -> None:
        """End a recording that an error cut short; it is not written."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None


def folder_name(stretch: Range) -> str:
    """Of the traces of some steps, within the folder of traces."""
    return f"step{stretch}" if stretch.first == stretch.last else f"steps{stretch}"


def profile_command(folder: Path) -> str:
    """What a person types to read the traces in a folder."""
    return f"counterflow profile {shlex.quote(str(folder))}"


def remove_traces(folder: Path) -> None:
    """Remove the traces that an earlier run left, with what it was about to write."""
    for pattern in ("step*/rank*.json.gz", "step*/.rank*.part*"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
    for each in (*folder.glob("step*"), folder):
        if each.is_dir() and not any(each.iterdir()):
            each.rmdir()


def _place(mesh: Mesh) -> str:
    """Where a rank stands, as JSON, so that a reader knows which ranks it moves tokens among."""
    shape, rank = mesh.shape, mesh.rank
    place = {
        "pp_rank": mesh.pp_rank,
        "dp_rank": mesh.dp_rank,
        "ep_rank": mesh.ep_rank,
        "expert_ranks": shape.ep_peers(rank),
        "pipeline_ranks": shape.pp_peers(rank),
    }
    return json.dumps(place)


def _profiler(device: torch.device) -> profile:
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    else:  # without a GPU it has nothing to tell, and tells it at every start
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    # Dispatch and gloo have threads of their own, which the profiler otherwise leaves out.
    everyone = _ExperimentalConfig(profile_all_threads=True)
    return profile(activities=activities, experimental_config=everyone)


def _export(profiler: Any, path: Path) -> None:
    text = path.with_name(f"{path.name}.text")
    try:
        profiler.export_chrome_trace(str(text))
        # Compressed lightly: a trace of a step may have hundreds of megabytes.
        with text.open("rb") as plain, gzip.open(path, "wb", compresslevel=3) as packed:
            shutil.copyfileobj(plain, packed, 1 << 20)
    finally:
        text.unlink(missing_ok=True)
