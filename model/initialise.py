"""Initial values that depend on a parameter's name and the seed, and on nothing else.

So any layout (stages, expert shards, replicas) starts from the very same model.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

from .names import hf_tensors

if TYPE_CHECKING:
    from .deepseek import DeepSeekV3


@torch.no_grad()
def initialise(part: DeepSeekV3, *, std: float, seed: int) -> None:
    """Fill a part: norms with 1, balancing biases with 0, every other weight from N(0, std).

    Each Hugging Face tensor has its own generator, seeded by its name. Values are drawn in float32
    on the CPU, so dtypes and devices differ by rounding only.
    """
    for name, tensor in hf_tensors(part):
        if tensor.is_meta:
            continue
        if name.endswith("norm.weight"):
            tensor.fill_(1)
        elif name.endswith("e_score_correction_bias"):
            tensor.zero_()
        else:
            generator = torch.Generator().manual_seed(_seed(name, seed))
            values = torch.empty(tensor.shape, dtype=torch.float32)
            tensor.copy_(values.normal_(0, std, generator=generator))


def _seed(name: str, seed: int) -> int:
    """32 bits of name and seed; torch's CPU generator leaves any higher ones unused."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "little")
