"""What the GPU backends share: the check for Hopper, and layouts of operands."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import Quantized, tiles_in
from .base import is_in_blocks


def why_not_hopper(device: torch.device) -> str | None:
    """Why FP8 products with fine-grained scales of cuBLAS and DeepGEMM do not run on `device`."""
    if device.type != "cuda":
        return f"it runs on a Hopper GPU, and the operands are on {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major != 9:
        return f"it runs on Hopper (capability 9.0), and {device} has {major}.{minor}"
    return None


def why_no_gpu() -> str | None:
    """Why no GPU can be used from here, or None."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU; backend='reference' runs anywhere"
    return None


def block_scales(q: Quantized) -> Tensor | None:
    """Float32 scales of 128x128 blocks, or None if `q` is in tiles: [.., R/128, C/128] rounded up.

    One scale in all is that of every block.
    """
    rows, columns = q.values.shape[-2:]
    scales = q.scales.to(torch.float32)
    if is_in_blocks(q):
        return dense(scales.mT).mT if scales.mT.is_contiguous() else dense(scales)
    if scales.shape[-2:] == (1, 1):
        shape = (*scales.shape[:-2], tiles_in(rows), tiles_in(columns))
        return dense(scales.expand(shape))
    return None


def indivisible(sizes: dict[str, tuple[int, int]]) -> str | None:
    """Which of the sizes, by name with what each must be a multiple of, is not; with the remedy."""
    wrong = [f"{name} = {n} (of {of})" for name, (n, of) in sizes.items() if n % of]
    if not wrong:
        return None
    return f"sizes must be multiples: {', '.join(wrong)}; pad them, or take backend='triton'"


def row_major(values: Tensor) -> Tensor:
    """The same codes with rows one after another; a transposed view is copied.

    Hopper reads FP8 along K alone, so the input gradient's weights are turned around here.
    """
    return dense(values.view(torch.uint8)).view(values.dtype)


def dense(x: Tensor) -> Tensor:
    """`x` contiguous, with the strides of its shape.

    torch calls a tensor contiguous whatever the stride of a dimension of size 1; libraries do not.
    """
    return x.contiguous().view(-1).view(x.shape)
