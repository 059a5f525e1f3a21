"""What `counterflow doctor` finds out, as values: this machine, its libraries, its ranks.

Optional libraries are imported in processes of their own, side by side: one that crashes, hangs or
initialises CUDA then does nothing to the doctor, which itself needs no torch.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from ..comm.topology import (
    GpuFacts,
    NearestNics,
    Nic,
    ProcessPlace,
    Topology,
    find_nics,
    nearest_nics,
    pci_place,
)
from .doctor_look import Looked
from .preflight.environment import RULES

# Module, and the package that brings it.
_OPTIONAL = (
    ("triton", "triton"),
    ("deep_ep", "deep_ep"),
    ("deep_gemm", "deep_gemm"),
    ("transformer_engine", "transformer_engine"),
    ("mpi4py", "mpi4py"),
    ("pynvml", "nvidia-ml-py"),
)
# Set `found`, a list of texts. Importing mpi4py.MPI tells whether its MPI is there, but must not
# start it.
_ASK = "import {module} as m; found = [getattr(m, '__version__', None)]"
_ASK_MPI = """
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
library = " ".join(MPI.Get_library_version().replace(",", " ").split()[:3])
found = [f"{mpi4py.__version__} with {library}"]
"""
_ASK_TORCH = """
import torch
try:
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
except Exception:
    nccl = None
found = [torch.__version__, torch.version.cuda, nccl]
"""
# Libraries print too, also at exit: the mark tells the answer from what they say.
_MARK = "counterflow found "
_ANSWER = f"\nimport json; print('\\n{_MARK}' + json.dumps(found), flush=True)"
_IMPORT_LIMIT_S = 120.0

# Variables that change how a run communicates or computes: names, and beginnings of names. Beside
# these all that `preflight.environment` knows to hurt.
_VARIABLES = {
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "CUDA_DEVICE_ORDER",
    "CUDA_VISIBLE_DEVICES",
    "GLOO_SOCKET_IFNAME",
    "OMP_NUM_THREADS",
    "MASTER_ADDR",
    "MASTER_PORT",
    *(rule.name for rule in RULES),
}
_BEGINNINGS = ("NCCL_", "TORCH_NCCL_", "NVSHMEM_")
# Shown as not set where they are not: their defaults are seldom what a run wants.
_EXPECTED = ("CUDA_DEVICE_MAX_CONNECTIONS", "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS")


@dataclass(frozen=True)
class Host:
    """This machine: its name, processor, the cores that this process may use, memory in GiB."""

    name: str
    cpu: str
    cores: int
    memory_gib: float


@dataclass(frozen=True)
class Library:
    """A library's version, or the reason why it cannot be used; one of the two is None."""

    name: str
    version: str | None
    reason: str | None


@dataclass(frozen=True)
class Facts:
    """Everything that the doctor tells.

    Attributes:
        host, gpus, nics: of this machine.
        nearest: the NICs nearest to each GPU.
        python: its version.
        place: this process's place, by its launcher; None where that makes no sense.
        libraries: torch, what torch brings, and the optional ones.
        environment: variables that matter, None where not set.
        topology: of all ranks, or why they could not be gathered.
        looked: what was found wrong, and measured.
    """

    host: Host
    python: str
    place: ProcessPlace | None
    gpus: GpuFacts
    nics: tuple[Nic, ...]
    nearest: tuple[NearestNics, ...]
    libraries: tuple[Library, ...]
    environment: Mapping[str, str | None]
    topology: Topology | str
    looked: Looked = field(default_factory=Looked)

    @property
    def torch(self) -> str | None:
        """torch's version, None if it cannot be imported."""
        return next(library.version for library in self.libraries if library.name == "torch")


def find_facts(
    place: ProcessPlace | None,
    gpus: GpuFacts,
    topology: Topology | str,
    environ: Mapping[str, str],
    root: Path = Path("/"),
    looked: Looked | None = None,
) -> Facts:
    """Look at the machine whose files are under `root`; the rest has been found out before."""
    nics = find_nics(root)
    devices = root / "sys/bus/pci/devices"
    return Facts(
        host=find_host(root),
        python=platform.python_version(),
        place=place,
        gpus=gpus,
        nics=nics,
        nearest=tuple(nearest_nics(pci_place(devices / gpu.pci), nics) for gpu in gpus.gpus),
        libraries=find_libraries(),
        environment=variables_that_matter(environ),
        topology=topology,
        looked=looked or Looked(),
    )


def find_host(root: Path = Path("/")) -> Host:
    """This machine, its processor's name from the files under `root`."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = (root / "proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # another system, or a processor that is not named there
        pass
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Host(platform.node(), cpu, cores, round(memory / 2**30, 1))


def variables_that_matter(environ: Mapping[str, str]) -> dict[str, str | None]:
    """Variables of the environment that change how a run communicates or computes, by name."""
    set_ones = [name for name in environ if name in _VARIABLES or name.startswith(_BEGINNINGS)]
    return {name: environ.get(name) for name in sorted({*_EXPECTED, *set_ones})}


def find_libraries() -> tuple[Library, ...]:
    """torch, CUDA and NCCL as torch has them, and the optional libraries."""
    asks = {module: _ASK.format(module=module) for module, _ in _OPTIONAL}
    asks |= {"mpi4py": _ASK_MPI, "torch": _ASK_TORCH}
    with ThreadPoolExecutor(len(asks)) as pool:
        answers = dict(zip(asks, pool.map(ask_library, asks, asks.values()), strict=True))
    torch = answers["torch"]
    built = "this torch is built without it"
    if isinstance(torch, str):
        found = [Library(name, None, torch) for name in ("torch", "cuda", "nccl")]
    else:
        found = [
            Library(name, version, None if version else built)
            for name, version in zip(("torch", "cuda", "nccl"), torch, strict=True)
        ]
    for module, package in _OPTIONAL:
        answer = answers[module]
        if isinstance(answer, str):
            found.append(Library(module, None, answer))
        else:
            found.append(Library(module, answer[0] or _version_of(package), None))
    return tuple(found)


def ask_library(
    module: str, code: str, *, limit_s: float = _IMPORT_LIMIT_S
) -> list[str | None] | str:
    """What `code`, which imports a library, finds in a process of its own.

    Args:
        module: the library; if it is not installed no process is started.
        code: sets `found`, a list of texts.
        limit_s: how long it may take, seconds.

    Returns:
        The list, or in a few words why the library cannot be imported.
    """
    if find_spec(module) is None:
        return "not installed"
    try:
        # -P: a folder of the library's name in the working directory is not the library.
        done = subprocess.run(
            [sys.executable, "-P", "-c", code + _ANSWER],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit_s,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return f"its import does not end within {limit_s:g} s"
    if done.returncode < 0:
        return f"its import is ended by {signal.Signals(-done.returncode).name}"
    if done.returncode:
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        return said[-1] if said else f"its import ends with exit status {done.returncode}"
    answers = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if not answers:
        return "it does not let Python say what it is"
    return json.loads(answers[-1].removeprefix(_MARK))


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "of unknown version"
