"""Checks of a whole configuration, made before any process starts."""

from __future__ import annotations

from pathlib import Path

from ..model import partition
from ..parallel.schedule import Schedule
from .config import Config
from .data import Corpus, open_corpus
from .metrics_wandb import require_wandb
from .overlap import check_overlap
from .ramps import microbatches
from .schedules import find_schedule
from .settings import ConfigError
from .tokens import require_ids


def check(config: Config) -> None:
    """Raise unless the sections of `config` fit each other and its data is there and sound.

    Raises:
        ValueError: one line that says what does not fit, and what would.
    """
    check_sizes(config)
    if config.metrics.wandb:
        require_wandb()
    _check_weights(config)
    _check_backend(config)
    _check_sms(config)
    open_data(config)
    if config.data.kind == "tokens":
        require_ids(config.data.path)


def check_sizes(config: Config) -> None:
    """The part of `check` that reads no data.

    Raises:
        ValueError: as `check`.
    """
    mesh, model = config.mesh, config.model
    if config.run.nproc:
        mesh.require_world_size(config.run.nproc)
    mesh.require_experts(model.n_routed_experts)
    if config.fp8.enabled and config.train.dtype == "float64":
        raise ConfigError(
            "fp8.enabled with train.dtype=float64: layers in FP8 take and give bfloat16 or "
            "float32; set train.dtype to bfloat16 (as DeepSeek-V3) or float32"
        )
    _check_deep_ep(config)
    _check_deepspeed(config)
    schedules = step_schedules(config)
    stages = schedules[config.schedule.microbatches].num_stages
    try:
        partition(model, stages, config.schedule.layers)
    except ValueError as error:
        raise ConfigError(
            f"schedule.name={config.schedule.name} on mesh.pp={mesh.pp} ranks: {error}"
        ) from None
    check_overlap(config, schedules.values())
    _check_profile(config)
    _check_guard(config)
    if config.data.sequence_length > model.max_position_embeddings:
        raise ConfigError(
            f"data.sequence_length={config.data.sequence_length} is more than "
            f"model.max_position_embeddings={model.max_position_embeddings}; change one of them"
        )
    if config.data.sequence_length <= model.num_nextn_predict_layers:
        raise ConfigError(
            f"data.sequence_length={config.data.sequence_length} leaves nothing to predict at "
            f"model.num_nextn_predict_layers={model.num_nextn_predict_layers}"
        )


def _check_weights(config: Config) -> None:
    """Raise if the weights to begin with are not there."""
    path = Path(config.checkpoint.weights)
    if config.checkpoint.weights and not path.is_dir():
        raise ConfigError(
            f"checkpoint.weights={config.checkpoint.weights!r}: no such folder; give runs/NAME of "
            "a run that has saved one, the folder of a checkpoint, or a Hugging Face folder"
        )


def _check_deep_ep(config: Config) -> None:
    """Raise if DeepEP is asked for by name and these sections rule it out on any machine."""
    if config.dispatch.backend != "deep_ep":
        return
    if config.mesh.ep == 1:
        raise ConfigError(
            "dispatch.backend=deep_ep with mesh.ep=1: there is nobody to exchange tokens with; "
            "raise mesh.ep or set dispatch.backend to auto"
        )
    if config.run.device == "cpu":
        raise ConfigError(
            "dispatch.backend=deep_ep with run.device=cpu: its kernels run on GPUs; set "
            "dispatch.backend to auto"
        )
    if config.payload == "exact" and config.train.dtype != "bfloat16":
        raise ConfigError(
            f"dispatch.backend=deep_ep moves bfloat16, and train.dtype={config.train.dtype} would "
            "be rounded, which dispatch.payload=exact does not allow; set the payload to bf16 or "
            "fp8"
        )


def _check_deepspeed(config: Config) -> None:
    """Raise if DeepSpeed's ZeRO-1 is asked for where it has nothing to share out, or cannot."""
    if config.zero.backend != "deepspeed":
        return
    mesh = config.mesh
    if config.zero.stage == 0 or mesh.dp == 1:
        raise ConfigError(
            f"zero.backend=deepspeed with zero.stage={config.zero.stage} and mesh.dp={mesh.dp}: "
            "there is nothing to share out; set zero.stage to 1 and mesh.dp to 2 or more, or "
            "zero.backend to counterflow"
        )
    if mesh.ep > 1:
        raise ConfigError(
            f"zero.backend=deepspeed with mesh.ep={mesh.ep}: it does not know experts that are "
            "spread over ranks; set zero.backend to counterflow, or mesh.ep to 1"
        )


