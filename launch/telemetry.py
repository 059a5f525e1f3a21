"""What is measured of each step beside its losses: speed, waits, memory, experts, the GPU.

docs/metrics.md defines every key.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from ..comm.collectives import gather
from ..model.flops import mfu, peak_tflops, token_flops
from ..parallel.mesh import Mesh
from .config import Config
from .engine import StepResult
from .telemetry_gpu import GpuMeter

_GIB = 2**30
# Of what ranks tell of themselves, by key: what is written of all of them.
_OVER_RANKS: dict[str, dict[str, Callable[[list[float]], float]]] = {
    "memory_gib": {"max": max},
    "exposed_comm_ms": {"max": max, "mean": fmean},
    "gpu_power_w": {"mean": fmean, "min": min, "max": max},
    "gpu_utilization_percent": {"mean": fmean, "min": min, "max": max},
}


class Telemetry:
    """Measures this rank's steps: `with telemetry.step(): ...`, then `values`.

    Args:
        config: of the run.
        mesh: this rank's place; its wait board is read.
        device: where this rank computes.

    Attributes:
        seconds: that the last step took, by this rank's clock.
    """

    def __init__(self, config: Config, mesh: Mesh, device: torch.device) -> None:
        self.seconds = 0.0
        self._waited_s = 0.0
        self._mesh, self._device = mesh, device
        self._gpu_every = config.metrics.gpu_every
        self._flops = token_flops(config.model, config.data.sequence_length).published
        self._peak = config.metrics.peak_tflops
        self._meter: GpuMeter | None = None
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            self._peak = self._peak or peak_tflops(properties.name)
            if self._gpu_every:
                self._meter = GpuMeter(str(properties.uuid))

    @contextmanager
    def step(self) -> Iterator[None]:
        """Within this context runs one optimizer step, its batch included."""
        waited, began = self._mesh.waits.waited_s, time.perf_counter()
        yield
        self.seconds = time.perf_counter() - began
        self._waited_s = self._mesh.waits.waited_s - waited

    def values(self, step: int, result: StepResult, num_tokens: int) -> dict[str, Any]:
        """The metrics of the last step, by key. Every rank calls it after every step.

        At the first step and every `metrics.gpu_every` a collective over all ranks, in which they
        tell each other their memory, waits and power; never within the time of a step.

        Args:
            step: its number, from 1.
            result: what it gave.
            num_tokens: of the global batch.

        Raises:
            CommError: another rank is gone or did not answer in time.
        """
        per_gpu = num_tokens / self.seconds / self._mesh.shape.world_size
        found: dict[str, Any] = {
            "seconds": self.seconds,
            "tokens_per_second_per_gpu": per_gpu,
            "mfu": mfu(self._flops, per_gpu, self._peak),
            **self._exposed(),
            **_memory(self._device),
            **expert_load(result.loads),
        }
        if self._gpu_every and (step == 1 or step % self._gpu_every == 0):
            if self._meter is not None:
                found |= self._meter.read()
            found |= self._over_ranks(found)
        return found

    def _over_ranks(self, mine: Mapping[str, Any]) -> dict[str, float | None]:
        """What all ranks together have of what each tells of itself."""
        told = gather(
            {key: mine[key] for key in _OVER_RANKS if key in mine},
            self._mesh.world_group,
            "the ranks' memory and power",
            board=self._mesh.waits,
        )
        return over_ranks(told)

    def _exposed(self) -> dict[str, float | None]:
        """On a GPU it is the stream that waits, which only a recorded step tells."""
        if self._device.type == "cuda":
            return {"exposed_comm_ms": None, "exposed_comm_percent": None}
        return {
            "exposed_comm_ms": 1e3 * self._waited_s,
            "exposed_comm_percent": 100 * self._waited_s / self.seconds,
        }


def over_ranks(told: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Highest, lowest, mean over ranks, under the ranks' own key with _max, _min, _mean.

    Args:
        told: of each rank. Those that do not tell a key, as a rank whose GPU cannot be read, do not
            count for it; where a key is null on all that tell it, so is what is made of it.
    """
    found: dict[str, float | None] = {}
    for key, makers in _OVER_RANKS.items():
        given = [mine[key] for mine in told if key in mine]
        numbers = [value for value in given if value is not None]
        if given:
            made = {name: make(numbers) if numbers else None for name, make in makers.items()}
            found |= {f"{key}_{name}": value for name, value in made.items()}
    return found


def expert_load(loads: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """How evenly the experts were used, each against the mean of its layer, which is 1.

    Args:
        loads: tokens of each routed expert in a step, by layer, as `StepResult.loads`.

    Returns:
        expert_load_max, expert_load_min: of any expert of any layer. expert_load_std: root of the
        mean square distance from 1, over all experts of all layers. max_vio_by_layer: in the order
        of `loads`, null for a layer without tokens. Nothing for a model without experts.
    """
    if not loads:
        return {}
    by_layer = [
        [count * len(load) / sum(load) for count in load] for load in loads.values() if sum(load)
    ]
    shares = [share for layer in by_layer for share in layer]
    spread = [(share - 1) ** 2 for share in shares]
    vio = (max(load) * len(load) / sum(load) - 1 if sum(load) else None for load in loads.values())
    return {
        "expert_load_max": max(shares, default=None),
        "expert_load_min": min(shares, default=None),
        "expert_load_std": math.sqrt(sum(spread) / len(spread)) if spread else None,
        "max_vio_by_layer": list(vio),
    }


def _memory(device: torch.device) -> dict[str, float]:
    """Peaks since the process began, GiB: of the GPU's allocator, or resident memory on a CPU."""
    if device.type != "cuda":
        return {"memory_gib": peak_resident_bytes() / _GIB}
    return {
        "memory_gib": torch.cuda.max_memory_allocated(device) / _GIB,
        "memory_reserved_gib": torch.cuda.max_memory_reserved(device) / _GIB,
    }


def peak_resident_bytes() -> int:
    """The most memory that this process has had resident."""
    try:  # what getrusage tells on Linux may be the process's that started this one
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
