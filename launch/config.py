"""The configuration of a training run: one frozen dataclass a section, each guarding itself.

The defaults are the run that `make train` makes, so there is no configuration file to keep in step
with them: `counterflow train` without a file is that run, and a file or a `--dotted.key VALUE` says
only what differs. What one section alone cannot know (does the schedule exist for so many ranks, do
the experts divide over the mesh) is checked by `check.check` before any process starts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from ..comm.dispatch.names import DispatcherName, PayloadName
from ..model import ModelConfig
from ..parallel.mesh import MeshShape
from ..parallel.schedule import names
from .checkpoint.section import CheckpointConfig
from .fp8_config import FP8Config, RecomputeConfig
from .guards import require, require_choice
from .life.section import GuardConfig
from .metrics_config import MetricsConfig
from .overlap_config import OverlapConfig
from .preflight.section import PreflightConfig
from .recording_config import ProfileConfig
from .settings import (
    ConfigError,
    Given,
    Row,
    apply,
    describe,
    merge,
    option,
    read_overrides,
    read_toml,
)
from .zero_config import ZeroConfig

Device = Literal["auto", "cpu", "cuda"]
DataKind = Literal["stdlib", "text", "tokens"]
DType = Literal["float32", "float64", "bfloat16"]
Moments = Literal["float32", "bfloat16"]

_HF = "model.hf"  # not a field of ModelConfig: where its fields are read from


@dataclass(frozen=True)
class RunConfig:
    """How a run is started and where it leaves its results."""

    name: str = option("small", "name of the run; its results lie in FOLDER/NAME")
    folder: str = option("runs", "folder that holds the runs")
    seed: int = option(0, "seed of the order of the data (of the weights: model.init_seed)")
    nproc: int = option(0, "processes to start on this machine, 0 for as many as the mesh has")
    port: int = option(0, "port at which the processes meet, 0 for any free one")
    device: Device = option(  # noqa: RUF009  a Literal is immutable
        "auto", "where to compute; auto is cuda if every process on this machine can have a GPU"
    )
    timeout_s: float = option(300.0, "limit of every wait for another rank, seconds")
    max_restarts: int = option(
        0, "times that all ranks are started again, from the last checkpoint, after one was lost"
    )
    logs: bool = option(
        False,
        "each rank's output goes to FOLDER/NAME/logs (rank00000.log and so on) too, after what is "
        "there",
    )

    def __post_init__(self) -> None:
        if not self.name or self.name in (".", "..") or "/" in self.name or "\0" in self.name:
            raise ValueError(f"run.name must be a plain folder name, got {self.name!r}")
        if not self.folder:
            raise ValueError("run.folder must not be empty; '.' is the current folder")
        require("run.seed", self.seed, self.seed >= 0, "0 or more")
        require("run.nproc", self.nproc, self.nproc >= 0, "0 (as the mesh has) or more")
        require("run.port", self.port, 0 <= self.port < 65536, "0 (any) to 65535")
        require_choice("run.device", self.device, Device)
        require("run.timeout_s", self.timeout_s, 0 < self.timeout_s < math.inf, "above 0")
        require("run.max_restarts", self.max_restarts, self.max_restarts >= 0, "0 or more")

    @property
    def path(self) -> Path:
        """The folder of this run's results."""
        return Path(self.folder) / self.name


@dataclass(frozen=True)
class ScheduleConfig:
    """The pipeline schedule of a step."""

    name: str = option("dualpipe", "name of a schedule, or the path of a schedule file")
    microbatches: int = option(4, "micro-batches a step and data-parallel rank")
    stages_per_rank: int | None = option(
        None, "stages that each rank holds, of interleaved; none: the schedule's own number"
    )
    layers: tuple[int, ...] | None = option(
        None,
        "decoder layers of each stage, first to last; none: as even as the stages' costs allow",
    )

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("schedule.name must not be empty")
        require("schedule.microbatches", self.microbatches, self.microbatches >= 1, "1 or more")
        stages = self.stages_per_rank
        require("schedule.stages_per_rank", stages, stages is None or stages >= 1, "1 or more")
        layers = self.layers
        known = layers is None or (len(layers) > 0 and min(layers) >= 1)
        require("schedule.layers", layers, known, "none, or 1 or more for each stage")


