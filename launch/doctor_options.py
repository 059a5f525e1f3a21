"""What `counterflow doctor` takes."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

from .outputs import Output, check_outputs


@dataclass(frozen=True)
class DoctorOptions:
    """The options, checked.

    Attributes:
        json: print one JSON object.
        timeout_s: limit of each wait for other ranks, seconds.
        config: a run's configuration, whose memory and disk are looked at.
        gpu_memory_gib: of each GPU; None takes those of this machine.
        bandwidth: measure it.
        baseline, save_baseline: files.
        least_share: of the baseline, below which a node is bad; None: the configuration's.
        preflight: print findings alone, as before a run, by the configuration's [preflight].
        gpus_wanted: that the run needs on each node; None takes those that there are.
        findings_from: a file of what was found on this node already; None: look now.
        status_to: a file that gets the exit status, which is then 0: of torchrun's ranks each
            other one would be told as a failure.
        measure: a file for what phases and links take on this machine; None: not measured.
        ranks: that measure at once on this machine; None: as many as the run has there.
        rounds: of measuring.
    """

    json: bool = False
    timeout_s: float = 60.0
    config: Path | None = None
    gpu_memory_gib: float | None = None
    bandwidth: bool = False
    baseline: Path | None = None
    save_baseline: Path | None = None
    least_share: float | None = None
    preflight: bool = False
    gpus_wanted: int | None = None
    findings_from: Path | None = None
    status_to: Path | None = None
    measure: Path | None = None
    ranks: int | None = None
    rounds: int = 10

    @classmethod
    def of(cls, parsed: argparse.Namespace) -> Self:
        """The options of a command line, those that it lacks by default.

        Raises:
            ValueError: one that cannot be, or that needs another.
        """
        given = {f.name: getattr(parsed, f.name) for f in fields(cls) if hasattr(parsed, f.name)}
        return cls(**given)

    def __post_init__(self) -> None:
        if not self.timeout_s > 0:
            raise ValueError(f"--timeout-s {self.timeout_s:g} is no time to wait; give seconds")
        if self.gpu_memory_gib is not None and not self.gpu_memory_gib > 0:
            raise ValueError(f"--gpu-memory-gib {self.gpu_memory_gib:g} must be above 0")
        if self.gpu_memory_gib is not None and self.config is None:
            raise ValueError("--gpu-memory-gib says what a configuration must fit; give --config")
        if self.preflight and self.config is None:
            raise ValueError("--preflight looks at what a run needs; give --config")
        if self.least_share is not None and not 0 < self.least_share <= 1:
            raise ValueError(f"--least-share {self.least_share:g} must be above 0, to 1")
        if not self.bandwidth and (self.baseline or self.save_baseline):
            raise ValueError("a baseline is of measured bandwidths; give --bandwidth too")
        if self.measure is None and (self.ranks is not None or self.rounds != type(self).rounds):
            raise ValueError(
                "--ranks and --rounds say how to measure; give --measure FILE.json too"
            )
        if self.measure is not None and (self.bandwidth or self.preflight):
            raise ValueError("--measure stands alone; ask for --bandwidth or --preflight apart")
        for name, value in (("ranks", self.ranks), ("rounds", self.rounds)):
            if value is not None and value < 1:
                raise ValueError(f"--{name} {value} must be 1 or more")
        outputs = [Output("--save-baseline", self.save_baseline)] if self.save_baseline else []
        if self.measure is not None:
            outputs.append(Output("--measure", self.measure, (".json",)))
        inputs = {"--baseline": self.baseline} if self.baseline else {}
        check_outputs(outputs, inputs)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options to a parser."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--timeout-s",
        type=float,
        default=DoctorOptions.timeout_s,
        metavar="S",
        help="how long to wait for other ranks, seconds (default 60)",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="CONFIG.toml",
        help="a run: what it takes of memory by parts, and whether that and its disk suffice",
    )
    parser.add_argument(
        "--gpu-memory-gib",
        type=float,
        metavar="GIB",
        help="memory of a GPU that the run is to fit, instead of this machine's",
    )
    parser.add_argument(
        "--bandwidth",
        action="store_true",
        help="time all-to-all and all-reduce in every node, between neighbours and over all "
        "(under torchrun, mpirun or srun)",
    )
    parser.add_argument(
        "--save-baseline", type=Path, metavar="FILE", help="keep the bandwidths to compare with"
    )
    parser.add_argument(
        "--baseline", type=Path, metavar="FILE", help="hold the bandwidths against these"
    )
    parser.add_argument(
        "--least-share",
        type=float,
        metavar="SHARE",
        help="of the baseline, without one of the median node, below which a node is bad "
        "(default 0.8)",
    )
    parser.add_argument(
        "--preflight",
        action="store_true",
        help="print what is wrong and nothing else, as before a run, by --config's [preflight]",
    )
    parser.add_argument(
        "--measure",
        type=Path,
        metavar="FILE.json",
        help="time the phases of --config's layers, links and the optimizer on this machine, with "
        "as many ranks at once as the run has here, and keep that for counterflow plan",
    )
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="of --measure: ranks at once on this machine"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=DoctorOptions.rounds,
        metavar="N",
        help="of --measure: how often everything is timed (default 10)",
    )
    parser.add_argument("--gpus-wanted", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--findings-from", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    parser.add_argument("--status-to", type=Path, metavar="FILE", help=argparse.SUPPRESS)
