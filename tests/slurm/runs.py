"""A tiny training as a job of the cluster: what is submitted, what its folder and processes tell.

A job's ranks can be held where they are (SIGSTOP) while something is done to the job, so that no
test depends on how fast they are.
"""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .cluster import Cluster

COUNTERFLOW = (sys.executable, "-m", "counterflow")
STEPS, EVERY = 120, 10  # of a run, and between its checkpoints

# Two ranks of one expert group. A dispatcher by name: "auto" would choose by the number of nodes.
_CONFIG = f"""\
[run]
name = "tiny"
device = "cpu"
timeout_s = 120.0
[mesh]
pp = 1
dp = 2
ep = 2
[schedule]
name = "1f1b"
microbatches = 1
[model]
vocab_size = 256
hidden_size = 32
intermediate_size = 64
moe_intermediate_size = 16
num_hidden_layers = 2
num_attention_heads = 2
q_lora_rank = 16
kv_lora_rank = 16
qk_nope_head_dim = 8
qk_rope_head_dim = 8
v_head_dim = 8
n_routed_experts = 4
num_experts_per_tok = 2
n_group = 2
topk_group = 1
max_position_embeddings = 32
num_nextn_predict_layers = 0
[dispatch]
backend = "flat"
[data]
kind = "text"
path = "corpus.txt"
sequence_length = 32
[train]
steps = {STEPS}
sequences = 1
warmup_steps = 5
constant_steps = 10
eval_every = 0
eval_batches = 1
[checkpoint]
every = {EVERY}
[metrics]
tensorboard = false
[preflight]
together = false
"""

# Values of metrics.jsonl and result.json that no two runs share.
_MEASURED = re.compile(r"second|_ms|_s$|mfu|bytes|memory|power|utili[sz]ation|time|exposed")


class Process(NamedTuple):
    """A process of a job: its id, its parent's, its command, its first environment."""

    pid: int
    parent: int
    arguments: tuple[str, ...]
    environ: Mapping[str, str]

    @property
    def node(self) -> str:
        """The node that Slurm started it on."""
        return self.environ["SLURMD_NODENAME"]

    @property
    def is_launcher(self) -> bool:
        """Whether it is `counterflow node`."""
        return "node" in self.arguments[1:4] and not self.environ.get("RANK")


@dataclass(frozen=True)
class Job:
    """A training that was submitted.

    Attributes:
        slurm: where.
        id: its number.
        folder: of the run, FOLDER/NAME.
        file: where the job's output goes.
        task: "ARRAY_INDEX" of a task of an array.
    """

    slurm: Cluster
    id: int
    folder: Path
    file: Path
    task: str = ""

    @property
    def slurm_id(self) -> str:
        """What Slurm's commands know it by."""
        return self.task or str(self.id)

    def output(self) -> str:
        """What the job has written so far."""
        return self.file.read_text(errors="replace") if self.file.exists() else ""

    def ranks(self) -> dict[int, Process]:
        """The training's processes by rank."""
        found = list(processes(self.id))
        launchers = {process.pid for process in found if process.is_launcher}
        # What comes of a rank has its environment too: compilers, and the keeper of its log, which
        # is nobody's child.
        own = [p for p in found if p.environ.get("RANK") and p.parent in launchers]
        return {int(process.environ["RANK"]): process for process in own}

    def launchers(self) -> dict[str, Process]:
        """`counterflow node` by node."""
        return {process.node: process for process in processes(self.id) if process.is_launcher}

    def wait(self, *states: str) -> dict[str, str]:
        """Wait until the job is in one of these states."""
        return self.slurm.wait(self.slurm_id, *states, output=self.file)

    def until(self, holds: Callable[[], bool], what: str) -> None:
        """Wait until `holds()`; the job has to bring it about."""
        self.slurm.until(holds, what, self.slurm_id, output=self.file)

    def wait_for_checkpoint(self, after: int = 0) -> None:
        """Wait until a checkpoint of a step above `after` is finished."""

        def there() -> bool:
            end = time.monotonic() + 2.0  # the run goes on: seen soon, Slurm asked seldom
            while not (found := any(step > after for step in checkpoints(self.folder))):
                if time.monotonic() > end:
                    break
                time.sleep(0.01)
            return found

        self.until(there, f"a checkpoint after step {after}")

    def wait_for_requeue(self, restarts: int) -> None:
        """Wait until the job has been queued again so many times, and waits."""

        def there() -> bool:
            known = self.slurm.job(self.slurm_id)
            return known["Restarts"] == str(restarts) and known["JobState"] == "PENDING"

        self.until(there, f"requeue {restarts}")

    @contextmanager
    def training(self, world_size: int = 2, *, after: int = 0) -> Iterator[dict[int, Process]]:
        """Ranks that stand still in the midst of training; what is sent to them waits.

        Args:
            world_size: ranks there have to be.
            after: step above which there is a checkpoint.
        """
        self.wait_for_checkpoint(after)
        ranks = self.ranks()
        for process in ranks.values():
            os.kill(process.pid, signal.SIGSTOP)
        try:
            if sorted(ranks) != list(range(world_size)):
                raise self.slurm.failure(
                    f"ranks {sorted(ranks)} train, not {world_size}", self.slurm_id, self.file
                )
            self.until(lambda: all(stands_still(p.pid) for p in ranks.values()), "ranks to stand")
            yield ranks
        finally:
            for process in ranks.values():
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGCONT)

    def wait_for_signal(self, ranks: Mapping[int, Process]) -> None:
        """Wait until a signal waits for one of these ranks, which stand still.

        Before it preempts a job Slurm lets all processes go on: then it has come already.
        """

        def there() -> bool:
            pids = [process.pid for process in ranks.values()]
            return any(pending(pid) or not stands_still(pid) for pid in pids)

        self.until(there, "a signal to the ranks")


