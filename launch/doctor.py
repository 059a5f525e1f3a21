"""`counterflow doctor`: what this machine has, where the ranks of a launch are, what is wrong.

Started as one process it describes this machine. Started by torchrun, mpirun or srun as several,
rank 0 also tells where every rank is and what does not fit, and the others print nothing.
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
from .doctor_look import Looked, leave_status, look, with_preflight
from .doctor_options import DoctorOptions
from .doctor_print import as_json, print_facts
from .doctor_ranks import met
from .errors import ToldError
from .life.status import DONE, FAILED, MISTAKE
from .preflight.baseline import BaselineError
from .preflight.finding import status_of
from .preflight.run import tell


def run(parsed: argparse.Namespace) -> int:
    """Print what was found, as one JSON object or as tables.

    Args:
        parsed: see `doctor_options`.

    Returns:
        The exit status, the same on every rank: DONE; BAD_NODE where a node is unfit; MISTAKE where
        a configuration is. Where ranks did not answer within the limit, or the environment is
        wrong, that is printed with the facts, and the process ends with FAILED instead.

    Raises:
        ValueError: options that cannot be, or a configuration that does not fit together.
    """
    options = DoctorOptions.of(parsed)
    if options.measure is not None:
        from .measure_command import measure

        return measure(options)
    environ = dict(os.environ)
    config = None
    if options.config is not None:
        from .check import check_sizes
        from .config import load

        config = load(options.config)
        check_sizes(config)
        options = with_preflight(options, config)
    gpus = find_gpus()
    place: ProcessPlace | None = None
    topology: Topology | None = None
    looked, problem, status = Looked(), "", FAILED
    try:
        place = place_of_process(environ, timeout_s=options.timeout_s)
        device = device_of_rank(place.local_rank, gpus, environ.get("CUDA_VISIBLE_DEVICES"))
        # Bandwidths are measured by groups of their own, if nodes turn out to be well.
        backend = "gloo" if options.bandwidth and place.world_size > 1 else None
        with met(place, device, environ, timeout_s=options.timeout_s, backend=backend) as ranks:
            topology = ranks.topology
            looked = look(options, config, place, ranks, gpus, environ)
    except BaselineError as error:
        problem, status = str(error), MISTAKE
    except (CommError, ToldError, ValueError) as error:
        problem = str(error)
    except Exception as error:  # a broken torch or MPI: what the doctor is asked about
        problem = f"{type(error).__name__}: {error}"
    rank = place.rank if place else rank_told(environ)
    if not rank:  # one whose rank nobody knows may be the only one
        if options.preflight:
            tell(looked.findings, environ)
        else:
            facts = find_facts(place, gpus, topology or problem, environ, looked=looked)
            if options.json:
                print(json.dumps(as_json(facts)))
            else:
                print_facts(facts)
    if problem:
        _end(problem, status)
    status = status_of(looked.findings)
    if options.status_to is not None:
        leave_status(options.status_to, status)
        return DONE
    return status


def _end(problem: str, status: int) -> NoReturn:
    """End this process at once: at the interpreter's own exit MPI and gloo wait for peers."""
    print(f"counterflow: error: {problem}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
