"""Rotary position embedding on interleaved pairs, with YaRN (arXiv 2309.00071).

Shapes: L positions, R = rotated size of a head; pair i is dimensions 2i and 2i + 1, as in the
published weights.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .config import ModelConfig, Yarn
from .linear import at_least_float32


class Rotation(NamedTuple):
    """Cosines and sines of positions 0..L-1, scaled by YaRN's factor: each [L, R / 2]."""

    cos: Tensor
    sin: Tensor

    def first(self, length: int) -> Rotation:
        """The rotation of positions 0..length-1."""
        return Rotation(self.cos[:length], self.sin[:length])


class RotaryTable:
    """The angles of a model, computed in float64 once for each device and kept.

    Args:
        config: rope_theta, qk_rope_head_dim and yarn are read.
        dtype: of the model; the table has float32 at least.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        self._frequencies = frequencies(config)
        self._scale = rotation_scale(config.yarn)
        self._dtype = at_least_float32(dtype)
        self._made: dict[torch.device, Rotation] = {}

    def at(self, length: int, device: torch.device) -> Rotation:
        """Rotation of positions 0..length-1 on `device`."""
        made = self._made.get(device)
        if made is None or len(made.cos) < length:
            angles = torch.outer(torch.arange(length, dtype=torch.float64), self._frequencies)
            made = Rotation(
                (angles.cos() * self._scale).to(device, self._dtype),
                (angles.sin() * self._scale).to(device, self._dtype),
            )
            self._made[device] = made
        return made.first(length)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Each pair of x turned by its position's angle, in float32 at least.

    Args:
        x: [B, L, H, R].
        rotation: of L positions.

    Returns:
        [B, L, H, R], dtype of x.
    """
    cos, sin = (table[:, None, :] for table in rotation)
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def frequencies(config: ModelConfig) -> Tensor:
    """Radians a position for each pair: [R / 2] float64."""
    size, theta, yarn = config.qk_rope_head_dim, config.rope_theta, config.yarn
    pairs = torch.arange(0, size, 2, dtype=torch.float64) / size
    plain = theta**-pairs
    if yarn is None:
        return plain

    def pair_with(turns: float) -> float:
        # The (fractional) pair that makes `turns` turns within the original context.
        context = yarn.original_max_position_embeddings
        return size * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_with(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_with(yarn.beta_slow)), size - 1)
    width = (high - low) or 0.001  # both ends at one pair: a step, not a division by zero
    ramp = ((torch.arange(size // 2, dtype=torch.float64) - low) / width).clamp(0, 1)
    return plain * (1 - ramp) + plain / yarn.factor * ramp


def rotation_scale(yarn: Yarn | None) -> float:
    """What cosines and sines are multiplied by; 1 in the published models."""
    if yarn is None:
        return 1.0
    return _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)


def softmax_scale(config: ModelConfig) -> float:
    """What attention scores are multiplied by: 1 / sqrt(head size), with YaRN times mscale squared.

    (The published inference code applies mscale whenever the context is above the original one;
    here it belongs to YaRN being configured, as in the published modelling code.)
    """
    scale = config.qk_head_dim**-0.5
    if config.yarn is None:
        return scale
    return scale * _mscale(config.yarn.factor, config.yarn.mscale_all_dim) ** 2


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0
