"""What changes as a run goes on, as pure functions of the step: learning rate, batch, weights.

`step` is an index here, the number of steps before it; what people read counts from 1. The shapes
are those of DeepSeek-V3's pre-training (arXiv 2412.19437, section 4.2).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import ScheduleConfig, TrainConfig

# DeepSeek-V3 changes two weights after a share of its 14.8T tokens.
_MTP_SWITCH = 10 / 14.8
_BIAS_STOP = 14.3 / 14.8


def learning_rate(step: int, train: TrainConfig) -> float:
    """The learning rate of the update at `step`: warm-up, constant, cosine, constant, final.

    Warm-up rises by lr / warmup_steps a step and is at lr in its last step, so that no update is
    wasted at 0. The cosine starts at lr and is at lr_min in the step after its last.
    """
    if step >= train.steps - train.final_steps:
        return train.lr_final
    if step < train.warmup_steps:
        return train.lr * (step + 1) / train.warmup_steps
    begin = train.warmup_steps + train.constant_steps
    length = train.cosine_steps
    if length is None:
        length = train.steps - train.final_steps - begin
    if step < begin:
        return train.lr
    if step >= begin + length:
        return train.lr_min
    share = 0.5 * (1.0 + math.cos(math.pi * (step - begin) / length))
    return train.lr_min + (train.lr - train.lr_min) * share


def microbatches(step: int, train: TrainConfig, schedule: ScheduleConfig, multiple: int) -> int:
    """Micro-batches of `step` for each data-parallel rank: the batch-size ramp.

    Rises linearly from train.ramp_start at step 0 to schedule.microbatches at step
    train.ramp_steps, rounded down to `multiple` (of what the schedule can divide; the routes of its
    placement), but not below ramp_start.
    """
    full, start = schedule.microbatches, train.ramp_start
    if step >= train.ramp_steps:
        return full
    count = start + (full - start) * step // train.ramp_steps
    return max(count // multiple * multiple, start)


def mtp_weight(step: int, train: TrainConfig) -> float:
    """The weight lambda of the multi-token-prediction loss at `step`."""
    return train.mtp_weight if step < mtp_switch_step(train) else train.mtp_weight_later


def bias_update_speed(step: int, train: TrainConfig) -> float:
    """The router-bias update speed gamma at `step`; 0 from the stop step on."""
    return train.bias_update_speed if step < bias_stop_step(train) else 0.0


def mtp_switch_step(train: TrainConfig) -> int:
    if train.mtp_switch_step is not None:
        return train.mtp_switch_step
    return round(_MTP_SWITCH * train.steps)


def bias_stop_step(train: TrainConfig) -> int:
    if train.bias_stop_step is not None:
        return train.bias_stop_step
    return round(_BIAS_STOP * train.steps)
