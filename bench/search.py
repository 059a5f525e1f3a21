"""How long the search for DeepSeek-V3's layout takes, and how many layouts it considers.

    python -m bench.search [--repeats 1]

V3 with its published batch (arXiv 2412.19437, section 4.2: 15,360 sequences of 4,096 tokens) on
2,048 H200s and on 2,048 H800s by their data sheets, with random routing and the whole space. Each
is searched once pruned and once not, in a process of its own; starting Python is not counted. The
target is of H200s, unpruned: at least 2,000 layouts that fit are timed in at most 60 s. On H800s,
whose 80 GB hold less beside parameters and gradients in float32, far fewer fit, some 380: the
result says how many. Exits with 1 where the target is missed or pruning changes the ten best.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from statistics import median
from typing import Any

from counterflow.model import ModelConfig
from counterflow.predict.calibration import Calibration
from counterflow.predict.cluster import load_cluster
from counterflow.predict.routing import Routing
from counterflow.predict.search import search

from .all_ranks import peak_bytes
from .machine import write_result

GPUS, BATCH, LENGTH = 2048, 15360, 4096
CLUSTERS = ("h200", "h800")
TARGET_CLUSTER, TARGET_FEASIBLE, TARGET_S = "h200", 2000, 60.0


def one(name: str, *, prune: bool) -> dict[str, Any]:
    """A search in this process."""
    began, running = time.perf_counter(), time.process_time()
    cluster = load_cluster(name)
    found = search(
        ModelConfig(),
        cluster,
        Calibration("datasheet", cluster.name),
        gpus=GPUS,
        batch_sequences=BATCH,
        length=LENGTH,
        routing=Routing(),
        prune=prune,
    )
    return {
        "seconds": time.perf_counter() - began,
        "processor_s": time.process_time() - running,
        "peak_gb": peak_bytes() / 1e9,
        "layouts": found.num_layouts,
        "feasible_timed": found.num_evaluated,
        "pruned": found.num_pruned,
        "refused": dict(found.infeasible),
        "best": [
            {
                "step_ms": best.step_ms,
                "memory_gib": best.memory_bytes / 2**30,
                "mfu": best.mfu,
                "layout": vars(best.layout),
            }
            for best in found.best
        ],
    }


def measured(name: str, *, prune: bool, repeats: int) -> dict[str, Any]:
    """`one` in processes of their own."""
    command = [sys.executable, "-m", "bench.search", "--one", name]
    if not prune:
        command.append("--unpruned")
    runs = [json.loads(subprocess.check_output(command, text=True)) for _ in range(repeats)]
    seconds = [run.pop("seconds") for run in runs]
    processor_s = [run.pop("processor_s") for run in runs]
    peak = max(run.pop("peak_gb") for run in runs)
    result = {
        "cluster": name,
        "prune": prune,
        "seconds": {"median": median(seconds), "max": max(seconds)},
        "processor_s": min(processor_s),
        "peak_gb": peak,
        **runs[0],
    }
    refused = ", ".join(f"{key} {count}" for key, count in result["refused"].items())
    print(
        f"{name} {'pruned' if prune else 'whole':6}: {result['layouts']} layouts, "
        f"{result['feasible_timed']} feasible ones timed, {result['pruned']} pruned; "
        f"refused: {refused}\n"
        f"  {median(seconds):.1f} s, slowest {max(seconds):.1f} s "
        f"({min(processor_s):.1f} s of a processor), {peak:.3f} GB; "
        f"best step {result['best'][0]['step_ms']:.0f} ms"
    )
    return result


def reached(result: Mapping[str, Any]) -> bool:
    """Whether a search is as large and as fast as is wanted."""
    return result["feasible_timed"] >= TARGET_FEASIBLE and result["seconds"]["max"] <= TARGET_S


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=1, help="runs of each search")
    parser.add_argument("--one", choices=CLUSTERS, help="one run here, as JSON on stdout")
    parser.add_argument("--unpruned", action="store_true", help="of --one")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one, prune=not options.unpruned)))
        return 0
    searches: list[dict[str, Any]] = []
    same = True
    for name in CLUSTERS:
        whole, pruned = (
            measured(name, prune=prune, repeats=options.repeats) for prune in (False, True)
        )
        same = same and whole["best"] == pruned["best"]
        searches += [whole, pruned]
    target = next(one for one in searches if one["cluster"] == TARGET_CLUSTER and not one["prune"])
    met = reached(target) and same
    found = {
        "met": met,
        "target": {"feasible": TARGET_FEASIBLE, "seconds": TARGET_S, "cluster": TARGET_CLUSTER},
        "pruning_loses_none": same,
        "gpus": GPUS,
        "batch_sequences": BATCH,
        "length": LENGTH,
        "load_average": os.getloadavg()[0],
        "searches": searches,
    }
    print(f"{'all targets met' if met else 'TARGET MISSED'}; {write_result('search', found)}")
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