def write_tiny(folder: Path) -> Path:
    """Write a configuration and the text that it trains on; the configuration's path."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["flow", "counter", "expert", "token", "rank", "stage", "node", "the", "of"]
    chosen = random.Random(0)
    documents = (" ".join(chosen.choices(words, k=60)) for _ in range(100))
    (folder / "corpus.txt").write_text("\n\n".join(documents))
    (folder / "tiny.toml").write_text(_CONFIG)
    return folder / "tiny.toml"


def launch(
    slurm: Cluster,
    cwd: Path,
    options: Sequence[str],
    train: Sequence[str],
    environ: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """`counterflow launch slurm OPTIONS -- train TRAIN` in a folder, as a user would."""
    command = [*COUNTERFLOW, "launch", "slurm", *options, "--", "train", *train]
    return slurm.run(*command, cwd=cwd, environ={"OMP_NUM_THREADS": "1", **(environ or {})})


def submit(slurm: Cluster, cwd: Path, options: Sequence[str], train: Sequence[str] = ()) -> Job:
    """Launch the tiny configuration on two nodes with a rank each; `train` adds to it."""
    config = write_tiny(cwd)
    options = ["--nodes", "2", "--ranks-per-node", "1", *options]
    done = launch(slurm, cwd, options, [config.name, *train])
    assert done.returncode == 0, done.stderr
    return of_run(slurm, job_id(done.stdout), cwd / "runs" / "tiny")


def of_run(slurm: Cluster, number: int, folder: Path) -> Job:
    """The job `number`, which is of one run alone."""
    return Job(slurm, number, folder, folder / "slurm" / f"job-{number}.out")


def submit_array(slurm: Cluster, cwd: Path, names: Sequence[str]) -> list[Job]:
    """Launch the tiny configuration under several names as one job array; wait until all run."""
    text = write_tiny(cwd).read_text()
    for name in names:
        (cwd / f"{name}.toml").write_text(text.replace('name = "tiny"', f'name = "{name}"'))
    options = ["--nodes", "2", "--ranks-per-node", "1", *(f"--array={name}.toml" for name in names)]
    done = launch(slurm, cwd, options, [])
    assert done.returncode == 0, done.stderr
    array = job_id(done.stdout)
    ids: dict[int, int] = {}

    def all_run() -> bool:
        query = ("--noheader", f"--jobs={array}", "--states=running", "--format=%K %A")
        rows = (line.split() for line in slurm.ask("squeue", *query).splitlines())
        ids.update({int(index): int(number) for index, number in rows})
        return len(ids) == len(names)

    slurm.until(all_run, f"the tasks of {array} to run", array)
    output = cwd / "runs" / names[0] / "slurm"
    return [
        Job(slurm, ids[i], cwd / "runs" / name, output / f"job-{array}_{i}.out", f"{array}_{i}")
        for i, name in enumerate(names)
    ]


def job_id(output: str) -> int:
    """The job that `counterflow launch slurm` says it has submitted."""
    found = re.search(r"\bjob (\d+)\b", output)
    assert found, f"no job in {output!r}"
    return int(found[1])


def processes(job: int) -> Iterator[Process]:
    """Every process that Slurm started for a job, and their children."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = os.fsdecode((entry / "cmdline").read_bytes()).split("\0")[:-1]
            pairs = os.fsdecode((entry / "environ").read_bytes()).split("\0")
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
        environ = {name: value for name, _, value in (pair.partition("=") for pair in pairs)}
        if environ.get("SLURM_JOB_ID") == str(job) and "SLURMD_NODENAME" in environ:
            yield Process(int(entry.name), parent, tuple(words), environ)


def pending(pid: int) -> bool:
    """Whether a signal waits for a process that stands still."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    return any(
        int(mask, 16) for mask in re.findall(r"^(?:Shd|Sig)Pnd:\s*(\w+)", text, re.MULTILINE)
    )


def stands_still(pid: int) -> bool:
    """Whether a process has been stopped (SIGSTOP)."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    return "\nState:\tT" in text


def checkpoints(folder: Path) -> list[int]:
    """Steps of a run's finished checkpoints."""
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))


def curve(folder: Path) -> list[dict[str, Any]]:
    """What a run's metrics.jsonl says of its steps and evaluations, without what was measured."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    told = [row for row in rows if row["kind"] in ("train", "validation")]
    return [{k: v for k, v in row.items() if not _MEASURED.search(k)} for row in told]


def result(folder: Path) -> dict[str, Any]:
    """What a run's result.json says."""
    return json.loads((folder / "result.json").read_text())


def batch(*commands: Sequence[str | Path]) -> str:
    """A batch script of these commands, the last one's exit status its own."""
    lines = [shlex.join(str(word) for word in command) for command in commands]
    return "\n".join(["#!/bin/sh", *lines, ""])
