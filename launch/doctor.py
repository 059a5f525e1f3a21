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
from ..comm.topology import (
    ProcessPlace,
    Topology,
    device_of_rank,
    find_gpus,
    place_of_process,
    rank_told,
)
from .doctor_facts import find_facts
from .doctor_print import as_json, print_facts
from .doctor_ranks import topology_of_ranks


def run(parsed: argparse.Namespace) -> int:
    """Print the facts, as one JSON object or as tables.

    Args:
        parsed: `json`, and `timeout_s`, the limit of each wait for other ranks, seconds.

    Returns:
        The exit status. Where ranks did not answer within the limit, or the environment is wrong,
        that is printed with the facts, and the process ends with 1 instead.

    Raises:
        ValueError: a limit that is none.
    """
    environ = dict(os.environ)
    if not parsed.timeout_s > 0:
        raise ValueError(f"--timeout-s {parsed.timeout_s:g} is no time to wait; give seconds")
    gpus = find_gpus()
    place: ProcessPlace | None = None
    topology: Topology | None = None
    problem = ""
    try:
        place = place_of_process(environ, timeout_s=parsed.timeout_s)
        device = device_of_rank(place.local_rank, gpus, environ.get("CUDA_VISIBLE_DEVICES"))
        topology = topology_of_ranks(place, device, environ, timeout_s=parsed.timeout_s)
    except (CommError, ValueError) as error:
        problem = str(error)
    except Exception as error:  # a broken torch or MPI: what the doctor is asked about
        problem = f"{type(error).__name__}: {error}"
    rank = place.rank if place else rank_told(environ)
    if not rank:  # one whose rank nobody knows may be the only one
        facts = find_facts(place, gpus, topology or problem, environ)
        if parsed.json:
            print(json.dumps(as_json(facts)))
        else:
            print_facts(facts)
    if problem:
        _end(problem)
    return 0


def _end(problem: str) -> NoReturn:
    """End this process at once: at the interpreter's own exit MPI and gloo wait for peers."""
    print(f"counterflow: error: {problem}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
