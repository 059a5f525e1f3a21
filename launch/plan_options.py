"""What `counterflow plan` is asked for, checked before anything is read or predicted."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .outputs import Output, check_outputs
from .plan_sizes import BATCH, GPUS, SEQUENCES_A_GPU, batch_of, check_mesh, known_gpus

if TYPE_CHECKING:
    from ..predict.cluster import Cluster
    from ..predict.layout import Layout

TOML_HEADER = "# Written by `counterflow plan`"
_TOP = 10
_SUFFIXES = {"--html": (".html",), "--toml": (".toml",), "--simulated": (".json",)}
_NUMBERS = {  # flags of whole numbers that fix a field of the layout
    "pp": "pipeline ranks",
    "dp": "data-parallel ranks of each",
    "ep": "ranks that share a set of experts",
    "microbatches": "micro-batches a step and data-parallel rank",
    "sequences": "sequences of a micro-batch",
    "stages_per_rank": "stages a rank, of interleaved",
    "comm_sms": "SMs that dispatch and combine keep; 0: none that computation misses",
    "zero": "1 shares the optimizer's states out, 0 has them on every rank",
}
_FROM_ZERO = ("comm_sms", "zero")
_SWITCHES = {
    "fp8": "linear layers compute in FP8",
    "recompute_norms": "norms are made again in the backward",
    "recompute_up_projections": "attention's up-projections are made again in the backward",
    "ema": "a moving average of the parameters in the host's memory",
    "overlap": "phases run on two lanes",
}
_CHOICES: dict[str, tuple[tuple[str, ...], str]] = {
    "dtype": (("bfloat16", "float32", "float64"), "of parameters and activations"),
    "dispatcher": (("flat", "dedup", "two_hop", "deep_ep"), "how tokens get to their experts"),
    "payload": (("exact", "bf16", "fp8", "logfmt8", "logfmt10"), "in what they travel"),
    "moments": (("bfloat16", "float32"), "of AdamW"),
}
_FIXABLE = (*_NUMBERS, "schedule", "layers", *_CHOICES, *_SWITCHES)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add = parser.add_argument
    add("--model", metavar="config.json", help="the model (DeepSeek-V3)")
    add("--cluster", metavar="NAME|FILE.toml", help="h800, h100, h200 or a file (h800)")
    add("--gpus", metavar="N", help=f"how many (pp x dp, or the cluster's, or {GPUS})")
    add("--config", metavar="run.toml", help="predict this run of `counterflow train`, as it is")
    add("--trace", metavar="TRACE", help="take times of phases from a trace of overlapped pairs")
    add("--trace-config", metavar="run.toml", help="of the run that recorded it (DeepSeek-V3's)")
    add("--measured", metavar="FILE.json", help="take speeds from `doctor --measure`")
    usual = f"{SEQUENCES_A_GPU} a GPU; {BATCH} on {GPUS}"
    add("--batch", metavar="SEQUENCES", help=f"of a step ({usual})")
    add("--length", metavar="TOKENS", help="of a sequence (4096)")
    add("--routing", metavar="HOW", help="balanced, even, skewed=S, or a file of loads")
    add("--jitter", metavar="SHARE", help="by which times of phases vary, such as 0.02")
    add("--stragglers", metavar="RANK:SLOWER", help="ranks that are slower, such as 7:1.2,19:1.1")
    add("--seed", metavar="N", help="of what is drawn (0)")
    add("--no-search", action="store_true", help="predict the layout that is given, alone")
    add("--top", metavar="N", help=f"layouts shown ({_TOP})")
    add("--json", action="store_true", help="print one JSON object")
    add("--html", metavar="FILE", help="write a page: .html")
    add("--toml", metavar="FILE", help="write what `counterflow train` runs: .toml, new")
    add("--simulated", metavar="FILE", help="write the step, for `profile --against`: .json")
    fixed = parser.add_argument_group("the layout", "what is given here is not searched")
    fixed.add_argument("--schedule", metavar="NAME", help="of the pipeline")
    fixed.add_argument("--layers", metavar="4/4/3", help="decoder layers of each stage")
    for name, doc in _NUMBERS.items():
        fixed.add_argument(_flag(name), metavar="N", help=doc)
    for name, (choices, doc) in _CHOICES.items():
        fixed.add_argument(_flag(name), metavar="|".join(choices), help=doc)
    for name, doc in _SWITCHES.items():
        fixed.add_argument(_flag(name), metavar="on|off", help=doc)


@dataclass(frozen=True)
class PlanOptions:
    """What the command is asked for.

    Attributes:
        model: a config.json; None: DeepSeek-V3.
        cluster: name of a preset, or a file; None: the measured machine, or h800.
        gpus: how many; None: not told, or told by the mesh of `config`.
        config: the run that is predicted, or None.
        trace, measured: what speeds are taken from; both None: the data sheet.
        trace_config: of the run that recorded the trace; None: DeepSeek's published one.
        batch: sequences of a step; None: not told, or told by `config`.
        length: tokens of a sequence.
        routing: as the user wrote it; None: the default.
        jitter: share by which times vary; None: the default.
        stragglers: ranks, and by which factor each is slower.
        seed: of what is drawn.
        search: whether layouts are searched.
        fixed: fields of the layout that are given.
        top: layouts shown.
        json: whether asked for.
        outputs: files to write.
    """

    model: Path | None
    cluster: str | None
    gpus: int | None
    config: Path | None
    trace: Path | None
    trace_config: Path | None
    measured: Path | None
    batch: int | None
    length: int
    routing: str | None
    jitter: float | None
    stragglers: tuple[tuple[int, float], ...]
    seed: int
    search: bool
    fixed: Mapping[str, Any]
    top: int
    json: bool
    outputs: tuple[Output, ...]

    def on(self, cluster: Cluster) -> Sized:
        """What is asked for on a cluster, by which the defaults are decided.

        Raises:
            ValueError: the cluster has not as many GPUs, or what is given does not fit them.
        """
        gpus = known_gpus(self.gpus, self.fixed) or cluster.num_gpus or GPUS
        try:
            cluster.check_gpus(gpus)
        except ValueError as error:
            raise ValueError(f"--gpus: {error}") from None
        check_mesh(gpus, self.fixed)
        # Only a GPU has SMs that could be kept for communication.
        keeps = {} if cluster.gpu.num_sms else {"comm_sms": None}
        fixed = {**keeps, **self.fixed}
        return Sized(gpus, batch_of(self.batch, gpus, fixed), self.length, fixed)


@dataclass(frozen=True)
class Sized:
    """What is asked for of a layout, once the cluster is known.

    Attributes:
        gpus: how many.
        batch: sequences of a step.
        length: tokens of a sequence.
        fixed: fields of the layout that are given.
    """

    gpus: int
    batch: int
    length: int
    fixed: Mapping[str, Any]

    def layout(self) -> Layout:
        """The layout, with the defaults for the rest.

        Raises:
            ValueError: pp or ep is not given, or the batch does not divide.
        """
        from ..predict.layout import Layout

        for name in ("pp", "ep"):
            if name not in self.fixed:
                raise ValueError(f"--no-search needs {_flag(name)}: it predicts one layout")
        dp = self.gpus // self.fixed["pp"]
        sequences = self.fixed.get("sequences", 1)
        microbatches, rest = divmod(self.batch, dp * sequences)
        if rest or not microbatches:
            raise ValueError(
                f"--batch {self.batch} is no multiple of the {dp * sequences} sequences that {dp} "
                f"data-parallel ranks take in a micro-batch of {sequences}"
            )
        given = {"length": self.length, **self.fixed, "dp": dp, "sequences": sequences}
        return Layout(**{**given, "microbatches": microbatches})


def read_options(parsed: argparse.Namespace) -> PlanOptions:
    """The options that a command line gives.

    Raises:
        ValueError: one of them, or two together, make no sense.
    """
    outputs = _outputs(parsed)
    check_outputs(outputs, _inputs(parsed))
    _check_toml(parsed.toml)
    _check_writable(outputs)
    if parsed.trace is not None and parsed.measured is not None:
        raise ValueError("--trace and --measured: speeds are taken from one of them")
    if parsed.trace_config is not None and parsed.trace is None:
        raise ValueError("--trace-config goes with --trace: it says how the trace was recorded")
    fixed = _fixed(parsed)
    if parsed.config is not None:
        _check_config_alone(parsed, fixed)
    gpus = None if parsed.gpus is None else _whole("--gpus", parsed.gpus, 1)
    batch = None if parsed.batch is None else _whole("--batch", parsed.batch, 1)
    known = known_gpus(gpus, fixed)
    if known is not None:  # what the cluster does not decide is told before it is read
        check_mesh(known, fixed)
        batch_of(batch, known, fixed)
    return PlanOptions(
        model=_path("--model", parsed.model),
        cluster=_text("--cluster", parsed.cluster),
        gpus=gpus,
        config=_path("--config", parsed.config),
        trace=_path("--trace", parsed.trace),
        trace_config=_path("--trace-config", parsed.trace_config),
        measured=_path("--measured", parsed.measured),
        batch=batch,
        length=4096 if parsed.length is None else _whole("--length", parsed.length, 1),
        routing=_text("--routing", parsed.routing),
        jitter=None if parsed.jitter is None else _share("--jitter", parsed.jitter),
        stragglers=() if parsed.stragglers is None else _stragglers(parsed.stragglers),
        seed=0 if parsed.seed is None else _whole("--seed", parsed.seed, 0),
        search=not parsed.no_search and parsed.config is None,
        fixed=fixed,
        top=_TOP if parsed.top is None else _whole("--top", parsed.top, 1),
        json=parsed.json,
        outputs=tuple(outputs),
    )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _outputs(parsed: argparse.Namespace) -> list[Output]:
    given = {flag: getattr(parsed, flag[2:]) for flag in _SUFFIXES}
    for flag, text in given.items():
        if text in ("", "-"):
            raise ValueError(
                f"{flag} {text!r}: the name of a file is needed, ending in {_SUFFIXES[flag][0]}"
            )
    return [Output(f, Path(p), _SUFFIXES[f]) for f, p in given.items() if p is not None]


def _inputs(parsed: argparse.Namespace) -> dict[str, Path]:
    names = ("model", "config", "trace", "trace_config", "measured", "cluster", "routing")
    given = {_flag(name): getattr(parsed, name) for name in names}
    return {flag: Path(text) for flag, text in given.items() if text}


def _check_toml(path: str | None) -> None:
    """Raise ValueError where a file is there already: whoever has edited it must not lose it."""
    if path is not None and Path(path).exists():
        raise ValueError(
            f"--toml {path}: is there already, and a run's file is not written over; name another "
            "one, or remove it"
        )


def _check_writable(outputs: list[Output]) -> None:
    """Raise ValueError where no file can be made, whatever a folder's permissions say."""
    from tempfile import TemporaryFile

    for output in outputs:
        folder = output.path.resolve().parent
        try:
            TemporaryFile(dir=folder).close()
        except OSError as error:
            raise ValueError(
                f"{output.flag} {output.path}: no file can be made in {folder} "
                f"({error.strerror or error}); name one in another folder"
            ) from None


