"""A layout as the trainer's configuration, and back: what is predicted is what can be run."""

from __future__ import annotations

from dataclasses import replace

from ..model import ModelConfig
from ..parallel.mesh import MeshShape
from ..predict.layout import Dispatcher, Layout
from .config import Config
from .fp8_config import RecomputeConfig
from .settings import ConfigError

# Of the parameters' moving average where a layout has one and no decay is given.
_EMA_DECAY = 0.999


def layout_of(config: Config) -> Layout:
    """How a run's model is spread over its ranks, and in which formats it computes.

    What an "auto" stands for is decided as the trainer does; a dispatcher that is left to the
    topology counts as "two_hop", or "flat" where each rank has all experts.
    """
    recompute, fp8 = config.recompute, config.fp8.enabled
    return Layout(
        pp=config.mesh.pp,
        dp=config.mesh.dp,
        ep=config.mesh.ep,
        schedule=config.schedule.name,
        microbatches=config.schedule.microbatches,
        sequences=config.train.sequences,
        length=config.data.sequence_length,
        stages_per_rank=config.schedule.stages_per_rank,
        layers=config.schedule.layers,
        dtype=config.train.dtype,
        fp8=fp8,
        e5m6=config.fp8.e5m6,
        dispatcher=_dispatcher(config),
        payload=config.payload,
        comm_sms=config.dispatch.num_sms,
        recompute_norms=fp8 if recompute.norms is None else recompute.norms,
        recompute_up_projections=(
            fp8 if recompute.up_projections is None else recompute.up_projections
        ),
        moments=config.moments,
        zero=config.zero.stage,
        ema=config.train.ema_decay is not None,
        overlap=config.overlap.enabled,
    )


def config_of(layout: Layout, model: ModelConfig, base: Config | None = None) -> Config:
    """The run of `model` by `layout`; `settings.to_toml` writes it for `counterflow train`.

    `layout_of` gives an equal layout back, but for a single expert-parallel rank: it exchanges
    nothing, so that its dispatcher is "flat" and no SMs are kept for it.

    Args:
        layout: how.
        model: what.
        base: what a layout does not say, such as the data and the learning rate; None: defaults.

    Raises:
        ConfigError: a layout that the trainer cannot run.
    """
    try:
        return _config(layout, model, Config() if base is None else base)
    except ValueError as error:
        raise ConfigError(f"this layout cannot be trained: {error}") from None


def _config(layout: Layout, model: ModelConfig, base: Config) -> Config:
    exchanges = layout.ep > 1
    sms = layout.comm_sms if exchanges else None
    decay = base.train.ema_decay
    if layout.ema and decay is None:
        decay = _EMA_DECAY
    # Only GPUs can keep SMs free or run DeepEP, so that a CPU is told at once.
    on_gpus = exchanges and (sms is not None or layout.dispatcher == "deep_ep")
    train = replace(
        base.train,
        sequences=layout.sequences,
        dtype=layout.dtype,
        moments=layout.moments,
        ema_decay=decay if layout.ema else None,
    )
    schedule = replace(
        base.schedule,
        name=layout.schedule,
        microbatches=layout.microbatches,
        stages_per_rank=layout.stages_per_rank,
        layers=layout.layers,
    )
    dispatch = replace(
        base.dispatch,
        backend=layout.dispatcher if exchanges else "flat",
        payload=layout.payload,
        num_sms=sms,
    )
    return replace(
        base,
        run=replace(base.run, nproc=0, device="cuda" if on_gpus else base.run.device),
        mesh=MeshShape(layout.pp, layout.dp, layout.ep),
        schedule=schedule,
        model=model,
        dispatch=dispatch,
        data=replace(base.data, sequence_length=layout.length),
        train=train,
        fp8=replace(base.fp8, enabled=layout.fp8, e5m6=layout.e5m6),
        recompute=RecomputeConfig(layout.recompute_norms, layout.recompute_up_projections),
        overlap=replace(base.overlap, enabled=layout.overlap),
        zero=replace(base.zero, stage=layout.zero),
    )


def _dispatcher(config: Config) -> Dispatcher:
    """The dispatcher that a run asks for, or is likely to be given."""
    if config.mesh.ep == 1:
        return "flat"
    named = config.dispatch.backend
    return "two_hop" if named == "auto" else named