@dataclass(frozen=True)
class DispatchConfig:
    """How tokens get to their experts and back, where mesh.ep is above 1."""

    backend: DispatcherName = option(  # noqa: RUF009
        "auto",
        "flat: a row for each of a token's experts; dedup: one for each rank; two_hop: one for "
        "each node, and from there to its ranks; deep_ep: DeepEP's kernels; auto: by the topology",
    )
    payload: Literal["auto", PayloadName] = option(
        "auto",
        "exact: rows travel in train.dtype; bf16; fp8: to the experts in E4M3 with scales of 1x128 "
        "tiles, back in bf16; logfmt8: LogFMT-8 instead of E4M3; logfmt10: LogFMT-10 both ways; "
        "auto: fp8 where fp8.enabled (bf16 with fp8.gradient_format e5m2, since gradients travel "
        "too and would be rounded to E4M3 first), else exact",
    )
    chunks: int = option(4, "pieces of a micro-batch that two_hop has on their way at once")
    node_limit: int | None = option(
        None,
        "most nodes that a token may reach; none: model.topk_group where the router has groups; "
        "0: any number",
    )
    num_sms: int | None = option(
        None,
        "most of a GPU's SMs that dispatch and combine take, so that the rest computes beside them "
        "(DeepSeek-V3: 20), of DeepEP and of NCCL; none: what the library takes by itself",
    )

    def __post_init__(self) -> None:
        require_choice("dispatch.backend", self.backend, DispatcherName)
        require_choice("dispatch.payload", self.payload, Literal["auto", PayloadName])
        if self.backend == "deep_ep" and self.payload in ("logfmt8", "logfmt10"):
            raise ValueError(
                f"dispatch.backend=deep_ep carries BF16 and FP8, not dispatch.payload="
                f"{self.payload}; set the payload to fp8 or bf16, or the backend to two_hop"
            )
        require("dispatch.chunks", self.chunks, self.chunks >= 1, "1 or more")
        limit = self.node_limit
        require("dispatch.node_limit", limit, limit is None or limit >= 0, "0 or more")
        num_sms = self.num_sms
        require("dispatch.num_sms", num_sms, num_sms is None or num_sms >= 1, "1 or more, or none")


@dataclass(frozen=True)
class DataConfig:
    """What is trained on."""

    kind: DataKind = option(  # noqa: RUF009
        "stdlib",
        "stdlib: the source text of Python's standard library; text: a text file or a folder of "
        "them; tokens: a token file with its .idx",
    )
    path: str = option("", "the file or folder, for kinds text and tokens")
    sequence_length: int = option(128, "tokens of a training sequence")
    validation_fraction: float = option(0.1, "share of the corpus held out, by whole documents")

    def __post_init__(self) -> None:
        require_choice("data.kind", self.kind, DataKind)
        if self.kind == "stdlib" and self.path:
            raise ValueError(
                f'data.path is {self.path!r}, but data.kind "stdlib" reads no path; '
                'set data.kind to "text" or "tokens"'
            )
        if self.kind != "stdlib" and not self.path:
            raise ValueError(f'data.kind "{self.kind}" needs data.path')
        require(
            "data.sequence_length", self.sequence_length, self.sequence_length >= 1, "1 or more"
        )
        require(
            "data.validation_fraction",
            self.validation_fraction,
            0 < self.validation_fraction < 1,
            "between 0 and 1",
        )


