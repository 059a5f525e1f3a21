"""How large a run's parameters and checkpoints are."""

from __future__ import annotations

from ...model.inventory import Parameter, inventory
from ...parallel.schedule import Schedule
from ...predict.memory import master_bytes, moment_bytes, storage_of
from ..config import Config
from ..plan_layout import layout_of

_STEP_BYTES = 4  # AdamW's counter of updates, a float32 in CPU memory
_AVERAGE_BYTES = 4  # of a number of the moving average, a float32


def stage_weights(config: Config, schedule: Schedule) -> list[dict[str, Parameter]]:
    """The parameters of each stage, by name."""
    parts = layout_of(config).parts(config.model, schedule.num_stages)
    return [{p.name: p for p in inventory(config.model, part)} for part in parts]


def checkpoint_bytes(config: Config, schedule: Schedule) -> int:
    """Bytes of the tensors of one checkpoint, each once however many ranks hold it.

    Parameters, both moments, AdamW's counters, masters, moving averages and routers' biases.
    """
    storage = storage_of(layout_of(config))
    weights: dict[str, Parameter] = {}
    for stage in stage_weights(config, schedule):
        weights |= stage
    average = 0 if config.train.ema_decay is None else _AVERAGE_BYTES
    has_bias = config.model.topk_method == "noaux_tc"
    total = 0
    for weight in weights.values():
        states = moment_bytes(storage, config.moments) + master_bytes(weight, storage)
        total += weight.numel * (weight.itemsize(storage) + states + average)
        total += _STEP_BYTES * weight.matrices
        if has_bias and weight.name.endswith(".mlp.gate.weight"):
            total += config.model.n_routed_experts * weight.itemsize(storage)
    return total
