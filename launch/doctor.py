"""`counterflow doctor`: what this machine has, and where the ranks of a launch are.

Started as one process it describes this machine. Started by torchrun, mpirun or srun as several,
rank 0 also tells where every rank is, and the others print nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import NoReturn

from ..comm.errors import CommError
from ..comm.topology import Topology, device_of_rank, find_gpus, place_of_process
from .doctor_facts import find_facts
from .doctor_print import as_json, print_facts
from .doctor_ranks import topology_of_ranks


def run(parsed: argparse.Namespace) -> int:
    """Print the facts, as one JSON object or as tables.

    Args:
        parsed: `json`, and `timeout_s`, the limit of each wait for other ranks, seconds.

    Returns:
        The exit status. If ranks did not answer within the limit, the process ends with 1 instead.

    Raises:
        ValueError: the environment says something impossible of this process.
    """
    environ = dict(os.environ)
    if not parsed.timeout_s > 0:
        raise ValueError(f"--timeout-s {parsed.timeout_s:g} is no time to wait; give seconds")
    try:
        place = place_of_process(environ, timeout_s=parsed.timeout_s)
    except CommError as error:
        _end(error)
    gpus = find_gpus()
    gpu = device_of_rank(place.local_rank, gpus.gpus, environ.get("CUDA_VISIBLE_DEVICES"))
    device = f"GPU {gpu.index}: {gpu.name}" if gpu else "CPU"
    late: CommError | None = None
    topology: Topology | str
    try:
        topology = topology_of_ranks(place, device, environ, timeout_s=parsed.timeout_s)
    except CommError as error:
        late, topology = error, str(error)
    if place.rank == 0:
        facts = find_facts(place, gpus, topology, environ)
        if parsed.json:
            print(json.dumps(as_json(facts)))
        else:
            print_facts(facts)
    if late is not None:
        _end(late)
    return 0


def _end(error: CommError) -> NoReturn:
    """End this process at once: at the interpreter's own exit MPI and gloo wait for peers."""
    print(f"counterflow: error: {error}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
