"""One rank of a run, started by torchrun, srun or mpirun: from environment to exit status."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import ExitStack

from ..comm.errors import CommError
from .check import check_sizes
from .config import Config
from .errors import ReadError, SaveError, ToldError, rank_0_first
from .folder import STOPPED_FILE, claim
from .life.logs import rank_logs
from .life.status import FAILED, MISTAKE
from .life.stop import hold
from .resume import started_again
from .start import write_config
from .torchrun import die_with_launcher
from .world import Place


def run_rank(config: Config) -> int:
    """Train as one rank; where it fails, its line is printed and this process ends.

    Returns:
        The exit status of a rank that ended well.

    Raises:
        ValueError: the environment does not tell this rank's place, or its log cannot be written.
    """
    hold()
    # Until `StopRequests` listens, whoever ends this rank does so without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    place = Place.of(os.environ)
    die_with_launcher()
    with ExitStack() as held:
        if config.run.logs:  # it forks: before there are threads
            with rank_0_first(place.rank):
                held.enter_context(rank_logs(config.run.path, place.rank))
        try:
            return _train(config, place)
        except ValueError as error:
            status = _tell(f"rank {place.rank}: {error}", MISTAKE)
        except (CommError, SaveError, ReadError) as error:  # name the rank themselves
            status = _tell(str(error), FAILED)
        except OSError as error:  # a disk that is full or gone
            where = f"{error.filename}: " if error.filename else ""
            status = _tell(f"rank {place.rank}: {where}{error.strerror or error}", FAILED)
        except ToldError as error:
            status = error.status
    # At once: threads of the communication library may still be in a wait, and the interpreter's
    # own exit then ends in SIGABRT.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _train(config: Config, place: Place) -> int:
    with rank_0_first(place.rank):
        config.mesh.require_world_size(place.world_size)
        check_sizes(config)
    with ExitStack() as held:
        if place.rank == 0:
            # Of a run that is started again the lost start's lock may stay for a while.
            wait_s = config.run.timeout_s if started_again() else 0.0
            held.enter_context(claim(config.run.path, wait_s=wait_s))
            write_config(config)
            (config.run.path / STOPPED_FILE).unlink(missing_ok=True)
        from .trainer import train

        return train(config, config.run.path)


def _tell(message: str, status: int) -> int:
    # One write, so that the lines of several ranks do not run into each other.
    sys.stderr.write(f"counterflow: error: {message}\n")
    return status
