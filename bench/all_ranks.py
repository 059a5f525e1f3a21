"""How long it takes to simulate every rank of a DeepSeek-V3 step by itself, and the memory.

    python -m bench.all_ranks [--repeats 3]

V3's layout (arXiv 2412.19437, section 3.2: 16 pipeline ranks, 64 ranks an expert group, DualPipe,
120 micro-batches) on 2,048 ranks, and the same with eight times the data-parallel ranks, on H800s
by their data sheet. Routing is skewed, each micro-batch's popularity its own, which takes longest
to draw; phases, exchanges and ranks jitter. Each run is a process of its own. Counted is all from
the layout to the result; starting Python is not. Exits with 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from counterflow.model import ModelConfig
from counterflow.predict.calibration import Calibration
from counterflow.predict.cluster import load_cluster
from counterflow.predict.costs import stage_times
from counterflow.predict.jitter import Jitter
from counterflow.predict.layout import Layout
from counterflow.predict.ranks import RanksResult, simulate_ranks
from counterflow.predict.routing import GroupRouting, Routing

from .machine import write_result

PP, EP, MICROBATCHES = 16, 64, 120
MEMORY_TARGET_GB = 2.0
# Loss-free balancing has 0.04 over many tokens; single micro-batches are taken to be far less even.
MAX_VIO = 0.5
JITTER = Jitter(computation=0.02, exchange=0.02, speed=0.01)


class Size(NamedTuple):
    """What is simulated, and in which time it has to be."""

    dp: int
    target_s: float


SIZES = (Size(128, 10.0), Size(1024, 120.0))


def one(dp: int) -> dict[str, Any]:
    """A step of so many data-parallel ranks, simulated in this process."""
    began, running = time.perf_counter(), time.process_time()
    model, cluster = ModelConfig(), load_cluster("h800")
    layout = Layout(pp=PP, dp=dp, ep=EP, microbatches=MICROBATCHES)
    schedule = layout.make_schedule()
    parts = layout.parts(model, schedule.num_stages)
    stages = stage_times(model, layout, cluster, Calibration("datasheet", cluster.name), parts)

    def step(routing: GroupRouting | None, jitter: Jitter | None) -> RanksResult:
        return simulate_ranks(schedule, stages, dp=dp, ep=EP, routing=routing, jitter=jitter)

    skewed = Routing.with_max_vio(MAX_VIO, model.n_routed_experts, persistent=False)
    routing = skewed.of(model, layout, gpus_per_node=cluster.gpus_per_node)
    result = step(routing, JITTER)
    seconds, processor_s = time.perf_counter() - began, time.process_time() - running
    peak_gb = peak_bytes() / 1e9
    num_phases = sum(ms > 0 for stage in stages for layer in stage for ms in layer.alone.values())
    return {
        "seconds": seconds,
        "processor_s": processor_s,
        "peak_gb": peak_gb,
        "phases": num_phases * MICROBATCHES * dp,
        "step_ms": result.makespan,
        "balanced_ms": step(None, None).makespan,
        "routing_ms": step(routing, None).makespan,
        "jitter_ms": step(None, JITTER).makespan,
        "waiting_ms": float(result.waiting.mean()),
    }


def peak_bytes() -> int:
    """The most memory of this process; the kernel's mark of this program alone, where it tells."""
    status = Path("/proc/self/status")
    if status.exists() and "VmHWM:" in (text := status.read_text()):
        return int(text.split("VmHWM:")[1].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measured(size: Size, repeats: int) -> dict[str, Any]:
    """`one` in processes of their own."""
    command = [sys.executable, "-m", "bench.all_ranks", "--one", str(size.dp)]
    runs = [json.loads(subprocess.check_output(command, text=True)) for _ in range(repeats)]
    seconds = [run.pop("seconds") for run in runs]
    processor_s = [run.pop("processor_s") for run in runs]
    peak = max(run.pop("peak_gb") for run in runs)
    result = {
        "ranks": PP * size.dp,
        "pp": PP,
        "dp": size.dp,
        "ep": EP,
        "microbatches": MICROBATCHES,
        "seconds": {"median": median(seconds), "max": max(seconds)},
        "processor_s": min(processor_s),
        "target_s": size.target_s,
        "peak_gb": peak,
        "target_gb": MEMORY_TARGET_GB,
        **runs[0],
    }
    print(
        f"{result['ranks']:6} ranks, {result['phases'] / 1e6:6.1f} M phases: "
        f"{median(seconds):6.2f} s, slowest {max(seconds):6.2f} s, target {size.target_s:g} "
        f"({min(processor_s):.2f} s of a processor); "
        f"{peak:.3f} GB, target {MEMORY_TARGET_GB:g}\n"
        f"       step {result['step_ms']:.1f} ms, balanced {result['balanced_ms']:.1f}, with "
        f"routing alone {result['routing_ms']:.1f}, with jitter alone {result['jitter_ms']:.1f}"
    )
    return result


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each size")
    parser.add_argument("--one", type=int, metavar="DP", help="one run here, as JSON on stdout")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one)))
        return 0
    sizes = [measured(size, options.repeats) for size in SIZES]
    met = all(
        size["seconds"]["max"] <= size["target_s"] and size["peak_gb"] <= size["target_gb"]
        for size in sizes
    )
    load = os.getloadavg()[0]
    found = {
        "met": met,
        "load_average": load,
        "max_vio": MAX_VIO,
        "jitter": vars(JITTER),
        "sizes": sizes,
    }
    print(f"{'all targets met' if met else 'TARGET MISSED'}; {write_result('all_ranks', found)}")
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
