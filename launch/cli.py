"""The command line. Each command imports what it needs when it runs, so that help starts at once.

A user's mistake is one line on stderr, `counterflow: error: ...`, and exit status 2.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from counterflow import __version__  # the root package is no room, so no relative import finds it

if TYPE_CHECKING:
    from .config import Config

_TRAIN_USAGE = "counterflow train [CONFIG.toml] [--profile STEPS] [--dotted.key VALUE ...]"
_SHORT = {"profile": "profile.steps"}  # flags of `train` that stand for a key


class UsageError(ValueError):
    """A command line that cannot be understood."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is returned."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        # train's keys are the configuration's, which argparse cannot know.
        if arguments[:1] == ["train"]:
            return _train(arguments[1:])
        # What follows their `--` is train's.
        if arguments[:1] == ["launch"]:
            return _launch_command(arguments[1:])
        if arguments[:1] == ["node"]:
            return _node(arguments[1:])
        parsed = _parser().parse_args(arguments)
        return parsed.run(parsed)
    except ValueError as error:
        return _fail(str(error))
    except BrokenPipeError:
        # Whoever read our output has gone; the interpreter must not try to flush it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}")
    except KeyboardInterrupt:
        sys.stderr.write("counterflow: interrupted\n")
        return 130


def _parser() -> _Parser:
    # Here, where `main` answers an interrupt.
    from .convert_options import add_arguments as add_convert_arguments
    from .doctor_options import add_arguments as add_doctor_arguments
    from .plan_options import add_arguments as add_plan_arguments
    from .profile_options import add_arguments as add_profile_arguments
    from .simulate_options import add_arguments as add_simulate_arguments
    from .traffic_options import add_arguments as add_traffic_arguments

    parser = _Parser(
        prog="counterflow",
        description="Train DeepSeek-V3-style mixture-of-experts models, computation and "
        "communication flowing against each other.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"counterflow {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="train a model", usage=_TRAIN_USAGE)
    train.set_defaults(run=None)  # for the list of commands; `main` parses its arguments
    for name, doc in (
        ("launch", "start a run on this machine, or as a job of Slurm"),
        ("node", "start the ranks of one node of a Slurm job"),
    ):
        commands.add_parser(name, help=doc).set_defaults(run=None)

    simulate = commands.add_parser(
        "simulate", help="what a pipeline schedule costs, on any machine", allow_abbrev=False
    )
    add_simulate_arguments(simulate)
    simulate.set_defaults(run=_simulate)

    plan = commands.add_parser(
        "plan",
        help="how long a step will take, whether it fits, and which layout is best",
        description="Predicts a training step from a model, a cluster and what is known of its "
        "speed, and searches the best layout (docs/predict.md).",
        allow_abbrev=False,
    )
    add_plan_arguments(plan)
    plan.set_defaults(run=_plan)

    profile = commands.add_parser(
        "profile",
        help="how much communication a trace shows exposed, where and why",
        description="Reads traces of PyTorch's profiler and tells how much communication was "
        "exposed, in which phase and why (docs/profile.md).",
        allow_abbrev=False,
    )
    add_profile_arguments(profile)
    profile.set_defaults(run=_profile)

    traffic = commands.add_parser(
        "traffic", help="which rank sends how much to which, for a routing", allow_abbrev=False
    )
    add_traffic_arguments(traffic)
    traffic.set_defaults(run=_traffic)

    doctor = commands.add_parser(
        "doctor",
        help="what this machine has, and where the ranks of a launch are",
        description="Tells what this machine has. Under torchrun, mpirun or srun rank 0 also tells "
        "where every rank is, and what does not fit. Exit status 76 where a node is unfit.",
        allow_abbrev=False,
    )
    add_doctor_arguments(doctor)
    doctor.set_defaults(run=_doctor)

    convert = commands.add_parser(
        "convert",
        help="checkpoints into Hugging Face's layout and back; what one holds",
        allow_abbrev=False,
    )
    add_convert_arguments(convert)
    convert.set_defaults(run=_convert)

    report = commands.add_parser("report", help="write the report of a run again")
    report.add_argument("folder", metavar="runs/NAME")
    report.set_defaults(run=_report)
    return parser


def _train(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(_train_help())
        return 0
    path, overrides = split_arguments(arguments)
    from .config import load
    from .slurm.started import place_variables

    os.environ.update(place_variables())  # where srun or mpirun started this rank itself
    if "RANK" not in os.environ:
        return _launch(load(path, overrides))
    from .rank import run_rank

    return run_rank(load(path, overrides))


def split_arguments(arguments: Sequence[str]) -> tuple[str | None, list[tuple[str, str]]]:
    """The configuration file, if any, and the (key, text) pairs of `train`'s arguments.

    Raises:
        UsageError: a flag without a value, or a second file.
    """
    path: str | None = None
    pairs: list[tuple[str, str]] = []
    rest = iter(arguments)
    for argument in rest:
        if argument.startswith("--") and len(argument) > 2:
            key, equals, text = argument[2:].partition("=")
            if not equals:
                value = next(rest, None)
                if value is None or value.startswith("--"):
                    raise UsageError(f"--{key} needs a value: --{key} VALUE")
                text = value
            pairs.append((_SHORT.get(key, key), text))
        elif argument.startswith("-"):
            raise UsageError(f"unknown argument {argument}; usage: {_TRAIN_USAGE}")
        elif path is not None:
            raise UsageError(f"one configuration file at most, got {path} and {argument}")
        else:
            path = argument
    return path, pairs


def _launch(config: Config) -> int:
    """Check everything, then start the ranks with torchrun."""
    from .check import check
    from .resume import require_resumable
    from .start import start_here

    check(config)
    require_resumable(config)
    return start_here(config)


def _train_help() -> str:
    from .config import rows

    lines = [
        f"usage: {_TRAIN_USAGE}",
        "",
        "Trains a model; results lie in runs/NAME. Without torchrun's environment it starts",
        "torchrun itself. Keys of the file and of the command line, with their defaults:",
    ]
    section = ""
    for row in rows():
        if row.key.partition(".")[0] != section:
            section = row.key.partition(".")[0]
            lines += ["", f"[{section}]"]
        lines.append(f"  --{row.key} = {row.default}" if row.default else f"  --{row.key}")
        lines.append(f"      {row.type}: {row.doc}")
    return "\n".join(lines)


def _launch_command(arguments: list[str]) -> int:
    from .slurm.command import run

    return run(arguments)


def _node(arguments: list[str]) -> int:
    from .slurm.node import run

    return run(arguments)


def _simulate(parsed: argparse.Namespace) -> int:
    from .simulate_command import run

    return run(parsed)


def _plan(parsed: argparse.Namespace) -> int:
    from .plan_command import run

    return run(parsed)


def _profile(parsed: argparse.Namespace) -> int:
    from .profile_command import run

    return run(parsed)


def _traffic(parsed: argparse.Namespace) -> int:
    from .traffic_command import run

    return run(parsed)


def _doctor(parsed: argparse.Namespace) -> int:
    from .doctor import run

    return run(parsed)


def _convert(parsed: argparse.Namespace) -> int:
    from .convert_command import run

    return run(parsed)


def _report(parsed: argparse.Namespace) -> int:
    from .report import write_report

    print(write_report(parsed.folder))
    return 0


def _fail(message: str) -> int:
    # One write, so that the lines of several ranks do not run into each other.
    sys.stderr.write(f"counterflow: error: {message}\n")
    return 2