@dataclass(frozen=True)
class TrainConfig:
    """The optimisation. Shapes of the ramps are in `ramps`."""

    steps: int = option(300, "optimizer steps")
    sequences: int = option(2, "sequences of a micro-batch")
    lr: float = option(3e-3, "peak learning rate")
    lr_min: float = option(3e-4, "learning rate at the end of the cosine and after it")
    lr_final: float = option(1e-4, "learning rate of the last final_steps steps")
    warmup_steps: int = option(20, "steps of linear warm-up from 0 to lr")
    constant_steps: int = option(120, "steps at lr after the warm-up")
    cosine_steps: int | None = option(
        None, "steps of cosine decay from lr to lr_min; none: all steps up to the final ones"
    )
    final_steps: int = option(0, "steps at lr_final at the end of the run")
    betas: tuple[float, float] = option((0.9, 0.95), "AdamW's decay of its two moments")
    eps: float = option(1e-8, "AdamW's epsilon")
    weight_decay: float = option(0.1, "AdamW's weight decay, of matrices only")
    grad_clip: float = option(1.0, "limit of the global gradient norm, 0 for none")
    dtype: DType = option(  # noqa: RUF009
        "float32",
        "of parameters and activations; bfloat16 keeps float32 master weights and gradients",
    )
    moments: Literal["auto", Moments] = option(
        "auto",
        "in what AdamW keeps its two moments, which it computes with in float32 (float64 where "
        "train.dtype is); bfloat16 halves them, as DeepSeek-V3; auto: bfloat16 where fp8.enabled, "
        "else float32",
    )
    ema_decay: float | None = option(
        None,
        "decay of a moving average of the parameters, kept in CPU memory beside the training and "
        "validated at the end (ema_validation_loss); the initial values have no share in it; "
        "none: no average",
    )
    ramp_start: int = option(0, "micro-batches of the first step, 0 for no batch-size ramp")
    ramp_steps: int = option(0, "steps until the batch has its full size")
    mtp_weight: float = option(0.3, "weight of the multi-token-prediction loss at first")
    mtp_weight_later: float = option(0.1, "its weight after mtp_switch_step steps")
    mtp_switch_step: int | None = option(
        None, "steps before the switch; none: 10/14.8 of the steps, as DeepSeek-V3"
    )
    bias_update_speed: float = option(
        5e-3, "change of a router bias a step (V3: 0.001, over many more steps)"
    )
    bias_stop_step: int | None = option(
        None, "steps after which biases stay; none: 14.3/14.8 of the steps, as DeepSeek-V3"
    )
    eval_every: int = option(100, "steps between evaluations, 0 for only one at the end")
    eval_batches: int = option(8, "batches of an evaluation, each of a full step's size")
    log_every: int = option(10, "steps between lines of progress where there is no terminal")

    def __post_init__(self) -> None:
        for name in ("steps", "sequences", "eval_batches", "log_every"):
            value = getattr(self, name)
            require(f"train.{name}", value, value >= 1, "1 or more")
        for name in (
            *("warmup_steps", "constant_steps", "cosine_steps", "final_steps"),
            *("ramp_start", "ramp_steps", "mtp_switch_step", "bias_stop_step", "eval_every"),
        ):
            value = getattr(self, name)
            require(f"train.{name}", value, value is None or value >= 0, "0 or more")
        for name in (
            *("lr", "lr_min", "lr_final", "weight_decay", "grad_clip", "eps"),
            *("mtp_weight", "mtp_weight_later", "bias_update_speed"),
        ):
            value = getattr(self, name)
            require(f"train.{name}", value, 0 <= value < math.inf, "0 or more and finite")
        for beta in self.betas:
            require("train.betas", self.betas, 0 <= beta < 1, "from 0 to below 1, both")
        require_choice("train.dtype", self.dtype, DType)
        require_choice("train.moments", self.moments, Literal["auto", Moments])
        decay = self.ema_decay
        require(
            "train.ema_decay", decay, decay is None or 0 < decay < 1, "above 0 and below 1, or none"
        )
        if self.lr_min > self.lr:
            raise ValueError(f"train.lr_min={self.lr_min} must not be above train.lr={self.lr}")
        phases = self.warmup_steps + self.final_steps
        if phases > self.steps:
            raise ValueError(
                f"train.warmup_steps={self.warmup_steps} and train.final_steps={self.final_steps} "
                f"do not fit in train.steps={self.steps}"
            )
        if bool(self.ramp_start) != bool(self.ramp_steps):
            raise ValueError(
                f"train.ramp_start={self.ramp_start} and train.ramp_steps={self.ramp_steps}: a "
                "batch-size ramp needs both, a constant batch size neither"
            )


