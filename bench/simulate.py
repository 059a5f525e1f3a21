"""What the simulation costs, and how near its predictions come to measured steps.

    python -m bench.simulate [--repeats 7] [--steps 15]

Four questions: how long a simulation takes (dualpipe; a fresh schedule each time, because one keeps
its graph once it has been walked; building is not counted, verifying is), whether that is linear in
the number of actions (as processor time, to which other programs add less), how long the command
takes from start to end, and how far the predicted makespan is from what the executor measured
(`bench.prediction`).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

from counterflow.parallel.schedule import actions, build, names
from counterflow.parallel.simulate import Costs, simulate

from .machine import write_result

# Ranks, micro-batches, and the target of the simulation, ms, where there is one.
SIZES: tuple[tuple[int, int, float | None], ...] = (
    (8, 64, None),
    (16, 120, 30.0),
    (16, 512, None),
    (32, 512, None),
    (64, 1024, 2000.0),
)
COSTS = Costs(F=1, I=1, W=1, pair=3)
COMMAND = ("simulate", "--schedule", "dualpipe", "--ranks", "8", "--microbatches", "20", "--json")
START_TARGET_MS = 500.0


def elapsed_ms(began: float) -> float:
    return (time.perf_counter() - began) * 1e3


def spread(times: list[float]) -> dict[str, float]:
    return {"median": statistics.median(times), "min": min(times)}


def speed(
    ranks: int,
    microbatches: int,
    target_ms: float | None,
    repeats: int,
    name: str = "dualpipe",
) -> dict[str, Any]:
    """Times of building, simulating, and of all that --json prints, of one schedule at one size."""
    built, simulated, processor, told = [], [], [], []
    num_actions, makespan = 0, 0.0
    for _ in range(repeats):
        began = time.perf_counter()
        schedule = build(name, ranks=ranks, microbatches=microbatches)
        built.append(elapsed_ms(began))
        began, running = time.perf_counter(), time.process_time()
        result = simulate(schedule, COSTS)
        makespan = result.makespan
        simulated.append(elapsed_ms(began))
        processor.append((time.process_time() - running) * 1e3)
        result.to_json()
        told.append(elapsed_ms(began))
        num_actions = sum(len(actions(step)) for row in schedule.rows for step in row)
    return {
        "schedule": name,
        "ranks": ranks,
        "microbatches": microbatches,
        "actions": num_actions,
        "makespan": makespan,
        "build_ms": spread(built),
        "simulate_ms": spread(simulated),
        "target_ms": target_ms,
        "simulate_and_json_ms": spread(told),
        "processor_us_per_action": min(processor) / num_actions * 1e3,
    }


def speeds(repeats: int) -> dict[str, Any]:
    """`speed` at every size, and how much more an action costs at the largest than at the least."""
    runs = [speed(*size, repeats=repeats) for size in SIZES]
    print("simulate dualpipe: verified, a fresh schedule each time, the build not counted")
    for run in runs:
        target = f"   target {run['target_ms']:.0f}" if run["target_ms"] else ""
        print(
            f"  {run['ranks']:3} x {run['microbatches']:4} {run['actions']:7} actions "
            f"{run['simulate_ms']['median']:8.1f} ms, least {run['simulate_ms']['min']:8.1f} ms "
            f"{run['processor_us_per_action']:6.2f} us an action{target}"
        )
    ratio = runs[-1]["processor_us_per_action"] / runs[0]["processor_us_per_action"]
    print(f"  an action at {runs[-1]['actions']} / at {runs[0]['actions']} actions: {ratio:.2f}")
    return {"sizes": runs, "largest_to_smallest_per_action": ratio}


def speeds_by_schedule(repeats: int) -> list[dict[str, Any]]:
    """`speed` of every named schedule at 16 ranks and 120 micro-batches."""
    print("the same at 16 x 120; schedules of two stages a rank have twice the actions")
    runs: list[dict[str, Any]] = []
    for name in names():
        runs.append(speed(16, 120, 30.0, repeats, name))
        times = runs[-1]["simulate_ms"]
        print(
            f"  {name:12} {runs[-1]['actions']:7} actions {times['median']:8.1f} ms, "
            f"least {times['min']:8.1f} ms"
        )
    return runs


def start_up(repeats: int) -> dict[str, Any]:
    """The whole command in a process of its own, and an interpreter that does nothing."""
    script = Path(sysconfig.get_path("scripts")) / "counterflow"
    commands = {"command_ms": [str(script), *COMMAND], "bare_ms": [sys.executable, "-c", "pass"]}
    times: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(repeats + 1):
        for name, command in commands.items():
            began = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            if turn:  # the first one may write bytecode
                times[name].append(elapsed_ms(began))
    found: dict[str, Any] = {name: spread(took) for name, took in times.items()}
    share = found["bare_ms"]["median"] / found["command_ms"]["median"]
    print(
        f"counterflow {' '.join(COMMAND)}\n"
        f"  {found['command_ms']['median']:.0f} ms, least {found['command_ms']['min']:.0f} ms; of "
        f"which the interpreter alone {found['bare_ms']['median']:.0f} ms ({share:.0%})   "
        f"target {START_TARGET_MS:.0f}"
    )
    return {
        "command": " ".join(("counterflow", *COMMAND)),
        **found,
        "bare_share": share,
        "target_ms": START_TARGET_MS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7, help="of each simulation and start")
    parser.add_argument("--steps", type=int, default=15, help="measured steps of each schedule")
    parser.add_argument("--limit", type=float, default=75.0, help="seconds for these steps")
    parser.add_argument("--microbatches", type=int, default=8, help="of a measured step")
    parser.add_argument("--rows", type=int, default=512, help="rows of a micro-batch")
    parser.add_argument("--width", type=int, default=256)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    found: dict[str, Any] = {"load_average": load, "speed": speeds(options.repeats)}
    found["speed_by_schedule"] = speeds_by_schedule(min(3, options.repeats))
    found["start_up"] = start_up(options.repeats)
    # With torch, which would be in the way of the times before.
    from .prediction import predictions

    found["prediction"] = predictions(
        microbatches=options.microbatches,
        rows=options.rows,
        width=options.width,
        steps=options.steps,
        limit_s=options.limit,
    )
    print(f"wrote {write_result('simulate', found)}")


if __name__ == "__main__":
    main()