def _check_guard(config: Config) -> None:
    """Raise if the loss is to lead back to checkpoints that there will not be."""
    guard, checkpoint = config.guard, config.checkpoint
    if "rollback" in (guard.on_nan, guard.on_spike) and not (
        checkpoint.enabled and checkpoint.every
    ):
        raise ConfigError(
            "guard.on_nan or guard.on_spike is rollback, but checkpoint.enabled is false or "
            "checkpoint.every is 0: there would be no checkpoint to go back to; save some, or "
            "take skip or stop"
        )


def _check_profile(config: Config) -> None:
    """Raise if a step or a rank is to be recorded that this run does not have."""
    profile, steps, world = config.profile, config.train.steps, config.mesh.world_size
    if profile.stretches and profile.stretches[-1].last > steps:
        raise ConfigError(
            f"profile.steps={profile.steps}: the run has train.steps={steps}; name steps from 1 to "
            f"{steps}, or raise train.steps"
        )
    if profile.recording is not None and profile.recording[-1].last >= world:
        raise ConfigError(
            f"profile.ranks={profile.ranks}: the mesh has {world} ranks; name ranks from 0 to "
            f"{world - 1}, or all"
        )


def _check_sms(config: Config) -> None:
    """Raise if a number of SMs is given where nothing could heed it."""
    given = config.dispatch.num_sms
    if given is None:
        return
    if config.mesh.ep == 1:
        raise ConfigError(
            f"dispatch.num_sms={given} with mesh.ep=1: there is nobody to exchange tokens with; "
            "raise mesh.ep or leave dispatch.num_sms out"
        )
    from .torchrun import choose_device

    processes = config.run.nproc or config.mesh.world_size
    if choose_device(config.run.device, processes) == "cpu":
        raise ConfigError(
            f"dispatch.num_sms={given} on the CPU: only DeepEP and NCCL, on GPUs, can be kept to "
            "some SMs; leave it out, or set run.device to cuda"
        )


def _check_backend(config: Config) -> None:
    """Raise unless the backend of FP8 that is asked for by name can serve on this machine."""
    if not config.fp8.enabled or config.fp8.backend == "auto":
        return
    import torch

    from .fp8 import require_backend
    from .torchrun import choose_device

    processes = config.run.nproc or config.mesh.world_size
    require_backend(config, torch.device(choose_device(config.run.device, processes)))


def step_schedules(config: Config) -> dict[int, Schedule]:
    """The schedule of every number of micro-batches that a step of this run has.

    Raises:
        ValueError: the schedule does not exist for one of them.
    """

    def find(count: int) -> Schedule:
        return find_schedule(
            config.schedule.name,
            ranks=config.mesh.pp,
            microbatches=count,
            stages_per_rank=config.schedule.stages_per_rank,
        )

    full = config.schedule.microbatches
    found = {full: find(full)}
    if config.train.ramp_start > full:
        raise ConfigError(
            f"train.ramp_start={config.train.ramp_start} is above schedule.microbatches={full}; "
            "the batch-size ramp only rises"
        )
    multiple = len(found[full].placement.routes)
    for index in range(min(config.train.ramp_steps, config.train.steps)):
        count = microbatches(index, config.train, config.schedule, multiple)
        if count not in found:
            try:
                found[count] = find(count)
            except ValueError as error:
                raise ConfigError(
                    f"train.ramp_start={config.train.ramp_start}: at step {index + 1} the "
                    f"batch-size ramp has {count} micro-batches: {error}"
                ) from None
    return found


def open_data(config: Config) -> Corpus:
    """The corpus of a run, which fits the model and has a sequence in each of its parts.

    Raises:
        ValueError: the data is missing, unusable, too little, or of a larger vocabulary.
    """
    data = config.data
    corpus = open_corpus(data.kind, data.path, data.validation_fraction)
    if corpus.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"{corpus.name} has token ids up to {corpus.vocab_size - 1}, model.vocab_size="
            f"{config.model.vocab_size} is too small; set it to at least {corpus.vocab_size}"
        )
    for part, stream in (("train on", corpus.train), ("hold out", corpus.validation)):
        if not stream.num_sequences(data.sequence_length):
            raise ConfigError(
                f"{corpus.name}: {len(stream)} tokens to {part} are too few for one sequence of "
                f"data.sequence_length={data.sequence_length}; give more text or change "
                "data.sequence_length or data.validation_fraction"
            )
    return corpus
