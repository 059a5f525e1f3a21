"""Runs that are ended at bad moments and started again: what tests and the benchmark share.

A run here is the real command with real processes. What is compared in the end is everything that
training determines: every number of metrics.jsonl but times, and every bit of the last checkpoint.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, Self

import torch

from counterflow.launch.checkpoint.folders import step_of
from counterflow.launch.checkpoint.read import checkpoints_in, open_checkpoint

LIMIT_S = 240.0
# Beginnings of the keys of metrics.jsonl that are measured, not trained.
_MEASURED = ("seconds", "tokens_per_second", "mfu", "memory_", "exposed_comm_", "gpu_")
_OF_STARTS = ("seconds", "resumed")  # of a checkpoint's history
_RESULT = ("train_loss", "validation_loss", "ema_validation_loss", "tokens", "max_vio", "steps")

STEPS = 12
EVERY = 3
# Two ranks that exchange tokens and gradients, with an average and a batch-size ramp to restore.
SMALL = (
    *("--run.device", "cpu", "--run.name", "it", "--run.timeout_s", "60"),
    *("--mesh.pp", "1", "--mesh.dp", "2", "--mesh.ep", "2", "--schedule.name", "1f1b"),
    *("--schedule.microbatches", "4", "--train.sequences", "1", "--train.steps", str(STEPS)),
    *("--train.warmup_steps", "3", "--train.constant_steps", "4", "--train.eval_every", "5"),
    *("--train.eval_batches", "1", "--train.ema_decay", "0.9", "--train.log_every", "1"),
    *("--train.ramp_start", "1", "--train.ramp_steps", "4"),
    *("--model.num_hidden_layers", "2"),
    *("--checkpoint.every", str(EVERY), "--checkpoint.keep", "2"),
)


@dataclass
class Survivor:
    """A run in `folder` that is started as often as it takes.

    As a context manager it leaves no process behind.

    Attributes:
        arguments: of `counterflow train`.
        starts: how often it was started.
        said: stderr of each start that has ended.
    """

    folder: Path
    arguments: tuple[str, ...] = SMALL
    environ: dict[str, str] = field(default_factory=dict[str, str])
    starts: int = 0
    said: list[str] = field(default_factory=list[str])
    process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()

    def kill(self) -> None:
        """End whatever of this run is still there: what was started in its folder."""
        process = self.process
        if process is None:
            return
        process.kill()  # first, or it would start what ends again
        folder = self.folder.resolve()
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdigit() and (entry / "cwd").readlink() == folder:
                    _kill(int(entry.name))
        if process.stderr is not None and not process.stderr.closed:
            process.communicate()

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "it"

    @property
    def checkpoints(self) -> Path:
        return self.run / "checkpoints"

    def start(self) -> None:
        """Start the run, or start it again."""
        self.starts += 1
        unset = ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS")
        environ = {k: v for k, v in os.environ.items() if k not in unset}
        environ |= {"OMP_NUM_THREADS": "1", **self.environ}
        self.folder.mkdir(parents=True, exist_ok=True)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "counterflow", "train", *self.arguments],
            cwd=self.folder,
            env=environ,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self) -> int:
        """Wait for the end of this start; its exit status."""
        assert self.process is not None
        try:
            _, errors = self.process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the run did not end within {LIMIT_S:g} s") from None
        self.said.append(errors)
        return self.process.returncode

    def finish(self) -> None:
        """Start the run until it reaches its last step."""
        self.start()
        status = self.end()
        assert status == 0, self.said[-1]

    def wait(self, done: Callable[[], bool], what: str, pause_s: float = 0.02) -> None:
        """Wait for something to happen while the run goes on."""
        assert self.process is not None
        limit = time.monotonic() + LIMIT_S
        while not done():
            if self.process.poll() is not None:
                self.end()
                raise AssertionError(f"the run ended before {what}: {self.said[-1]}")
            assert time.monotonic() < limit, f"no {what} within {LIMIT_S:g} s"
            time.sleep(pause_s)

    def lines(self) -> list[dict[str, Any]]:
        """What metrics.jsonl has so far; a line that is being written is left out."""
        file = self.run / "metrics.jsonl"
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line[-1:] == "\n"]

    def wait_for_step(self, step: int) -> None:
        """Wait until this start has trained `step`."""
        self.wait(
            lambda: any(x["kind"] == "train" and x["step"] >= step for x in self.lines()),
            f"step {step}",
        )

    def ranks(self) -> dict[int, int]:
        """Process id of every rank of this start."""
        assert self.process is not None
        found: dict[int, int] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                    environment = (entry / "environ").read_bytes().split(b"\0")
                except (OSError, IndexError):
                    continue
                own = [item for item in environment if item.startswith(b"RANK=")]
                if parent == self.process.pid and own:
                    found[int(own[0][5:])] = int(entry.name)
        return found

    def kill_rank(self, rank: int) -> None:
        """SIGKILL of a rank, if it is still there: whoever comes too late has lost nothing."""
        pid = self.ranks().get(rank)
        if pid is not None:
            _kill(pid)
        status = self.end()
        assert pid is None or status != 0

    def kill_all_ranks(self) -> None:
        """The same of all ranks."""
        pids = self.ranks().values()
        for pid in pids:
            _kill(pid)
        status = self.end()
        assert not pids or status != 0

    def kill_launcher(self) -> None:
        """The kernel then ends the ranks."""
        assert self.process is not None
        ranks = self.ranks().values()
        self.process.kill()
        self.end()
        limit = time.monotonic() + 20
        while any(_is_alive(pid) for pid in ranks):
            assert time.monotonic() < limit, "a rank outlived its launcher"
            time.sleep(0.02)

    def steps_saved(self) -> list[int]:
        """Steps of the finished checkpoints, newest first, by their names."""
        return [step_of(path) for path in checkpoints_in(self.checkpoints)]

    def newest(self) -> Path:
        return checkpoints_in(self.checkpoints)[0]


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def damage(file: Path, rng: random.Random) -> str:
    """Cut a file short, or turn one of its bits; what was done."""
    size = file.stat().st_size
    place = rng.randrange(size)
    if rng.random() < 0.5:
        os.truncate(file, place)
        return f"{file.name} cut to {place} of {size} bytes"
    with file.open("r+b") as opened:
        opened.seek(place)
        byte = opened.read(1)[0]
        opened.seek(place)
        opened.write(bytes([byte ^ (1 << rng.randrange(8))]))
    return f"a bit of byte {place} of {size} in {file.name} turned"


@dataclass(frozen=True)
class Outcome:
    """Everything that training determines of a run that has ended.

    Attributes:
        curve: the training and validation lines of metrics.jsonl, without times.
        tensors: of the newest checkpoint: parameters, optimizer states, averages, biases.
        values: of the newest checkpoint: where the data stand, the guard, what the history tells
            but for times and starts.
        random: of the newest checkpoint, by rank: the state of torch's generator. Python's is
            seeded by the system, so no two runs have the same.
        result: numbers of result.json.
    """

    curve: list[dict[str, Any]]
    tensors: dict[str, torch.Tensor]
    values: dict[str, Any]
    random: list[str]
    result: dict[str, Any]

    @classmethod
    def of(cls, run: Survivor) -> Outcome:
        kept = [line for line in run.lines() if line["kind"] in ("train", "validation")]
        manifest = open_checkpoint(run.newest())
        told = json.loads((run.run / "result.json").read_text(encoding="utf-8"))
        return cls(
            [{k: v for k, v in line.items() if not k.startswith(_MEASURED)} for line in kept],
            {name: manifest.read(name) for name in manifest.tensors},
            _determined(manifest.values),
            [of["random"]["torch"] for of in manifest.content.own],
            {name: told[name] for name in _RESULT},
        )

    def difference(self, other: Outcome) -> str:
        """Where `other` differs, in any bit; "" where nowhere."""
        for mine, theirs in zip_longest(self.curve, other.curve):
            if mine != theirs:
                return f"a line of the curve: {mine} and {theirs}"
        if self.tensors.keys() != other.tensors.keys():
            return f"tensors: {sorted(self.tensors.keys() ^ other.tensors.keys())[:3]}"
        for name, tensor in self.tensors.items():
            if not _same_bytes(tensor, other.tensors[name]):
                return f"tensor {name}"
        for name in sorted(self.values.keys() | other.values.keys()):
            if self.values.get(name) != other.values.get(name):
                return f"{name}: {self.values.get(name)} and {other.values.get(name)}"
        if self.random != other.random:
            return "random states"
        return "" if self.result == other.result else f"{self.result} and {other.result}"


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    """0.0 and -0.0 are not, two NaNs may be."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    flat, flat_other = (tensor.reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(flat, flat_other)


def _determined(values: Mapping[str, Any]) -> dict[str, Any]:
    """What training determines of a checkpoint's values: not times, starts, stops, the command."""
    history = {k: v for k, v in values["history"].items() if k not in _OF_STARTS}
    history["recent"] = [
        {k: v for k, v in result.items() if k != "asked"} for result in history["recent"]
    ]
    return {k: v for k, v in values.items() if k != "config"} | {"history": history}


def clear(run: Survivor) -> None:
    """Forget a run."""
    shutil.rmtree(run.folder, ignore_errors=True)
