"""Small runs measured here beside their predictions: step time and memory.

A group of runs shares its ranks and its network: processes of this machine, one core each where
there are enough, or hosts in network namespaces with a shaped link (bench.hosts). In every round
all ranks time the phases of single layers (`launch.measure`, as `counterflow doctor --measure`
does), and then run one step of each run, in turns; so a prediction and what it is held against are
of the same minutes. The calibration goes through a file and `predict.measured`, has one stage on
each rank and one micro-batch, and is of none of the runs: schedules, numbers of micro-batches,
pipelines, ZeRO and (where said) sizes of micro-batches are predicted.

A step's time is from the first rank's begin to the last one's end, gathered parameters included,
the median over the half of the rounds in which ranks were ready without a core for the least time.
Its memory is the most bytes of live tensors on the fullest rank in a step: storages that Python's
objects hold before it, gradients dropped, and on top of them the highest total of torch's allocator
for the CPU within it, as torch.profiler records it. Predicted are weights, gradients, optimizer
states, activations and what is under way between ranks (`predict.memory`'s EXACT and EXCHANGED);
reported beside it is the prediction with its estimate, from above, of what layers work with for a
moment.

Ranks take a higher priority than other processes where they may: a rank without a core does not
run what is predicted.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from counterflow.launch import fp8
from counterflow.launch.config import Config
from counterflow.launch.engine import Engine
from counterflow.launch.experts import make_experts
from counterflow.launch.measure import Machine, Measuring, measure_machine
from counterflow.launch.plan_layout import config_of
from counterflow.parallel import Mesh, MeshShape
from counterflow.predict.measured import as_json, read_measured
from counterflow.predict.memory import ALLOWANCE, EXACT, EXCHANGED, rank_memory
from counterflow.predict.step import predict
from tests.cases_overlap_hosts import one_core
from tests.ranks import RankPool

from .hosts import network, why_not
from .predict_layouts import Group, Run, groups

MOST_TIME_ERROR, MOST_MEMORY_ERROR = 0.10, 0.05
_NICE = -15
_LIMIT_S = 300.0


def _prefer() -> None:
    """Have this rank's threads run before other processes', where that is allowed."""
    try:
        for thread in os.listdir("/proc/self/task"):
            os.setpriority(os.PRIO_PROCESS, int(thread), _NICE)
        # Linux may weigh sessions against each other first, and threads only within one.
        group = Path("/proc/self/autogroup")
        if group.exists():
            group.write_text(str(_NICE))
    except OSError:  # not root, or no Linux
        pass


class StepTime(NamedTuple):
    """A step on one rank, in seconds.

    Attributes:
        began, ended: on a clock that all ranks share.
        delayed: time that its threads were ready and had no core.
    """

    began: float
    ended: float
    delayed: float


def waited_for_core() -> float:
    """Seconds that this process's threads were ready to run and had no core; 0 if not told."""
    try:
        tasks = list(Path("/proc/self/task").iterdir())
        return sum(int((task / "schedstat").read_text().split()[1]) for task in tasks) * 1e-9
    except (OSError, IndexError):
        return 0.0


