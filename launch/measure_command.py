"""`counterflow doctor --measure FILE.json`: starts ranks here, or is one of them."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..comm.errors import CommError
from .check import check_sizes
from .config import Config, load
from .doctor_options import DoctorOptions
from .errors import ToldError
from .life.status import DONE, FAILED, MISTAKE
from .settings import ConfigError
from .torchrun import choose_device, die_with_launcher, num_gpus, set_threads, start
from .world import Place

if TYPE_CHECKING:
    from .measure import Measurement


def measure(options: DoctorOptions) -> int:
    """Measure this machine by the run of `options.config`, or by the default run.

    Returns:
        The exit status.

    Raises:
        ValueError: the configuration does not fit together, or this machine cannot have its ranks.
    """
    from .slurm.started import place_variables

    config = load(options.config)
    check_sizes(config)
    os.environ.update(place_variables())  # where srun or mpirun started this rank itself
    if "RANK" in os.environ:
        return _run_rank(options, config)
    ranks = ranks_here(config, options.ranks)
    set_threads(choose_device(config.run.device, ranks), ranks)
    return start(_arguments(options), nproc=ranks, port=0, nothing_to_lose=True)


def ranks_here(config: Config, given: int | None) -> int:
    """How many processes measure on this machine: as many as compute there in the run.

    Raises:
        ConfigError: so many cannot be had.
    """
    world, gpus = config.mesh.world_size, num_gpus() if config.run.device != "cpu" else 0
    if given is not None:
        return given
    if gpus:
        return min(world, gpus)
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    if world > 4 * cores:
        raise ConfigError(
            f"the run has {world} ranks, and this machine {cores} cores; say by --ranks how many "
            "of them measure here"
        )
    return world


def _arguments(options: DoctorOptions) -> list[str]:
    """The command line of each rank."""
    found = ["doctor", "--measure", str(options.measure), "--rounds", str(options.rounds)]
    found += ["--timeout-s", str(options.timeout_s)]
    if options.config is not None:
        found += ["--config", str(options.config)]
    return [*found, *(["--json"] if options.json else [])]


def _run_rank(options: DoctorOptions, config: Config) -> int:
    """Measure as one rank; where that fails, this process ends with a line of its own."""
    place = Place.of(os.environ)
    die_with_launcher()
    try:
        return _measure(options, config, place)
    except ValueError as error:
        message, status = f"rank {place.rank}: {error}", MISTAKE
    except CommError as error:
        message, status = str(error), FAILED
    except ToldError as error:
        message, status = "", error.status
    if message:
        sys.stderr.write(f"counterflow: error: {message}\n")
    # At once: threads of the communication library may still be in a wait.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _measure(options: DoctorOptions, config: Config, place: Place) -> int:
    import torch

    from ..parallel.mesh import Mesh, MeshShape
    from ..predict.measured import as_json
    from .measure import Measuring, measure_machine
    from .outputs import write_whole
    from .world import joined

    assert options.measure is not None
    device = torch.device(choose_device(config.run.device, place.local_world_size))
    if device.type == "cuda":
        device = torch.device("cuda", place.local_rank)
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    limit_s = options.timeout_s
    with joined(place, backend, timeout_s=limit_s):
        world = place.world_size
        shape = MeshShape(1, world, math.gcd(config.mesh.ep, world))
        mesh = Mesh.create(shape, timeout_s=limit_s)
        machine = measure_machine(config, mesh, device, timeout_s=limit_s)
        measuring = Measuring(config, mesh, device)
        for _ in range(options.rounds):
            measuring.round()
        found = measuring.results(str(options.measure), machine)
    if place.rank == 0:
        content = as_json(found.calibration, found.cluster, found.about)
        text = json.dumps(content, indent=2) + "\n"
        write_whole(options.measure, lambda path: path.write_text(text, encoding="utf-8"))
        print(text.rstrip() if options.json else told(found, options.measure), flush=True)
    return DONE


def told(found: Measurement, path: Path) -> str:
    """What a person wants to know of a measurement."""
    gpu, links = found.cluster.gpu, found.cluster.links
    rates = found.calibration
    about = found.about
    lines = [
        f"{gpu.name}: ranks at once {about['ranks']}, rounds {about['rounds']}",
        f"  products {gpu.bf16_tflops:.3g} TFLOP/s, in FP8 {gpu.fp8_tflops:.3g}; "
        f"memory {gpu.memory_gbps:.3g} GB/s; optimizer {rates.optimizer_gbps:.3g} GB/s",
        f"  links inside {links.inside_gbps:.3g} GB/s, {links.inside_us:.0f} us; "
        f"across {links.across_gbps:.3g} GB/s, {links.across_us:.0f} us",
        f"  a step besides its schedule {rates.step_ms:.3g} ms, an action besides its phases "
        f"{rates.overhead_ms:.3g} ms",
        "  ms of a layer, alone / in a pair:",
    ]
    for reference in rates.references:
        times = (
            f"{name} {ms:.3g}/{reference.paired[name]:.3g}"
            for name, ms in reference.alone.items()
            if ms or reference.paired[name]
        )
        lines.append(f"    {reference.kind:10}" + "  ".join(times))
    return "\n".join([*lines, f"wrote {path}"])
