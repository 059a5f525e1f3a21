"""Small tables between the host and a GPU, without making the host wait for the GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_host(counts: Tensor) -> Tensor:
    """Counts on the CPU; from a GPU in its stream's order, to be read once that was waited for."""
    if counts.is_cpu:
        return counts
    host = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
    return host.copy_(counts, non_blocking=True)


def to_device(numbers: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Whole numbers as int64 on a device; to a GPU in its stream's order, from pinned memory."""
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=torch.int64, device=device)
    pinned = torch.tensor(numbers, dtype=torch.int64, pin_memory=True)
    return pinned.to(device, non_blocking=True)