def _fixed(parsed: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in _FIXABLE:
        text = getattr(parsed, name)
        if text is None:
            continue
        if name in _NUMBERS:
            found[name] = _whole(_flag(name), text, 0 if name in _FROM_ZERO else 1)
        elif name in _CHOICES:
            found[name] = _choice(_flag(name), text, _CHOICES[name][0])
        elif name in _SWITCHES:
            found[name] = _choice(_flag(name), text, ("on", "off")) == "on"
        elif name == "layers":
            found[name] = tuple(_whole("--layers", part, 0) for part in text.split("/"))
        else:
            found[name] = _schedule(text)
    if found.get("zero", 0) > 1:
        raise ValueError(f"--zero must be 0 or 1, got {found['zero']}")
    if found.get("comm_sms") == 0:
        found["comm_sms"] = None
    return found


def _schedule(text: str) -> str:
    from ..parallel.schedule import names

    return _choice("--schedule", text, tuple(names()))


def _check_config_alone(parsed: argparse.Namespace, fixed: Mapping[str, Any]) -> None:
    flags = [_flag(name) for name in fixed]
    more = ("model", "gpus", "batch", "length", "toml")
    flags += [_flag(name) for name in more if getattr(parsed, name) is not None]
    if flags:
        raise ValueError(
            f"{flags[0]} and --config: the file says already what runs; change it there, or leave "
            "out --config"
        )


def _whole(flag: str, text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise ValueError(f"{flag} must be a whole number from {least} up, got {text!r}")
    return number


def _share(flag: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < 1:
        raise ValueError(f"{flag} must be a number from 0 to below 1, such as 0.02, got {text!r}")
    return number


def _stragglers(text: str) -> tuple[tuple[int, float], ...]:
    found: list[tuple[int, float]] = []
    for entry in text.split(","):
        rank, _, slower = entry.partition(":")
        try:
            found.append((int(rank), float(slower)))
        except ValueError:
            found.append((-1, math.nan))
        if found[-1][0] < 0 or not 0 < found[-1][1] < math.inf:
            raise ValueError(
                "--stragglers must be RANK:SLOWER, such as 7:1.2 for a rank 7 that takes 1.2 times "
                f"as long, got {entry!r}"
            )
    return tuple(found)


def _choice(flag: str, text: str, known: tuple[str, ...]) -> str:
    if text in known:
        return text
    import difflib  # takes a while, and is rarely needed

    near = difflib.get_close_matches(text, known, n=1)
    meant = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"{flag} must be one of {', '.join(known)}, got {text!r}{meant}")


def _text(flag: str, text: str | None) -> str | None:
    if text is not None and not text.strip():
        raise ValueError(f"{flag}: a name or a file is needed")
    return text


def _path(flag: str, text: str | None) -> Path | None:
    if text is None:
        return None
    if not text:
        raise ValueError(f"{flag}: the name of a file is needed")
    path = Path(text)
    if not path.exists():
        raise ValueError(f"{flag} {text}: there is no such file")
    return path
