"""How fast a trace is read and analysed: time and peak memory of a fresh process.

A trace is repeated, one run after the other, until it has a million events; each run has times,
correlation ids and external ids of its own. The trace is one that `--trace` names, or one that
torch's profiler records here of a small training step.

    python -m bench.profile --trace TRACE.json.gz
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.machine import write_result

# Peak memory: the kernel's high-water mark of this program alone, where it is told.
_MEASURED = """
import json, resource, sys, time
begin = time.perf_counter()
from counterflow.comm.profile.analyse import analyse
from counterflow.comm.profile.read import read
started = time.perf_counter()
trace = read(sys.argv[1])
parsed = time.perf_counter()
report = analyse(trace)
done = time.perf_counter()
try:
    status = open("/proc/self/status").read()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
except (OSError, IndexError):
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
print(json.dumps({
    "events": trace.num_events, "activities": len(trace.activities), "on_gpu": trace.on_gpu,
    "missing": trace.missing, "exposed_ms": report.totals.exposed / 1e6,
    "import_seconds": started - begin, "read_seconds": parsed - started,
    "analyse_seconds": done - parsed, "seconds": done - begin, "peak_bytes": peak,
    "processor_seconds": time.process_time(),
}))
"""
_SHIFTED = re.compile(r'("(?:ts|correlation|External id|id)": )(\d+)(\.\d+)?')


def record(path: Path) -> None:
    """Have torch's profiler write a trace of three training steps of a small model."""
    import torch
    from torch import nn
    from torch.profiler import ProfilerActivity, profile, record_function

    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(24)))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            with record_function("forward"):
                loss = model(torch.randn(64, 256)).square().mean()
            with record_function("backward"):
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    profiler.export_chrome_trace(str(path))


def text_of(path: Path) -> str:
    """A trace's text, decompressed where its name says so."""
    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return file.read()
    return path.read_text(encoding="utf-8")


def repeated(text: str, num_events: int) -> Iterator[str]:
    """The text of a trace whose events are repeated, with shifted times and ids."""
    array = re.search(r'"traceEvents"\s*:\s*\[', text)
    if array is None:
        raise ValueError("the trace has no traceEvents; give one that torch.profiler exported")
    events, end = json.JSONDecoder().raw_decode(text, array.end() - 1)
    times = [float(event["ts"]) for event in events if event.get("ph") == "X"]
    ends = [float(e["ts"]) + float(e.get("dur", 0)) for e in events if e.get("ph") == "X"]
    period = math.ceil(max(ends) - min(times)) + 1000
    inner = text[array.end() : end - 1].strip()
    yield text[: array.end()] + "\n  "
    for run in range(math.ceil(num_events / len(events))):
        shifts = {'"ts": ': run * period}

        def shifted(number: re.Match[str], shifts: dict[str, int] = shifts, run: int = run) -> str:
            key, whole, decimals = number.groups(default="")
            return f"{key}{int(whole) + shifts.get(key, run * 10**7)}{decimals}"

        yield (",\n  " if run else "") + _SHIFTED.sub(shifted, inner)
    yield "\n  " + text[end - 1 :]


def measure(path: Path) -> dict[str, Any]:
    """Read and analyse a trace in a process of its own."""
    run = subprocess.run(
        [sys.executable, "-c", _MEASURED, str(path)], capture_output=True, text=True, check=False
    )
    if run.returncode:
        raise RuntimeError(f"reading and analysing {path} failed:\n{run.stderr}")
    return json.loads(run.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m bench.profile")
    parser.add_argument("--trace", type=Path, help="trace to repeat, .json or .json.gz")
    parser.add_argument("--events", type=int, default=1_000_000, help="at least so many")
    parser.add_argument("--keep", type=Path, help="write the long trace here and leave it there")
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = chosen.trace
        if source is None:
            source = Path(folder) / "recorded.json"
            record(source)
        path = chosen.keep or Path(folder) / "long.json"
        with path.open("w", encoding="utf-8") as file:
            file.writelines(repeated(text_of(source), chosen.events))
        rounds = [measure(path) for _ in range(chosen.rounds)]
        size = path.stat().st_size
    result: dict[str, Any] = {
        "repeated": chosen.trace.name if chosen.trace else "a trace recorded here",
        "file_mb": round(size / 1e6, 1),
        **{key: rounds[0][key] for key in ("events", "activities", "on_gpu", "missing")},
        "exposed_ms": rounds[0]["exposed_ms"],
    }
    for key in (
        "import_seconds",
        "read_seconds",
        "analyse_seconds",
        "seconds",
        "processor_seconds",
    ):
        each = [round(one[key], 3) for one in rounds]
        result[key] = {"median": statistics.median(each), "best": min(each), "worst": max(each)}
    result["peak_mb"] = round(max(one["peak_bytes"] for one in rounds) / 1e6, 1)
    print(json.dumps(result, indent=2))
    print("written to", write_result("profile", result))


if __name__ == "__main__":
    main()
