"""What is published of DeepSeek-V3's training and serving, and the arithmetic that belongs to it.

Predictions are compared with these numbers, and never made from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        num_gpus: at work.
        pp, ep: pipeline ranks; ranks that share a set of experts.
        sequences: of a step.
        length: tokens of a sequence.
    """

    num_gpus: int
    pp: int
    ep: int
    sequences: int
    length: int

    @property
    def dp(self) -> int:
        """GPUs of each pipeline rank."""
        return self.num_gpus // self.pp

    @property
    def tokens_per_step(self) -> int:
        """Of all GPUs."""
        return self.sequences * self.length


# arXiv 2412.19437, sections 3.2 and 4.2; the batch is that after the ramp.
V3_RUN = Run(num_gpus=2048, pp=16, ep=64, sequences=15360, length=4096)
# arXiv 2412.19437, section 1: of pre-training, H800s.
V3_TOKENS = 14_800_000_000_000
V3_HOURS_PER_TRILLION = 180_000
# arXiv 2412.19437, table 1: H800 hours, and the rent of one that its costs are reckoned with.
V3_GPU_HOURS: Mapping[str, int] = MappingProxyType(
    {"pre-training": 2_664_000, "context extension": 119_000, "post-training": 5_000}
)
V3_DOLLARS_PER_HOUR = 2
# arXiv 2505.09343, table 4: V3's training on the multi-plane network, GPUs as of V3_RUN.
V3_TOKENS_PER_DAY = 272_800_000_000
# From the same table, seconds of a step of 19.926. Whose they are, the mean of all ranks or one
# rank's, is not said; nor whether "B" holds full backwards and input gradients, as here, or the
# optimizer's the reduction of gradients.
V3_STEP_PARTS: Mapping[str, float] = MappingProxyType(
    {
        "forward": 1.13,
        "backward": 1.99,
        "weight": 0.48,
        "paired": 13.95,
        "bubble": 2.06,
        "reduce and optimizer": 0.29,
    }
)


def hours_per_trillion(tokens_per_day: float, num_gpus: int) -> float:
    """GPU hours for 1e12 tokens at so many tokens a day; 180.2e3 by V3_TOKENS_PER_DAY."""
    return 24 * num_gpus / tokens_per_day * 1e12


def gpu_hours(tokens: float, per_trillion: float) -> float:
    """GPU hours for so many tokens; 2664e3 for V3 by what is published, 2666.6e3 by its rate."""
    return tokens / 1e12 * per_trillion


def days(hours: float, num_gpus: int) -> float:
    """How long GPU hours last; 3.7 for 1e12 tokens of V3 on 2,048."""
    return hours / num_gpus / 24


def step_seconds(per_trillion: float, run: Run) -> float:
    """How long a step takes where 1e12 tokens take so many GPU hours; 19.9 for V3."""
    return per_trillion / 1e12 * run.tokens_per_step / run.num_gpus * 3600


def dollars(hours: Mapping[str, int], per_hour: int) -> dict[str, int]:
    """What each part of a training costs.

    Args:
        hours: GPU hours by part.
        per_hour: the rent of a GPU, dollars.
    """
    return {part: spent * per_hour for part, spent in hours.items()}


def exchange_us(
    gbps: float,
    *,
    tokens: int = 32,
    experts: int = 9,
    hidden: int = 7000,
    dispatch_bytes: int = 1,
    combine_bytes: int = 2,
) -> float:
    """Dispatch and combine of a layer in decoding, where nothing but bandwidth counts, us.

    The defaults are those of arXiv 2505.09343, section 2.3.2, which writes 7K for the hidden size
    and computes with 7000: 120.96 us at 50 GB/s, 6.72 at 900.

    Args:
        gbps: bandwidth of a GPU, 1e9 bytes/s.
        tokens: that a GPU decodes at a time.
        experts: that each of them is sent to, the shared one too.
        hidden: elements of a row.
        dispatch_bytes, combine_bytes: of an element on the way there and back.
    """
    row_bytes = (dispatch_bytes + combine_bytes) * hidden
    return tokens * experts * row_bytes / gbps * 1e-3


def layer_us(exchange: float) -> float:
    """A layer of decoding with two micro-batches in turn, whose computation hides: us."""
    return 2 * exchange


def output_token_ms(exchange: float, layers: int = 61) -> float:
    """Time per output token where each layer takes `layer_us`: 14.76 ms, 67 tokens/s, at 50 GB/s.

    Args:
        exchange: of `exchange_us`.
        layers: of the model.
    """
    return layers * layer_us(exchange) * 1e-3
