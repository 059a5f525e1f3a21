"""What a plan is made from: the model, the cluster, what is known of its speed, and the routing."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .plan_options import PlanOptions

if TYPE_CHECKING:
    from ..model import ModelConfig
    from ..predict.calibration import Calibration
    from ..predict.cluster import Cluster
    from ..predict.jitter import Jitter
    from ..predict.layout import Layout
    from ..predict.routing import Routing
    from .config import Config

_KINDS = ("balanced", "even", "skewed")


class Inputs(NamedTuple):
    """What a plan is made from.

    Attributes:
        model, cluster, calibration: of the prediction.
        routing, jitter: what differs from rank to rank.
        config: of the run that is predicted; None: none was named.
        model_name: what the model is called.
    """

    model: ModelConfig
    cluster: Cluster
    calibration: Calibration
    routing: Routing
    jitter: Jitter
    config: Config | None
    model_name: str


def read_inputs(options: PlanOptions) -> Inputs:
    """All of it.

    Raises:
        ValueError: a file that cannot be read or lacks something, or no such cluster.
    """
    from ..predict.cluster import load_cluster
    from ..predict.jitter import Jitter
    from .config import load

    config = None if options.config is None else load(options.config)
    model, name = _model(options, config)
    share = options.jitter or 0.0
    jitter = Jitter(computation=share, exchange=share, stragglers=options.stragglers)
    if options.measured is not None:
        from ..predict.measured import read_measured

        calibration, machine = read_measured(options.measured)
        cluster = machine if options.cluster is None else load_cluster(options.cluster)
    else:
        cluster = load_cluster(options.cluster or "h800")
        calibration = _calibration(options, cluster)
    return Inputs(model, cluster, calibration, _routing(options.routing), jitter, config, name)


def _model(options: PlanOptions, config: Config | None) -> tuple[ModelConfig, str]:
    from ..model import ModelConfig

    if config is not None:
        return config.model, f"the model of {options.config}"
    if options.model is None:
        return ModelConfig(), "DeepSeek-V3"
    return ModelConfig.from_hf(options.model), str(options.model)


def _calibration(options: PlanOptions, cluster: Cluster) -> Calibration:
    from ..predict.calibration import Calibration

    if options.trace is not None:
        from ..predict.from_trace import from_trace

        return from_trace(_one_trace(options.trace), *_traced(options, cluster))
    return Calibration("datasheet", cluster.name)


def _one_trace(path: Path) -> Path:
    """The trace of one rank, the first, where a folder of them or a run's is named.

    Raises:
        ValueError: the folder holds none, or those of several stretches of steps.
    """
    from ..comm.profile.files import is_trace_file
    from .profile_folders import find_traces

    found, _ = find_traces(path)
    if not found.is_dir():
        return found
    traces = sorted(each for each in found.iterdir() if is_trace_file(each))
    if not traces:
        raise ValueError(f"--trace {path}: the folder holds no trace")
    return traces[0]


def _traced(options: PlanOptions, cluster: Cluster) -> tuple[ModelConfig, Layout, Cluster]:
    """What ran in the trace, how, and on what.

    DeepSeek published theirs (github.com/deepseek-ai/profile-data) with this much: a pair of four
    layers of V3 on H800s, 64 expert-parallel ranks, sequences of 4,096 tokens.
    """
    from ..model import ModelConfig
    from ..predict.cluster import load_cluster
    from ..predict.layout import Layout

    path = options.trace_config or _config_beside(options.trace)
    if path is None:
        return ModelConfig(), Layout(pp=16, dp=128, ep=64), load_cluster("h800")
    from .config import load
    from .plan_layout import layout_of

    config = load(path)
    return config.model, layout_of(config), cluster


def _config_beside(trace: Path | None) -> Path | None:
    """The configuration of the run in whose folder a trace lies."""
    assert trace is not None
    place = trace.resolve()
    for folder in (place, *place.parents[:3]):
        if (folder / "config.toml").is_file() and (folder / "metrics.jsonl").is_file():
            return folder / "config.toml"
    return None


def _routing(text: str | None) -> Routing:
    """What `--routing` says.

    Raises:
        ValueError: neither a kind of routing nor a file of loads.
    """
    from ..predict.routing import Routing

    if text is None:
        return Routing()
    kind, equals, spread = text.partition("=")
    if kind == "skewed" and equals:
        try:
            return Routing("skewed", float(spread))
        except ValueError as error:
            raise ValueError(f"--routing {text}: {error}") from None
    if text in ("balanced", "even"):
        return Routing(text)
    if Path(text).exists():  # a folder is a run's
        return Routing.measured(text)
    if not equals and (Path(text).suffix or Path(text).name != text):
        raise ValueError(f"--routing {text}: there is no such file")
    near = difflib.get_close_matches(kind, _KINDS, n=1)
    meant = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(
        f"--routing {text}: must be balanced, even, skewed=SPREAD such as skewed=0.3, or a file of "
        f"loads{meant}"
    )
