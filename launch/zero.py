"""Who averages gradients and updates parameters: whole ones, shares of them, or DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn import Parameter

from ..parallel.gradients import WholeGradients
from ..parallel.pipeline import Pipeline
from ..parallel.zero import Shards
from ..parallel.zero_ends import stage_ends
from .optim import Optimizer
from .zero_deepspeed import DeepSpeedZero

Means = WholeGradients | Shards | DeepSpeedZero


def make_update(
    zero: int,
    backend: str,
    pipeline: Pipeline,
    parts: Mapping[int, nn.Module],
    is_expert: Callable[[Parameter], bool],
    adam: Mapping[str, Any],
) -> tuple[Means, Optimizer | DeepSpeedZero]:
    """What averages gradients over ranks, and what updates parameters with the means.

    Args:
        zero, backend: as of `Engine`.
        pipeline: with its mesh, schedule and replicas.
        parts: this rank's modules by stage.
        is_expert: whether a parameter is of experts, which other ranks hold than the rest. Their
            gradients are sums over ep already: they see the tokens of all of its ranks.
        adam: further arguments of the optimizer.

    Raises:
        ValueError: no such kind or backend, or DeepSpeed does not suit the layout.
    """
    mesh = pipeline.mesh
    scale, board = 1.0 / mesh.shape.dp, mesh.waits
    parameters = {name: p for part in parts.values() for name, p in part.named_parameters()}

    def group_of(parameter: Parameter) -> dist.ProcessGroup | None:
        return mesh.edp_group if is_expert(parameter) else mesh.dp_group

    if zero == 0:
        means = WholeGradients(parameters.values(), group_of, scale=scale, board=board)
        return means, Optimizer(parameters.items(), **adam)
    if zero != 1 or backend not in ("counterflow", "deepspeed"):
        raise ValueError(
            f'zero must be 0 or 1, its backend "counterflow" or "deepspeed"; got {zero} and '
            f"{backend!r}"
        )
    if backend == "counterflow":
        stages = {stage: dict(parts[stage].named_parameters()) for stage in _order(pipeline, parts)}
        shards = Shards(stages, group_of, scale=scale, board=board)
        return shards, Optimizer(parameters.items(), shards=shards, **adam)
    if mesh.shape.ep > 1 or pipeline.replicas.by_ranks:
        raise ValueError(
            "DeepSpeed's ZeRO-1 knows neither experts that are spread over ranks (mesh.ep) nor "
            "parameters that several pipeline ranks hold (stages of a bidirectional schedule, the "
            'embedding that the head uses too); take zero.backend = "counterflow"'
        )
    theirs = DeepSpeedZero(parameters, mesh.dp_group, board=board, **adam)
    return theirs, theirs


def _order(pipeline: Pipeline, parts: Mapping[int, nn.Module]) -> list[int]:
    """This rank's stages in the order in which they begin a step."""
    begins = stage_ends(pipeline.schedule.rows[pipeline.mesh.pp_rank]).begins
    return list(dict.fromkeys([*(s for stages in begins.values() for s in stages), *parts]))