def small_model() -> ModelConfig:
    """The model of the default run: every part of DeepSeek-V3, small; bytes as tokens."""
    return ModelConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=352,
        moe_intermediate_size=96,
        num_hidden_layers=4,
        first_k_dense_replace=1,
        num_attention_heads=4,
        q_lora_rank=64,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=1.0,
        max_position_embeddings=128,
        initializer_range=0.02,
    )


@dataclass(frozen=True)
class Config:
    """A whole training run."""

    run: RunConfig = field(default_factory=RunConfig)
    mesh: MeshShape = field(default_factory=lambda: MeshShape(pp=2, dp=2, ep=2))
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    model: ModelConfig = field(default_factory=small_model)
    dispatch: DispatchConfig = field(default_factory=DispatchConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    fp8: FP8Config = field(default_factory=FP8Config)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    overlap: OverlapConfig = field(default_factory=OverlapConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    preflight: PreflightConfig = field(default_factory=PreflightConfig)

    def __post_init__(self) -> None:
        if self.moments == "bfloat16":
            from ..fp8.adamw import require_betas

            try:
                require_betas(self.train.betas)
            except ValueError as error:
                of_recipe = " (auto, with fp8.enabled)" if self.train.moments == "auto" else ""
                raise ValueError(f"train.moments{of_recipe} and train.betas: {error}") from None

    @property
    def payload(self) -> PayloadName:
        """dispatch.payload, decided."""
        given = self.dispatch.payload
        if given != "auto":
            return given
        if not self.fp8.enabled:
            return "exact"
        return "fp8" if self.fp8.gradient_format == "e4m3" else "bf16"

    @property
    def moments(self) -> Moments:
        """train.moments, decided."""
        given = self.train.moments
        if given == "auto":
            return "bfloat16" if self.fp8.enabled else "float32"
        return given

    @property
    def global_batch(self) -> int:
        """Sequences of a full step over all ranks."""
        return self.train.sequences * self.schedule.microbatches * self.mesh.dp


def load(path: str | Path | None = None, overrides: Iterable[tuple[str, str]] = ()) -> Config:
    """The configuration that a file and overrides make out of the defaults.

    Args:
        path: a TOML file; None for the defaults alone.
        overrides: (dotted key, text) pairs, laid over the file.

    `model.hf` names a Hugging Face config.json (relative to the working directory) whose model
    takes the place of the default one; other keys of [model] change it further.

    Raises:
        ConfigError: one line that names the file or flag, the key, and what to do.
    """
    given = merge(read_toml(path) if path is not None else {}, read_overrides(overrides))
    default = Config()
    hf = given.pop(_HF, None)
    if hf is not None:
        default = replace(default, model=_hugging_face(hf))
    return apply(default, given)


def with_absolute_paths(config: Config) -> Config:
    """The same run, its files found from whatever directory it is started in."""
    schedule, data = config.schedule, config.data
    checkpoint, preflight = config.checkpoint, config.preflight
    if schedule.name not in names() and Path(schedule.name).exists():
        schedule = replace(schedule, name=str(Path(schedule.name).absolute()))
    if data.path:
        data = replace(data, path=str(Path(data.path).absolute()))
    if checkpoint.weights:
        weights = str(Path(checkpoint.weights).absolute())
        checkpoint = replace(checkpoint, weights=weights)
    if preflight.baseline:
        preflight = replace(preflight, baseline=str(Path(preflight.baseline).absolute()))
    return replace(config, schedule=schedule, data=data, checkpoint=checkpoint, preflight=preflight)


def rows() -> list[Row]:
    """Every key with its type, default and meaning."""
    found = describe(Config())
    first = next(i for i, row in enumerate(found) if row.key.startswith("model."))
    row = Row(_HF, "a text", '""', "a Hugging Face config.json to take the model from")
    return [*found[:first], row, *found[first:]]


def _hugging_face(given: Given) -> ModelConfig:
    if not isinstance(given.value, str):
        raise ConfigError(f"{given.source}: {_HF} must be the path of a config.json")
    try:
        return ModelConfig.from_hf(given.value)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(f"{given.source}: {_HF} {given.value!r}: {reason}") from None