def step_ms(steps: Sequence[Sequence[StepTime]]) -> list[float]:
    """What steps took, of the half of them in which ranks were kept from their cores least.

    Args:
        steps: of each rank.
    """
    together = sorted(zip(*steps, strict=True), key=lambda step: max(of.delayed for of in step))
    kept = together[: max(1, (len(together) + 1) // 2)]
    return [(max(s.ended for s in step) - min(s.began for s in step)) * 1e3 for step in kept]


class _Trained:
    """One run on this rank."""

    def __init__(self, run: Run, meshes: dict[MeshShape, Mesh]) -> None:
        config = config_of(run.layout, run.model, _base())
        shape = config.mesh
        if shape not in meshes:
            meshes[shape] = Mesh.create(shape, timeout_s=_LIMIT_S)
        mesh = meshes[shape]
        self.engine = Engine(
            run.model,
            mesh,
            run.layout.make_schedule(),
            experts=make_experts(config, mesh),
            recipe=fp8.make_recipe(config),
            recompute=fp8.make_recompute(config),
            overlap=config.overlap.interleaving,
            zero=run.layout.zero,
            timeout_s=_LIMIT_S,
        )
        generator = torch.Generator().manual_seed(mesh.dp_rank)
        shape_NL = run.layout.microbatches * run.layout.sequences, run.layout.length + 1
        tokens = torch.randint(0, run.model.vocab_size, shape_NL, generator=generator)
        self._inputs, self._targets = tokens[:, :-1].clone(), tokens[:, 1:].clone()

    def step(self) -> StepTime:
        """Run one."""
        dist.barrier()
        delayed, began = waited_for_core(), time.perf_counter()
        self.engine.step(self._inputs, self._targets, lr=1e-4)
        self.engine.settle()
        return StepTime(began, time.perf_counter(), waited_for_core() - delayed)

    def peak_bytes(self, beside: int) -> int:
        """Most bytes of live tensors in a step, without those of others."""
        self.engine.means.drop_gradients()
        before = live_bytes() - beside
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            first = torch.empty(1 << 12, dtype=torch.uint8)  # totals are since the process began
            self.step()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        seen = [e["args"] for e in events if e.get("name") == "[memory]"]
        start = next(e["Total Allocated"] for e in seen if e["Bytes"] == first.nbytes)
        return before + max(e["Total Allocated"] for e in seen) - start


def live_bytes() -> int:
    """Bytes of the storages of all tensors that Python's objects hold."""
    gc.collect()
    found: dict[int, int] = {}
    for one in gc.get_objects():
        if issubclass(type(one), Tensor) and one.device.type == "cpu":
            storage = one.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def _base() -> Config:
    config = Config()
    return replace(config, run=replace(config.run, timeout_s=_LIMIT_S, device="cpu"))


def memory_case(rank: int, world: int, run: Run) -> int:
    """The peak of one run, alone in its processes."""
    del rank, world
    beside = live_bytes()
    trained = _Trained(run, {})
    trained.step()
    return trained.peak_bytes(beside)


def time_case(rank: int, world: int, group: Group, rounds: int) -> dict[str, Any]:
    """Rounds of measuring and of steps: what was measured, and each step's begin and end."""
    one_core(rank)
    _prefer()
    meshes: dict[MeshShape, Mesh] = {}
    machines: list[Machine] = []
    measuring: dict[str, Measuring] = {}
    device = torch.device("cpu")

    def measured_machine() -> Machine:
        mesh = next(iter(meshes.values()))
        return measure_machine(_base(), mesh, device, timeout_s=_LIMIT_S)

    for name, (given, model) in group.calibrations.items():
        config = config_of(replace(given, pp=1, dp=world), model, _base())
        if config.mesh not in meshes:
            meshes[config.mesh] = Mesh.create(config.mesh, timeout_s=_LIMIT_S)
        measuring[name] = Measuring(config, meshes[config.mesh], device)
    trained = {run.name: _Trained(run, meshes) for run in group.runs}
    for one in trained.values():
        one.step()  # buffers, connections
    _prefer()  # threads that were made meanwhile
    names, steps = list(trained), {name: list[StepTime]() for name in trained}
    for turn in range(rounds):
        machines.append(measured_machine())
        for one in measuring.values():
            one.round()
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            steps[name].append(trained[name].step())
    # Links are those of the least disturbed half, too: the median of it.
    machines.sort(key=lambda machine: machine.cluster.links.across_gbps, reverse=True)
    machine = machines[len(machines) // 4]
    found = {name: one.results(name, machine) for name, one in measuring.items()}
    return {
        "steps": steps,
        "measured": {
            name: as_json(one.calibration, one.cluster, one.about) for name, one in found.items()
        },
    }


def measure_group(group: Group, rounds: int) -> list[dict[str, Any]]:
    """Run a group: a record of each of its runs, predicted and measured."""
    with ExitStack() as held:
        hosts = None
        if group.link_mbit is not None:
            both = held.enter_context(network(2, link_mbit=group.link_mbit))
            hosts = [both[rank % 2] for rank in range(group.world)]
        pool = held.enter_context(RankPool(hosts=hosts))
        told = pool.run(time_case, world=group.world, timeout_s=1200.0, group=group, rounds=rounds)
        memory = {
            run.name: pool.run(memory_case, world=group.world, timeout_s=300.0, run=run)
            for run in group.runs
        }
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{name}.json" for name in group.calibrations}
        for name, path in paths.items():
            path.write_text(json.dumps(told[0]["measured"][name]), encoding="utf-8")
        for run in group.runs:
            steps = [rank["steps"][run.name] for rank in told]
            path, times = paths[run.calibration], step_ms(steps)
            records.append(record(group, run, path, times, memory[run.name]))
    return records


def record(
    group: Group, run: Run, path: Path, times: Sequence[float], peaks: Sequence[int]
) -> dict[str, Any]:
    """One run, predicted from a measurement and as it was."""
    calibration, cluster = read_measured(path)
    found = predict(run.model, cluster, run.layout, calibration)
    measured = statistics.median(times)
    ranks = rank_memory(run.model, run.layout, run.layout.make_schedule(), device="cpu")
    # Of each pipeline rank the fullest of its data-parallel ranks; the fullest of all is judged.
    dp = run.layout.dp
    seen = [max(peaks[rank * dp : (rank + 1) * dp]) for rank in range(run.layout.pp)]
    fullest = seen.index(max(seen))
    parts = {name: size for name, size in ranks[fullest].parts.items() if name not in ALLOWANCE}
    told = sum(size for name, size in parts.items() if name in (*EXACT, *EXCHANGED))
    return {
        "group": group.name,
        "run": run.name,
        "predicted_ms": found.step_ms,
        "measured_ms": measured,
        "all_ms": list(times),
        "time_error": found.step_ms / measured - 1,
        "predicted_bytes": told,
        "with_estimates_bytes": sum(parts.values()),
        "measured_bytes": seen[fullest],
        "memory_error": told / seen[fullest] - 1,
        "memory_error_with_estimates": sum(parts.values()) / seen[fullest] - 1,
        "links_gbps": [cluster.links.inside_gbps, cluster.links.across_gbps],
        "rank_ms": [rank._asdict() for rank in found.ranks],
    }


def told_run(of: Mapping[str, Any]) -> str:
    """A line of the table."""
    more = of["memory_error_with_estimates"]
    return (
        f"  {of['run']:36}{of['predicted_ms']:9.1f}{of['measured_ms']:9.1f}"
        f"{of['time_error']:+8.1%}{of['predicted_bytes'] / 2**20:10.1f}"
        f"{of['measured_bytes'] / 2**20:9.1f}{of['memory_error']:+8.1%}{more:+10.1%}"
    )


def small_runs(rounds: int) -> dict[str, Any]:
    """Measure and predict all groups; prints and returns what was found."""
    reason = why_not()
    records: list[dict[str, Any]] = []
    print(f"{'small runs':38}{'step, ms':>9}{'':9}{'':8}{'memory, MiB':>10}")
    titles = (
        f"{'predicted':>9}{'measured':>9}{'error':>8}{'predicted':>10}{'measured':>9}{'error':>8}"
    )
    print(f"{'':38}{titles}{'estimates':>10}")
    for group in groups():
        if group.link_mbit is not None and reason is not None:
            print(f" {group.name}: not run, {reason}")
            continue
        print(f" {group.name}", flush=True)
        for one in measure_group(group, rounds):
            records.append(one)
            print(told_run(one), flush=True)
    time_error = statistics.median(abs(one["time_error"]) for one in records)
    memory_error = statistics.median(abs(one["memory_error"]) for one in records)
    print(f"  median error: {time_error:.1%} in step time, {memory_error:.1%} in memory")
    return {
        "rounds": rounds,
        "runs": records,
        "targets": {
            "small runs: median error in step time": _target(time_error, MOST_TIME_ERROR),
            "small runs: median error in memory": _target(memory_error, MOST_MEMORY_ERROR),
        },
    }


def _target(value: float, most: float) -> dict[str, Any]:
    return {"measured": value, "relation": "<=", "target": most, "met": value <= most}
