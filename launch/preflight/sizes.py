"""How large a run's parameters and their states are, from the model without values."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ...model import DeepSeekV3, partition
from ...model.experts import Experts
from ...parallel.schedule import Schedule
from ..config import Config
from ..fp8 import make_recipe, make_recompute

_STEP_BYTES = 4  # AdamW's counter of updates, a float32 in CPU memory


@dataclass(frozen=True)
class Weight:
    """One parameter of the whole model.

    Attributes:
        name: as in checkpoints.
        numel: its numbers, those of all experts.
        dtype: of the parameter.
        routed: whether it holds routed experts, which are divided over mesh.ep.
        fp8: whether an FP8 form of it is kept beside.
        matrices: in it; a checkpoint counts the updates of each.
    """

    name: str
    numel: int
    dtype: torch.dtype
    routed: bool
    fp8: bool = False
    matrices: int = 1

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def updated(self) -> torch.dtype:
        """Of what AdamW updates: the parameter, or its float32 master."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def master_bytes(self) -> int:
        return 0 if self.updated == self.dtype else self.numel * self.updated.itemsize

    def moment_bytes(self, moments: str) -> int:
        """Of both moments; "float32" stands for the dtype of what is updated."""
        size = 2 if moments == "bfloat16" else self.updated.itemsize
        return 2 * self.numel * size


def stage_weights(config: Config, schedule: Schedule) -> list[dict[str, Weight]]:
    """The parameters of each stage, by name; no memory is taken for them."""
    stages: list[dict[str, Weight]] = []
    for part in partition(config.model, schedule.num_stages):
        module = DeepSeekV3(
            config.model,
            part,
            dtype=getattr(torch, config.train.dtype),
            device="meta",
            recipe=make_recipe(config),
            recompute=make_recompute(config),
        )
        routed = {id(p) for m in module.modules() if isinstance(m, Experts) for p in m.parameters()}
        stages.append(
            {
                name: Weight(
                    name=name,
                    numel=p.numel(),
                    dtype=p.dtype,
                    routed=id(p) in routed,
                    fp8=config.fp8.enabled and _in_fp8(name),
                    matrices=math.prod(p.shape[:-2]),
                )
                for name, p in module.named_parameters()
            }
        )
    return stages


def checkpoint_bytes(config: Config, schedule: Schedule) -> int:
    """Bytes of the tensors of one checkpoint, each once however many ranks hold it.

    Parameters, both moments, AdamW's counters, masters, moving averages and routers' biases.
    """
    weights: dict[str, Weight] = {}
    for stage in stage_weights(config, schedule):
        weights |= stage
    total = 0
    for weight in weights.values():
        total += weight.nbytes + weight.moment_bytes(config.moments) + weight.master_bytes
        total += _STEP_BYTES * weight.matrices
        if config.train.ema_decay is not None:
            total += 4 * weight.numel
    return total + _bias_bytes(config, weights.values())


def _bias_bytes(config: Config, weights: Iterable[Weight]) -> int:
    if config.model.topk_method != "noaux_tc":
        return 0
    return sum(
        config.model.n_routed_experts * weight.dtype.itemsize
        for weight in weights
        if weight.name.endswith(".mlp.gate.weight")
    )


def _in_fp8(name: str) -> bool:
    """Whether a product that a recipe covers uses this parameter: see `Build.recipe`."""
    if name.endswith(("embed_tokens.weight", "lm_head.weight", ".mlp.gate.weight")):
        return False
    return name.endswith(("proj.weight", "proj", "proj_with_mqa.weight"))
